"""``xquant::shared_code_load``: dequantized keys or values."""

"""``xquant::decode_attention``: attention straight from the codes."""

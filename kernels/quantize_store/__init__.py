"""``xquant::quantize_store``: append tokens and quantize what is due."""

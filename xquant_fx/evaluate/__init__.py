"""Quality of a quantized cache on real text: next tokens against full precision, retrieval, errors by layer."""

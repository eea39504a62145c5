"""A cold prompt's causal attention to itself, on CPUs that multiply pairs of bfloat16 numbers."""

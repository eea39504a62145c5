"""A cold prompt's causal attention to itself, on CPUs where torch's own is slower."""

"""What is quantized and how: configuration, presets, and the plan of each layer."""

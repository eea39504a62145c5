"""KV caches: the tensor type, its state, allocation, and the Hugging Face cache."""

"""Quantizer, packing and the code behind the ops. Keep this file a docstring: at the root of a
checkout it shadows Hugging Face's ``kernels``, which transformers imports to see if it is there."""

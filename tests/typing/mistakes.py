"""Three mistakes, one per line marked so. Not run: type checkers must find these and no other (test_types.py)."""

from __future__ import annotations

from transformers import LlamaConfig

from xquant_fx import Nonsense, XQuantCache, XQuantConfig  # mistake

XQuantConfig(k_bits="two")  # mistake
XQuantCache(LlamaConfig(), "long")  # mistake
print(Nonsense)

"""Attention of many tokens that runs uncompiled: by a kernel, on CPUs where torch's own is slower.

Eager prompts come to it by their keys (``prompt_keys.py``), graphs that run op by op by ``by_kernel``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from xquant_fx.cache.reads import Dequantized
from xquant_fx.kernels.prompt_attention.cpu_call import LONG_PROMPT, attended, faster_dtypes

TORCHS = torch.nn.functional.scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``scaled_dot_product_attention``, dequantizing what is stored as codes."""
    if may_be_attended(query):  # torch would dequantize both, too
        key, value = (x.dense() if isinstance(x, Dequantized) else x for x in (key, value))
        out = attended(query, key, value, *args, **kwargs)
        if out is not None:
            return out
    return TORCHS(query, key, value, *args, **kwargs)


def may_be_attended(x: Tensor) -> bool:
    """Whether tokens [B, heads, q, D] are so many, where and of a dtype, that the kernel may gain."""
    if x.dim() != 4 or x.shape[2] < LONG_PROMPT or x.device.type != "cpu":
        return False
    return x.dtype in faster_dtypes()


def by_kernel(gm: GraphModule) -> GraphModule:
    """``gm``, which is not going to be compiled, with ``attention`` in the place of torch's."""
    for node in gm.graph.find_nodes(op="call_function", target=TORCHS):
        node.target = attention
    gm.recompile()
    return gm

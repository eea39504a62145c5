"""Inductor's freezing makes constants of all that has a static address, caches included."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.fx import GraphModule

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.stacked import StackedKV
from xquant_fx.compiler.left_alone import report_buffers
from xquant_fx.compiler.options import Request
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.find_writes import written_by

WHY = "freezing makes the cache a constant of the graph, so that one graph would serve one cache alone"
WAY_OUT = "switch torch._inductor.config.freezing (TORCHINDUCTOR_FREEZING) off"


def check_frozen(gm: GraphModule, request: Request) -> None:
    """Tell of caches that are constants of ``gm``: a quantized one cannot be, an ordinary one stays as it is.

    Raises:
        CacheStateError: a quantized one is.
        NotRewrittenError: an ordinary one is, under ``strict``.
    """
    for tensor in (*vars(gm).values(), *gm._buffers.values()):
        if isinstance(tensor, QuantizedKV | StackedKV):
            raise CacheStateError(f"{tensor.origin}: {WHY}: {WAY_OUT}")
    report_buffers([(name, f"{WHY}: {WAY_OUT}") for name in dict.fromkeys(_written_constants(gm))], request)


def _written_constants(gm: GraphModule) -> Iterator[str]:
    """Names of tensors [B, H, N, D] that the graph holds and writes to."""
    for node in gm.graph.nodes:
        for operand in written_by(node):
            held = getattr(gm, str(operand.target), None) if operand.op == "get_attr" else None
            if not isinstance(held, Tensor) or isinstance(held, nn.Parameter):
                continue
            if held.dim() == 4 and held.is_floating_point():
                yield operand.name

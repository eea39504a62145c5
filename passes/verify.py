"""What must hold after the passes: nothing of a quantized buffer is left, and the graph is sound."""

from __future__ import annotations

from torch.fx import GraphModule

from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.passes.context import Context
from xquant_fx.passes.trace import fake


def verify(gm: GraphModule, context: Context) -> int:
    """Check ``gm``: Inductor must see plain tensors only. Returns how many views were turned into views of loads.

    Raises:
        UnsupportedWriteError: a quantized buffer is still an input.
    """
    views = 0
    for node in gm.graph.nodes:
        value = fake(node)
        if not isinstance(value, QuantizedKV | GrowingKV):
            continue
        if node.op == "placeholder":
            raise UnsupportedWriteError(f"{node.name} still takes part in the graph as a quantized buffer")
        node.meta["example_value"] = value.dense()  # a view of a buffer, now of a load
        views += 1
    gm.graph.lint()
    gm.recompile()
    return views

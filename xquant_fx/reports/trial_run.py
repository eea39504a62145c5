"""Running a model once on copies, so that nothing of the caller's is changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from xquant_fx.cache.aliases import owner_of
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.stacked import leaves_of
from xquant_fx.passes.records import Detection


def copies(arguments: Any) -> tuple[Any, dict[int, Tensor]]:
    """A deep copy of ``arguments``, and the tensors that were copied by the ids of their copies."""
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(arguments, memo)
    kept = memo.get(id(memo), [])  # what deepcopy copied, kept alive
    return copied, {id(memo[id(x)]): x for x in kept if isinstance(x, Tensor) and id(x) in memo}


class HeldTensors:
    """Tensors that a model itself holds (KV buffers of modules), to be put back after a trial run."""

    def __init__(self, model: object) -> None:
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        values = (value for m in modules for value in tree_leaves(vars(m)))  # its buffers, and lists of tensors
        self.ids = {id(leaf) for value in values if isinstance(value, Tensor) for leaf in leaves_of(value)}
        self.saved: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def save(self, found: Detection, inputs: Sequence[Any]) -> None:
        """Copy what the graph is about to write to, unless an earlier graph of the same call did."""
        placeholders = found.gm.graph.find_nodes(op="placeholder")
        for node, given in zip(placeholders, inputs, strict=True):
            tensor = owner_of(given)
            if node in found.written and isinstance(tensor, Tensor) and id(tensor) in self.ids - set(self.saved):
                self.saved[id(tensor)] = tensor, {name: part.clone() for name, part in _parts(tensor).items()}

    def restore(self) -> None:
        """Write the copies back."""
        with torch.no_grad():
            for tensor, saved in self.saved.values():
                if isinstance(tensor, QuantizedKV):
                    tensor.live.group.drop()
                for name, part in _parts(tensor).items():
                    part.copy_(saved[name])


def _parts(tensor: Tensor) -> dict[str, Tensor]:
    return tensor.live.owned if isinstance(tensor, QuantizedKV) else {"": tensor}

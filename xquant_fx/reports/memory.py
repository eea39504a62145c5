"""``memory_report``: what a quantized KV cache really takes, every byte counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from xquant_fx.cache.growing import STORED_KV, GrowingKV
from xquant_fx.cache.pages import shared_bytes
from xquant_fx.cache.stacked import leaves_of, stored_in
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ArgumentError, CacheStateError

_PART = {
    "codes": "codes", "scale": "scales", "norm": "scales", "zero": "zero_points", "ring": "residual_windows",
    "sink": "sinks",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache's storages by what they hold, and what that is per element."""

    codes: int
    """Bytes of packed codes (and of 16-bit storage)."""
    scales: int
    """Bytes of scales and of token norms."""
    zero_points: int
    residual_windows: int
    """Bytes of the latest tokens in full precision."""
    sinks: int
    """Bytes of the first tokens in full precision."""
    other: int
    """Bytes of lengths, counters, padding, and of layers that are not quantized."""
    full_bytes: int
    """Bytes of the same keys, values and other states in the model's dtype, for the same max_cache_len (of a sliding
    window: for the window); of a cache that grows by concatenation for its current length."""
    elements: int
    """K and V elements at the cache's current length, of a sliding window those in it; all elements of layers that are
    not quantized."""
    shared: int = 0
    """Bytes of all these in pages that were shared by ``fork()`` and that this cache has not written to since: forks of
    one cache take them once."""

    @property
    def total_bytes(self) -> int:
        """Everything the cache holds, in bytes."""
        return self.codes + self.scales + self.zero_points + self.residual_windows + self.sinks + self.other

    @property
    def ratio(self) -> float:
        """How many times smaller than in full precision."""
        return self.full_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def bits_per_element(self) -> float:
        """All bits held, divided by the K and V elements stored now (inf for an empty cache)."""
        return 8 * self.total_bytes / self.elements if self.elements else float("inf")

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part; they add up to ``total_bytes``."""
        names = ("codes", "scales", "zero_points", "residual_windows", "sinks", "other")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        from xquant_fx.tables import render

        total = max(self.total_bytes, 1)
        rows = [[name.replace("_", " "), f"{size:,}", f"{size / total:.1%}"] for name, size in self.parts.items()]
        rows.append(["total", f"{self.total_bytes:,}", "100.0%"])
        note = (
            f"full precision {self.full_bytes:,} bytes: {_compared(self.ratio)}; "
            f"{self.bits_per_element:.3f} bits per element at the current length"
        )
        note += f"; {self.shared:,} bytes shared with forks" if self.shared else ""
        return render("KV cache memory", ["part", "bytes", "share"], rows, note)


def _compared(ratio: float) -> str:
    return f"{ratio:.2f} times as much" if ratio >= 1 else f"quantized takes {1 / ratio:.2f} times as much"


def memory_report(cache_or_model: Any) -> MemoryReport:
    """Report on an XQuantCache, any Hugging Face cache, pasts in tuples, lists or dicts, or a module.

    Of an ``EncoderDecoderCache`` both caches are counted.

    Raises:
        ArgumentError: it is neither a cache nor a module.
        CacheStateError: no quantized KV buffer is in it (an XQuantCache allocates at its first step).
    """
    if not (_caches_in(cache_or_model) or isinstance(cache_or_model, torch.nn.Module | tuple | list | dict)):
        raise ArgumentError(f"memory_report takes a cache or a module, got {type(cache_or_model).__name__}")
    tensors = list(_tensors(cache_or_model))
    states = [t.live for t in tensors if isinstance(t, STORED_KV)]
    if not states:
        raise CacheStateError(
            f"{type(cache_or_model).__name__} holds no quantized KV buffer (it is allocated at the first step)"
        )
    plain = [t for t in tensors if not isinstance(t, STORED_KV)]
    growing = {id(t.live) for t in tensors if isinstance(t, GrowingKV)}
    return _count(states, plain, growing)


def _count(states: list[KVState], plain: list[Tensor], growing: set[int]) -> MemoryReport:
    for state in states:
        state.group.drop()  # a prompt that eager code may still read is released at the next step anyway
    bytes_of: dict[str, int] = dict.fromkeys([*_PART.values(), "other"], 0)
    for state in states:
        for name, tensor in state.owned.items():
            bytes_of[_PART.get(name, "other")] += tensor.untyped_storage().nbytes()
    for group in {id(s.group): s.group for s in states}.values():
        bytes_of["other"] += group.start.untyped_storage().nbytes() + group.faults.tensor.untyped_storage().nbytes()
    full, elements = 0, 0
    for state in states:
        batch, heads, _, dim = state.spec.shape
        most = state.spec.full_tokens
        held = min(state.length, most) if id(state) in growing else most
        full += batch * heads * dim * state.spec.dtype.itemsize * held
        elements += heads * dim * sum(min(length, most) for length in state.row_lengths)
    bytes_of["other"] += sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}.values())
    for tensor in plain:
        if tensor.is_floating_point():  # integers only count tokens
            full += tensor.nbytes
            elements += tensor.numel()
    shared = shared_bytes(tensor for state in states for tensor in state.owned.values())
    return MemoryReport(full_bytes=full, elements=elements, shared=shared, **bytes_of)


def _tensors(holder: Any) -> Iterator[Tensor]:
    """All tensors that a cache's layers or tuples hold, or the quantized buffers of a module, each once."""
    if isinstance(holder, torch.nn.Module):
        found = (t for module in holder.modules() for t in _module_tensors(module))
    else:
        # Linear attention keeps dicts of states.
        layers = [vars(layer) for cache in _caches_in(holder) for layer in cache.layers] or holder
        found = (t for held in tree_leaves(layers) for t in leaves_of(held) if isinstance(t, Tensor))
    seen: set[int] = set()
    for tensor in found:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _caches_in(holder: Any) -> list[Any]:
    """The caches with layers that ``holder`` is or, as an ``EncoderDecoderCache``, has."""
    if isinstance(holder, torch.nn.Module | tuple | list | dict):
        return []
    held = [holder] if hasattr(holder, "layers") else getattr(holder, "__dict__", {}).values()
    return [cache for cache in held if hasattr(cache, "layers")]


def _module_tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from stored_in(tree_leaves(vars(module)))  # its buffers, and lists and dicts of tensors

"""What a quantized cache takes: bits that grow with the text, and all bytes of a window."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch

from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.plan.spec import KVSpec
from xquant_fx.reports.memory import MemoryReport, memory_report


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of the quantized layers of a cache."""

    true_bits: float
    """Bits per element of codes, scales and zero points: all that grows with the text, so no window and no sink.

    Storage of 16 bits counts as that, whatever dtype the model is measured in.
    """
    bits: float
    """All bits held at the end of the window, divided by the elements stored."""
    bytes: int
    """All bytes held at the end of the window."""
    ratio: float
    """How many times smaller than in full precision."""


def size_of(cache: XQuantCache) -> Size:
    """The size of a cache that has been written to."""
    report = memory_report(SimpleNamespace(layers=cache.quantized_layers))
    bits = true_bits([state.spec for state in cache.states])
    report = _without_what_left(report, cache)
    return Size(bits, report.bits_per_element, report.total_bytes, report.ratio)


def _without_what_left(report: MemoryReport, cache: XQuantCache) -> MemoryReport:
    """``report`` without tokens that have left a sliding window and are kept for looking back."""
    codes = full = elements = 0
    for layer in cache.quantized_layers:
        for state in layer.states if layer.left_window else ():
            spec, window = state.spec, dataclasses.replace(state.spec, window=layer.left_window)
            each = spec.shape[0] * spec.shape[1] * spec.shape[3]
            codes += spec.stored_bytes - window.stored_bytes
            full += (spec.full_tokens - window.full_tokens) * each * spec.dtype.itemsize
            elements += max(state.length - window.full_tokens, 0) * each
    return dataclasses.replace(
        report, codes=report.codes - codes, full_bytes=report.full_bytes - full, elements=report.elements - elements
    )


def saved(cache: XQuantCache) -> float:
    """Share of 16 bits per element that a cache made for as many tokens as are stored saves, windows and all.

    Windows are counted at 16 bits, whatever dtype the model is measured in.
    """
    tokens, specs = int(cache.get_seq_length()), [state.spec for state in cache.states]
    elements = sum(min(tokens, spec.full_tokens) * spec.shape[0] * spec.shape[1] * spec.shape[3] for spec in specs)
    return 1 - sum(_bits(spec, tokens, spec.window) for spec in specs) / (16 * elements)


def true_bits(specs: list[KVSpec]) -> float:
    """Bits that one more element costs: what all buffers grow by from one long text to another twice as long.

    Of sliding windows: what they would grow by if they kept all tokens.
    """
    tokens = _whole_blocks(specs)
    return sum(growth(specs)) / sum(tokens * spec.shape[0] * spec.shape[1] * spec.shape[3] for spec in specs)


def growth(specs: list[KVSpec]) -> list[int]:
    """Bits that each buffer grows by from one long text to another twice as long, the same for all ``specs``."""
    tokens = _whole_blocks(specs)
    return [_bits(spec, 2 * tokens) - _bits(spec, tokens) for spec in specs]


def _whole_blocks(specs: list[KVSpec]) -> int:
    """Tokens that are whole blocks and whole words of every scheme, so that padding is the same for any such text."""
    return math.lcm(*(spec.residual_length for spec in specs)) * 32


def _bits(spec: KVSpec, tokens: int, window: int = 0) -> int:
    of_text = dataclasses.replace(spec.with_room(tokens), dtype=torch.bfloat16, window=window)
    return 8 * of_text.stored_bytes

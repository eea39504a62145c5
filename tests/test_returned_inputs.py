"""Buffers that a program names anew at each step: ``self.keys = self.keys.to(x)``, as Meta's Llama has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewrites import Rewrites
from stepping import interpreted
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig, explain
from xquant_fx.cache.kv_tensor import QuantizedKV

FULL = XQuantConfig.preset("full")
NAMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "to": lambda buffer, x: buffer.to(x),
    "device and dtype": lambda buffer, x: buffer.to(x.device).to(x.dtype),
    "type_as, contiguous": lambda buffer, x: buffer.type_as(x).contiguous(),
}


class Decoder(nn.Module):
    def __init__(self, name: str, at: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name, self.at = NAMES[name], at
        shape = [1, 2, 2, 16]
        shape[at] = 64
        self.keys, self.values = (torch.zeros(shape, dtype=dtype) for _ in range(2))

    def forward(self, x: Tensor, p: int) -> Tensor:
        end = p + x.shape[self.at]
        self.keys, self.values = self.name(self.keys, x), self.name(self.values, x)
        self.keys[(slice(None),) * self.at + (slice(p, end),)] = x
        self.values[(slice(None),) * self.at + (slice(p, end),)] = 2 * x
        read = [t.narrow(self.at, 0, end) for t in (x.narrow(self.at, 0, end - p), self.keys, self.values)[1:]]
        q, k, v = (t if self.at == 2 else t.transpose(1, 2) for t in (x, *read))
        return sdpa(q, k, v, attn_mask=torch.ones(end - p, end, dtype=torch.bool).tril(p))


@torch.no_grad()
def steps(step: Callable[..., Tensor], at: int = 2) -> list[Tensor]:
    out, p = [], 0
    for n in (20, 1, 1, 1):
        shape = [1, 2, 2, 16]
        shape[at] = n
        out.append(step(torch.randn(shape, generator=torch.Generator().manual_seed(p)), p))
        p += n
    return out


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_they_are_quantized_and_stay_the_same_tensors(name: str, at: int) -> None:
    fast, plain = Decoder(name, at), Decoder(name, at)
    held = fast.keys
    step = torch.compile(fast, backend=interpreted(config=FULL))
    for _ in range(2):  # a new sequence, too
        torch.testing.assert_close(steps(step, at), steps(plain, at))
        assert fast.keys is held and isinstance(fast.keys, QuantizedKV) and isinstance(fast.values, QuantizedKV)
        torch.testing.assert_close(
            fast.keys.dequantize()[(slice(None),) * at + (slice(23),)], plain.keys.narrow(at, 0, 23)
        )
    with torch.no_grad():
        seen = explain(Decoder(name, at), torch.randn([1, 2, 1, 16] if at == 2 else [1, 1, 2, 16]), 0)
    assert seen.sites[0].rewritten


def test_what_is_cast_to_another_dtype_is_another_tensor() -> None:
    """In the first step; the next ones take the new buffers over."""
    fast, plain = (Decoder("to", dtype=torch.float64) for _ in range(2))
    held = fast.keys
    torch.testing.assert_close(steps(torch.compile(fast, backend=interpreted(config=FULL))), steps(plain))
    assert type(held) is Tensor and held.dtype == torch.float64 and not held.any() and fast.keys is not held
    assert fast.keys.dtype == torch.float32


def test_what_is_not_quantized_is_returned_as_it_is() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.zeros(2, 3, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen.to(x)
            self.seen[:, 1:] += x
            return self.seen.sum()

    fast, plain, seen = Counts(), Counts(), Rewrites(config=FULL)
    held, step = fast.seen, torch.compile(fast, backend=seen)
    for _ in range(3):
        x = torch.randn(2, 2, 4)
        torch.testing.assert_close(step(x), plain(x))
        assert fast.seen is held and type(held) is Tensor
    torch.testing.assert_close(held, plain.seen)


def test_what_only_reads_is_left_alone() -> None:
    made: list[Any] = []
    step = torch.compile(
        lambda x: (x.to(torch.float32) + 1, x.to(torch.float32)), backend=interpreted(made, config=FULL)
    )
    x = torch.randn(2, 3, 4)
    got = step(x)
    torch.testing.assert_close(got, (x + 1, x))

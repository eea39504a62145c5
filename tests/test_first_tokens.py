"""Attention that reads the first tokens of its buffers (``keys[:, : p + t]``, as Meta's Llama does), and no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import interpreted
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV

pytest_plugins = ["plain_torch"]
LAYERS, HEADS, KV, DIM, LENGTH, BATCH = 1, 4, 2, 16, 64, 2
FULL = XQuantConfig.preset("full").replace(k_group_size=8, residual_length=8, rollback_tokens=8)
CONFIG = XQuantConfig.preset("kivi-4").replace(k_group_size=8, residual_length=8, rollback_tokens=8)
Attend = Callable[..., Tensor]


def scores_of(q: Tensor, keys: Tensor) -> Tensor:
    return q @ keys.repeat_interleave(HEADS // KV, 1).mT / math.sqrt(DIM)


def spelt_out(s: Tensor, values: Tensor) -> Tensor:
    return s.float().softmax(-1).to(values.dtype) @ values.repeat_interleave(HEADS // KV, 1)


def as_meta_has_it(q: Tensor, keys: Tensor, values: Tensor, p: int) -> Tensor:
    """No mask for one token; else one of minus infinity with zeros before it."""
    s, t = scores_of(q, keys), q.shape[2]
    if t > 1:
        s = s + torch.hstack([torch.zeros(t, p), torch.full((t, t), -math.inf).triu(1)])
    return spelt_out(s, values)


def by_bools(q: Tensor, keys: Tensor, values: Tensor, p: int) -> Tensor:
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(p)
    return sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)


def with_alibi(q: Tensor, keys: Tensor, values: Tensor, p: int) -> Tensor:
    distance = torch.arange(keys.shape[2]) - p - torch.arange(q.shape[2])[:, None]
    s = scores_of(q, keys) + 0.1 * distance.clamp(max=0)
    return spelt_out(s.masked_fill(distance > 0, -math.inf), values)


def no_mask(q: Tensor, keys: Tensor, values: Tensor, p: int) -> Tensor:
    return sdpa(q, keys, values, enable_gqa=True) if q.shape[2] == 1 else by_bools(q, keys, values, p)


def by_slice(x: Tensor, end: int) -> Tensor:
    return x[:, :end]


def by_narrow(x: Tensor, end: int) -> Tensor:
    return x.narrow(1, 0, end)


class Decoder(nn.Module):
    """Buffers [B, N, H, D], of which attention reads what ``read`` makes of them."""

    def __init__(self, attend: Attend, read: Callable[[Tensor, int], Tensor] = by_slice) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.read = attend, read
        self.embed = nn.Embedding(50, HEADS * DIM)
        self.q, self.k, self.v = (
            nn.ModuleList(nn.Linear(HEADS * DIM, n * DIM, bias=False) for _ in range(LAYERS)) for n in (HEADS, KV, KV)
        )
        self.keys, self.values = ([torch.zeros(BATCH, LENGTH, KV, DIM) for _ in range(LAYERS)] for _ in "kv")

    def forward(self, ids: Tensor, p: int) -> Tensor:
        x, end = self.embed(ids), p + ids.shape[1]
        for layer in range(LAYERS):
            q, k, v = (m[layer](x).unflatten(-1, (-1, DIM)) for m in (self.q, self.k, self.v))
            self.keys[layer][:, p:end], self.values[layer][:, p:end] = k, v
            keys, values = (self.read(buffer[layer], end).transpose(1, 2) for buffer in (self.keys, self.values))
            x = x + self.attend(q.transpose(1, 2), keys, values, p).transpose(1, 2).flatten(2)
        return x @ self.embed.weight.T


def whole(attend: Attend) -> Attend:
    """The same attention, of a buffer that is read as a whole: what lies behind is cut off or masked by it."""

    def of_all(q: Tensor, keys: Tensor, values: Tensor, p: int) -> Tensor:
        if attend is no_mask or attend is as_meta_has_it:
            mask = torch.ones(q.shape[2], LENGTH, dtype=torch.bool).tril(p)
            return sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)
        return attend(q, keys, values, p)

    return of_all


@torch.no_grad()
def steps(step: Callable[..., Tensor], spans: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Logits of steps at each (position, tokens)."""
    ids = torch.randint(50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [step(ids[:, p : p + t], p) for p, t in spans]


ONWARD = ((0, 21), (21, 1), (22, 1), (23, 3), (26, 1))


@pytest.mark.parametrize(
    ("attend", "read"),
    [
        (as_meta_has_it, by_slice),
        pytest.param(by_bools, by_narrow, marks=pytest.mark.slow),
        pytest.param(with_alibi, by_slice, marks=pytest.mark.slow),
        pytest.param(no_mask, by_narrow, marks=pytest.mark.slow),
    ],
)
def test_fused_with_what_is_behind_hidden(attend: Attend, read: Any, request: pytest.FixtureRequest) -> None:
    """At 16 bits eager code's numbers; at 4 those of a decoder that reads all of its buffers under a mask."""
    if attend is as_meta_has_it:  # of which 16 bits are in test_tokens_behind_what_is_read_are_not_seen
        request.getfixturevalue("plain_torch")
    else:
        expected = steps(Decoder(attend), ONWARD)
        got = steps(torch.compile(Decoder(attend, read), backend=interpreted(config=FULL)), ONWARD)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch._dynamo.reset()
    counters.clear()
    first, other = Decoder(attend, read), Decoder(whole(attend), lambda x, end: x)
    got = steps(torch.compile(first, backend=interpreted(config=CONFIG)), ONWARD)
    assert counters["xquant"]["fuse_decode"] >= 2 * LAYERS and all(type(b) is not Tensor for b in first.keys)
    torch._dynamo.reset()
    expected = steps(torch.compile(other, backend=interpreted(config=CONFIG)), ONWARD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def from_the_second(x: Tensor, end: int) -> Tensor:
    return x[:, 1:end]


def every_other(x: Tensor, end: int) -> Tensor:
    return x[:, 0:end:2]


@pytest.mark.parametrize("read", [from_the_second, pytest.param(every_other, marks=pytest.mark.slow)])
def test_other_tokens_are_read_dequantized(read: Any) -> None:
    def attend(q: Tensor, keys: Tensor, values: Tensor, p: int) -> Tensor:
        return sdpa(q, keys, values, enable_gqa=True)

    expected = steps(Decoder(attend, read), ONWARD)
    counters.clear()
    model = Decoder(attend, read)
    got = steps(torch.compile(model, backend=interpreted(config=FULL)), ONWARD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    steps(torch.compile(Decoder(attend, read), backend=interpreted(config=CONFIG)), ONWARD[:3])
    assert counters["xquant"]["rewrite"] and not counters["xquant"]["fuse_decode"]


@pytest.mark.parametrize(  # dynamic=None is in test_fused_with_what_is_behind_hidden; as_meta_has_it knows no mask, too
    ("attend", "dynamic"),
    [
        (as_meta_has_it, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((as_meta_has_it, None), (no_mask, True))),
    ],
)
def test_tokens_behind_what_is_read_are_not_seen(attend: Attend, dynamic: bool | None) -> None:
    """Tokens taken back, and sequences that begin anew, in buffers that nothing empties: they stay quantized."""
    spans = (*ONWARD, (24, 1), (25, 2), (0, 12), (12, 1), (0, 3), (3, 1))
    expected, model = steps(Decoder(attend), spans), Decoder(attend)
    got = steps(torch.compile(model, backend=interpreted(config=FULL), dynamic=dynamic), spans)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(isinstance(buffer, QuantizedKV) for buffer in (*model.keys, *model.values))


def test_a_rotating_buffer_is_given_back() -> None:
    """What is read goes on behind the tokens written: they are seen, and the buffers are ordinary ones again."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, p: int) -> Tensor:
        return sdpa(q, keys, values, enable_gqa=True)

    spans = ((0, 21), (21, 1), (22, 1), (3, 1), (4, 1))
    read = lambda x, end: x[:, : max(end, 23)]  # noqa: E731
    expected, model = steps(Decoder(attend, read), spans), Decoder(attend, read)
    got = steps(torch.compile(model, backend=interpreted(config=FULL)), spans)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(type(buffer) is Tensor for buffer in (*model.keys, *model.values))

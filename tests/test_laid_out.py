"""KV buffers whose dimensions are not in the order [B, H, N, D]: a step gives exactly what it gives in that order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import interpreted
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig, explain, memory_report
from xquant_fx.cache.aliases import in_order, laid_out, shape_in
from xquant_fx.cache.laid_out import LaidOutKV

LAYERS, HEADS, KV, DIM, LENGTH = 2, 4, 2, 16, 64
FULL = XQuantConfig.preset("full")
CONFIG = XQuantConfig.preset("kivi-4").replace(k_group_size=8, residual_length=8, rollback_tokens=8)
SIZES = 21, 1, 1, 9, 1


def by_positions(buffer: Tensor, at: int, pos: Tensor, x: Tensor) -> None:
    buffer[(slice(None),) * at + (pos,)] = x


def by_index_copy(buffer: Tensor, at: int, pos: Tensor, x: Tensor) -> None:
    buffer.index_copy_(at, pos, x)


def by_index_put(buffer: Tensor, at: int, pos: Tensor, x: Tensor) -> None:
    torch.ops.aten.index_put_(buffer, [*[None] * at, pos], x)


def by_span(buffer: Tensor, at: int, pos: int, x: Tensor) -> None:
    buffer[(slice(None),) * at + (slice(pos, pos + x.shape[at]), ...)] = x


def by_narrow(buffer: Tensor, at: int, pos: int, x: Tensor) -> None:
    buffer.narrow(at, pos, x.shape[at]).copy_(x)


def by_number(buffer: Tensor, at: int, pos: int, x: Tensor) -> None:
    if x.shape[at] > 1:
        return by_span(buffer, at, pos, x)
    buffer[(slice(None),) * at + (pos,)] = x.squeeze(at)


class Decoder(nn.Module):
    """Two layers whose buffers have dimensions ``dims``, and which append by ``write``."""

    def __init__(self, dims: str, write: Callable[..., None] = by_positions, batch: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dims, self.write, self.read = dims, write, lambda buffer: buffer
        self.embed = nn.Embedding(50, HEADS * DIM)
        self.q, self.k, self.v = (
            nn.ModuleList(nn.Linear(HEADS * DIM, n * DIM, bias=False) for _ in range(LAYERS)) for n in (HEADS, KV, KV)
        )
        for layer in range(LAYERS):
            for name in ("keys", "values"):
                shape = shape_in(dims, (batch, KV, LENGTH, DIM))
                self.register_buffer(f"{name}_{layer}", torch.zeros(shape), persistent=False)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids: Tensor, pos: Any) -> Tensor:
        x = self.embed(ids)
        at = self.dims.index("N")
        new = pos if isinstance(pos, Tensor) else slice(pos, pos + ids.shape[1])
        for layer in range(LAYERS):
            q, k, v = (m[layer](x).unflatten(-1, (-1, DIM)).transpose(1, 2) for m in (self.q, self.k, self.v))
            held = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
            for buffer, tokens in zip(held, (k, v), strict=True):
                self.write(buffer, at, pos, laid_out(tokens, self.dims))
            keys, values = (in_order(self.read(buffer), self.dims) for buffer in held)
            y = sdpa(q, keys, values, attn_mask=self.mask[new], enable_gqa=True)
            x = x + y.transpose(1, 2).flatten(2)
        return x @ self.embed.weight.T


def buffers(model: Decoder) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name != "mask"]


@torch.no_grad()
def steps(model: Decoder, step: Callable[..., Tensor], sizes: tuple[int, ...] = SIZES) -> Tensor:
    """Logits of steps of ``sizes`` tokens; the first is a prompt in eager code."""
    batch = 1 if "B" not in model.dims else buffers(model)[0].shape[model.dims.index("B")]
    ids, out, at = torch.randint(50, (batch, 40), generator=torch.Generator().manual_seed(1)), [], 0
    for number, n in enumerate(sizes):
        ints = model.write in (by_span, by_narrow, by_number)
        out.append((step if number else model)(ids[:, at : at + n], at if ints else torch.arange(at, at + n)))
        at += n
    return torch.cat(out, 1)


WAYS: list[Any] = [
    ("BNHD", by_index_put), ("NBHD", by_narrow), ("BHDN", by_number), ("NHD", by_positions), ("HDN", by_index_copy),
    ("BN2D", by_span),
]  # fmt: skip
#: The same ways in other orders; codes of some are compared below.
WAYS += [
    pytest.param(dims, write, marks=pytest.mark.slow)
    for dims, write in (
        ("BNHD", by_index_copy),
        ("BNHD", by_span),
        ("NB2D", by_number),
        ("BNHD", by_positions),
        ("HND", by_span),
    )
]


def position(write: Callable[..., None], at: int) -> Any:
    return at if write in (by_span, by_narrow, by_number) else torch.tensor([at])


@pytest.mark.parametrize(("dims", "write"), WAYS)
def test_steps_are_those_of_the_usual_order(dims: str, write: Callable[..., None]) -> None:
    batch = 2 if "B" in dims else 1
    usual, other = Decoder("BHND", batch=batch), Decoder(dims, write, batch)
    expected = steps(usual, usual)
    torch._dynamo.reset()
    made: list[Any] = []
    got = steps(other, torch.compile(other, backend=interpreted(made, config=FULL)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(type(buffer) is LaidOutKV for buffer in buffers(other)) and made
    held = buffers(other)[0]
    torch.testing.assert_close(in_order(held.dequantize(), dims), buffers(usual)[0], rtol=1e-5, atol=1e-5)


def test_buffers_that_are_left_are_compiled_as_the_program_has_them() -> None:
    """Inductor gets no tensors that Dynamo does not know, and no position is compiled for by itself."""
    usual, other = Decoder("BNHD", by_span), Decoder("BNHD", by_span)
    for model in (usual, other):
        torch.manual_seed(2)
        for buffer in buffers(model):
            buffer.normal_()  # as of torch.empty
    made: list[Any] = []
    counters.clear()
    got = steps(other, torch.compile(other, backend=interpreted(made, config=FULL, self_check=False)), (21, *[1] * 6))
    assert torch.equal(got, steps(usual, usual, (21, *[1] * 6)))
    assert all(map(torch.equal, buffers(other), buffers(usual)))
    assert counters["stats"]["unique_graphs"] == len(made) == 2
    shapes = [tuple(fake.shape) for gm in made for node in gm.graph.find_nodes(op="placeholder")
              if isinstance(fake := node.meta.get("example_value"), Tensor)]  # fmt: skip
    assert shapes.count((2, LENGTH, KV, DIM)) == 2 * 2 * LAYERS


@pytest.mark.parametrize(
    ("dims", "write"), [("BNHD", by_span), pytest.param("NHD", by_positions, marks=pytest.mark.slow)]
)
def test_codes_and_reports_are_those_of_the_usual_order(dims: str, write: Callable[..., None]) -> None:
    """Also of what an eager step makes of them, and of copies and rows that somebody selects."""
    batch = 2 if "B" in dims else 1
    usual, other = Decoder("BHND", batch=batch), Decoder(dims, write, batch)
    expected = steps(usual, torch.compile(usual, backend=interpreted(config=CONFIG)))
    torch._dynamo.reset()
    torch.testing.assert_close(
        steps(other, torch.compile(other, backend=interpreted(config=CONFIG))), expected, rtol=1e-5, atol=1e-5
    )
    seen = explain(other, torch.zeros(batch, 1, dtype=torch.long), position(write, sum(SIZES)))
    assert [(site.rewritten, site.dequantized) for site in seen.sites] == [(True, "")] * LAYERS
    assert memory_report(other).total_bytes == memory_report(usual).total_bytes
    with torch.no_grad():
        copied, ids = copy.deepcopy(other), torch.ones(batch, 1, dtype=torch.long)
        expected = usual(ids, torch.tensor([sum(SIZES)]))
        for model in (other, copied):
            torch.testing.assert_close(model(ids, position(write, sum(SIZES))), expected, rtol=1e-5, atol=1e-5)
        held, kept = buffers(other)[0], buffers(usual)[0]
        if batch > 1:
            rows = torch.tensor([1, 1])
            torch.testing.assert_close(held[rows].dequantize(), kept[rows].dequantize().transpose(1, 2))
        for buffer in buffers(other):
            buffer.zero_()
        assert not held.dequantize().any()


@pytest.mark.parametrize(
    "read",
    [
        lambda kv: kv.view(*kv.shape[:2], KV * DIM).view(kv.shape),
        lambda kv: kv[:, :].flatten(2).unflatten(2, (KV, DIM)),
        lambda kv: kv.view(-1, DIM).view(kv.shape),
    ],
)
def test_views_that_the_order_in_memory_allows(read: Callable[[Tensor], Tensor]) -> None:
    """Of a buffer [B, N, H, D]; of the numbers that stand for it they are copies."""
    plain, model = Decoder("BNHD"), Decoder("BNHD")
    plain.read = model.read = read
    got = steps(model, torch.compile(model, backend=interpreted(config=FULL)))
    torch.testing.assert_close(got, steps(plain, plain))
    assert all(isinstance(buffer, LaidOutKV) for buffer in buffers(model))
    torch.testing.assert_close(read(model.keys_0) + 0, read(plain.keys_0))  # eager code


def test_what_is_no_append_gives_buffers_back() -> None:
    """A rotating buffer that starts over: as with buffers in the usual order."""
    plain, model = Decoder("BNHD"), Decoder("BNHD")
    steps(model, step := torch.compile(model, backend=interpreted(config=FULL)), (21, 1))
    steps(plain, plain, (21, 1))
    ids = torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        for at in (60, 3):
            pos = torch.arange(at, at + 9) % LENGTH if at == 60 else torch.arange(at, at + 9)
            torch.testing.assert_close(step(ids, pos), plain(ids, pos), rtol=1e-4, atol=1e-4)
    assert all(type(buffer) is Tensor for buffer in buffers(model))


def test_what_somebody_else_sees_stays_and_is_judged_once() -> None:
    counters.clear()
    model = Decoder("BNHD")
    seen = [buffer.detach() for buffer in buffers(model)]
    steps(model, torch.compile(model, backend=interpreted(config=FULL)), (21, 1, 1, 1))
    assert all(type(buffer) is Tensor for buffer in buffers(model)) and counters["xquant"]["detect"] == 1
    assert torch.equal(seen[0], model.keys_0) and seen[0][:, 23].any()


@pytest.mark.parametrize("dims", ["BHND", "BNHD"])
def test_positions_that_are_numbers_are_compiled_once(dims: str) -> None:
    counters.clear()
    model = Decoder(dims, by_span)
    steps(model, torch.compile(model, backend=interpreted(config=CONFIG)), (10, *[1] * 9))
    assert counters["stats"]["unique_graphs"] <= 4


def by_row(buffer: Tensor, at: int, pos: Tensor, x: Tensor) -> None:
    buffer[0, pos] = x[0]


def test_an_index_of_more_than_tokens_stays() -> None:
    plain, model = (Decoder("BNHD", by_row, batch=1) for _ in range(2))
    got = steps(model, torch.compile(model, backend=interpreted(config=FULL)), (10, 1, 1))
    torch.testing.assert_close(got, steps(plain, plain, (10, 1, 1)), rtol=1e-5, atol=1e-5)
    assert all(type(buffer) is Tensor for buffer in buffers(model))

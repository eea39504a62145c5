"""Keys and values, or those of all layers, in one tensor: a step gives exactly what it gives with buffers apart."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import interpreted
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig, explain, memory_report
from xquant_fx.cache.aliases import in_order, laid_out
from xquant_fx.cache.stacked import StackedKV
from xquant_fx.errors import UnsupportedWriteError

BATCH, LAYERS, KV, DIM, LENGTH = 2, 2, 2, 16, 64
FULL = XQuantConfig.preset("full")
CONFIG = XQuantConfig.preset("kivi-4").replace(k_group_size=8, residual_length=8, rollback_tokens=8)
SIZES = 20, 1, 1, 9, 1


def both(kv: Tensor, at: int, pos: Tensor, k: Tensor, v: Tensor) -> None:
    kv[(slice(None),) * (at + 1) + (pos,)] = torch.stack([k, v])


def index_copy(kv: Tensor, at: int, pos: Tensor, k: Tensor, v: Tensor) -> None:
    kv.index_copy_(at + 1, pos, torch.cat([k[None], v[None]]))


def apart(kv: Tensor, at: int, pos: Tensor, k: Tensor, v: Tensor) -> None:
    kv[(0, *(slice(None),) * at, pos)] = k
    kv[-1].index_copy_(at, pos, v)


def span(kv: Tensor, at: int, pos: int, k: Tensor, v: Tensor) -> None:
    kv.narrow(at + 1, pos, k.shape[at]).copy_(torch.stack([k, v]))


def spans(kv: Tensor, at: int, pos: int, k: Tensor, v: Tensor) -> None:
    new = (slice(None),) * at + (slice(pos, pos + k.shape[at]),)
    kv[(0, *new)] = k
    kv[1][new].copy_(v)


READS: dict[str, Callable[[Tensor], Any]] = {
    "index": lambda kv: (kv[0], kv[-1]),
    "iterate": tuple,
    "unbind": lambda kv: kv.unbind(0),
    "select": lambda kv: (kv.select(0, 0), torch.select(kv, 0, 1)),
    "chunk": lambda kv: [part.squeeze(0) for part in kv.chunk(2)],
}


class Decoder(nn.Module):
    """Two layers; ``holder`` says in which tensors keys and values are, of dimensions ``dims`` each."""

    def __init__(self, holder: str = "L2", write: Any = both, read: str = "index", dims: str = "BHND") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.holder, self.write, self.read, self.dims = holder, write, READS[read], dims
        self.layers = nn.ModuleList(nn.Linear(KV * DIM, 3 * KV * DIM) for _ in range(LAYERS))
        part = [dict(B=BATCH, H=KV, N=LENGTH, D=DIM)[dim] for dim in dims]
        shape = {"L2": (LAYERS, 2), "2L": (2, LAYERS), "2": (2,), "L": (LAYERS,), "": ()}[holder]
        count = {"L2": 1, "2L": 1, "2": LAYERS, "L": 2, "": 2 * LAYERS}[holder]
        self.held = [torch.zeros(*shape, *part) for _ in range(count)]
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), persistent=False)

    def store(self, layer: int, pos: Any, k: Tensor, v: Tensor) -> Any:
        at, held = self.dims.index("N"), self.held
        k, v = laid_out(k, self.dims), laid_out(v, self.dims)
        if self.holder in ("L2", "2"):
            kv = held[0][layer] if self.holder == "L2" else held[layer]
            self.write(kv, at, pos, k, v)
            return self.read(kv)
        if self.holder == "2L":
            held[0][(0, layer, *(slice(None),) * at, pos)] = k
            held[0][1, layer].index_copy_(at, pos, v)
            return held[0][0, layer], held[0][1][layer]
        keys, values = (held[0][layer], held[1][layer]) if self.holder == "L" else held[2 * layer : 2 * layer + 2]
        for buffer, x in ((keys, k), (values, v)):
            buffer.index_copy_(at, pos, x)
        return keys, values

    def forward(self, x: Tensor, pos: Any) -> Tensor:
        new = pos if isinstance(pos, Tensor) else slice(pos, pos + x.shape[1])
        for number, layer in enumerate(self.layers):
            q, k, v = layer(x).unflatten(-1, (3, KV, DIM)).permute(2, 0, 3, 1, 4)
            keys, values = (in_order(part, self.dims) for part in self.store(number, pos, k, v))
            x = x + sdpa(q, keys, values, attn_mask=self.mask[new]).transpose(1, 2).flatten(2)
        return x


@torch.no_grad()
def steps(model: Decoder, step: Callable[..., Tensor], sizes: tuple[int, ...] = SIZES) -> Tensor:
    """What steps of ``sizes`` tokens give; the first is a prompt in eager code."""
    batch, out, at = BATCH if "B" in model.dims else 1, [], 0
    for number, n in enumerate(sizes):
        x = torch.randn(batch, n, KV * DIM, generator=torch.Generator().manual_seed(number))
        pos = at if model.write in (span, spans) else torch.arange(at, at + n)
        out.append((step if number else model)(x, pos))
        at += n
    return torch.cat(out, 1)


def compiled(model: Any, made: list[Any] | None = None, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=interpreted(made, **options))


WAYS = [
    ("L2", both, "iterate", "BHND"), ("L2", apart, "index", "BHND"), ("2", index_copy, "unbind", "BHND"),
    ("2", spans, "select", "BHND"), ("2", span, "chunk", "BHND"), ("2L", both, "index", "BHND"),
    ("L", both, "index", "BHND"), ("L2", both, "unbind", "BNHD"), ("2", apart, "iterate", "BHDN"),
    ("L2", both, "iterate", "NHD"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("holder", "write", "read", "dims"),
    [pytest.param(*way, marks=pytest.mark.slow if way in (*WAYS[:2], WAYS[7]) else ()) for way in WAYS],
)
def test_steps_are_those_of_buffers_apart(holder: str, write: Any, read: str, dims: str) -> None:
    """Compiled, and eager ones on what is quantized then."""
    usual, other, made = Decoder("", dims=dims), Decoder(holder, write, read, dims), list[Any]()
    expected = steps(usual, usual)
    torch.testing.assert_close(steps(other, compiled(other, made, config=FULL)), expected, rtol=1e-5, atol=1e-5)
    assert all(type(held) is StackedKV for held in other.held) and made
    held = torch.cat([held.dequantize().reshape(-1, LENGTH) for held in other.held])
    assert held.count_nonzero() == torch.cat([held.reshape(-1, LENGTH) for held in usual.held]).count_nonzero()
    x, pos = torch.ones(BATCH if "B" in dims else 1, 1, KV * DIM), torch.tensor([sum(SIZES)])
    with torch.no_grad():
        got = other(x, sum(SIZES) if write in (span, spans) else pos)
        torch.testing.assert_close(got, usual(x, pos), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("holder", ["L2", pytest.param("L", marks=pytest.mark.slow)])
def test_codes_reports_and_copies_are_those_of_buffers_apart(holder: str) -> None:
    usual, other = Decoder(""), Decoder(holder)
    expected = steps(usual, compiled(usual, config=CONFIG))
    step = compiled(other, config=CONFIG)
    torch.testing.assert_close(steps(other, step), expected, rtol=1e-5, atol=1e-5)
    assert memory_report(other).total_bytes == memory_report(usual).total_bytes
    x, pos, file = torch.ones(BATCH, 1, KV * DIM), torch.tensor([sum(SIZES)]), io.BytesIO()
    seen = explain(other, x, pos)
    assert [(site.rewritten, site.dequantized) for site in seen.sites] == [(True, "")] * LAYERS
    copied, before = copy.deepcopy(other), [held.dequantize() for held in other.held]
    torch.save(other.held, file)
    file.seek(0)
    loaded = Decoder(holder)
    loaded.held = torch.load(file, weights_only=False)
    with torch.no_grad():
        for model in (copied, loaded, other):
            torch.testing.assert_close(
                model(x, pos), copy.deepcopy(usual)(x, pos) if model is not other else usual(x, pos)
            )
        for held in other.held:
            held.zero_()
        assert not torch.equal(copied.held[0].dequantize(), before[0]) and not other.held[0].dequantize().any()
        again = steps(other, compiled(other, config=CONFIG), (20, 1, 1))
        torch.testing.assert_close(again, expected[:, :22], rtol=1e-5, atol=1e-5)


def test_one_stack_is_left_whole_and_the_next_one_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    def step(kv: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        both(kv, 2, pos, x, 2 * x)
        return sdpa(x, kv[0], kv[1], attn_mask=torch.arange(LENGTH)[None] <= pos[:, None])

    stacks = [torch.zeros(2, BATCH, KV, LENGTH, DIM) for _ in range(2)]
    stacks[0][..., 40, :] = 1  # no append to what holds numbers behind
    plain, fast, x = [stack.clone() for stack in stacks], compiled(step, config=FULL), torch.ones(BATCH, KV, 1, DIM)
    with torch.no_grad():
        for quantized, ordinary in zip(stacks, plain, strict=True):
            for pos in torch.arange(4).split(1):
                torch.testing.assert_close(fast(quantized, x, pos), step(ordinary, x, pos))
    assert [type(stack) for stack in stacks] == [Tensor, StackedKV]
    assert "holds numbers at or behind position 0" in caplog.text


def read_whole(kv: Tensor, x: Tensor) -> Tensor:
    kv[:, :, :, :, :1] = x
    return sdpa(x, kv[0, 0], kv[0, 1]) + kv.sum()


def number_is_an_input(kv: Tensor, x: Tensor) -> Tensor:
    layer = (x[0, 0, 0, 0] > 9).to(torch.int64)
    kv[layer, 0, :, :, :1] = x
    return sdpa(x, kv[layer, 0], kv[layer, 1])


@pytest.mark.parametrize("step", [read_whole, number_is_an_input])
def test_what_is_not_taken_apart_stays_as_it_is(step: Any) -> None:
    kv, x = torch.zeros(LAYERS, 2, BATCH, KV, LENGTH, DIM), torch.ones(BATCH, KV, 1, DIM)
    plain = kv.clone()
    with torch.no_grad():
        torch.testing.assert_close(compiled(step, config=FULL)(kv, x), step(plain, x))
    assert type(kv) is Tensor and torch.equal(kv, plain)


def test_a_part_that_is_given_back_gives_back_the_stack() -> None:
    """A rotating buffer starts over, and no mask hides what it held."""

    def step(kv: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        both(kv, 2, pos, x, 2 * x)
        return sdpa(x, kv[0], kv[1])

    kv = torch.zeros(2, BATCH, KV, LENGTH, DIM)
    plain, fast, x = kv.clone(), compiled(step, config=FULL), torch.ones(BATCH, KV, 1, DIM)
    with torch.no_grad():
        for number, pos in enumerate((0, 1, 2, 0, 1)):
            at = torch.tensor([pos])
            torch.testing.assert_close(fast(kv, x + number, at), step(plain, x + number, at))
            assert type(kv) is (StackedKV if number < 3 else Tensor)
    torch.testing.assert_close(kv, plain)


def test_a_takeover_that_breaks_off_changes_nothing() -> None:
    model, x, pos = Decoder("L2"), torch.ones(BATCH, 1, KV * DIM), torch.tensor([20])

    def step(x: Tensor, pos: Tensor, sign: Tensor) -> Tensor:
        return model(x, pos) + torch.linalg.cholesky(sign)  # raises where it is negative

    steps(model, model, (20,))
    before, fast = model.held[0].clone(), compiled(step, config=FULL)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="cholesky"):
            fast(x, pos, -torch.ones(1, 1))
        assert type(model.held[0]) is StackedKV or torch.equal(model.held[0], before)
        expected = copy.deepcopy(model)
        expected.held = [before]
        torch.testing.assert_close(fast(x, pos, torch.ones(1, 1)), expected(x, pos) + 1)


def test_a_quantized_stack_reads_like_a_tensor_and_refuses_what_is_no_append() -> None:
    model = Decoder("2")
    steps(model, compiled(model, config=FULL), (20, 1))
    kv = model.held[0]
    assert torch.equal(kv.clone(), kv.dequantize()) and torch.equal(kv[1, :, 0], kv.dequantize()[1, :, 0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(lambda kv: kv.sum())(kv), kv.dequantize().sum())
        x = torch.randn(1, DIM)
        got = compiled(lambda kv, x: nn.functional.linear(x, kv[0, 0, 0]))(kv, x)  # a part of a part
        torch.testing.assert_close(got, nn.functional.linear(x, kv.dequantize()[0, 0, 0]))
        for write in (lambda: kv.mul_(2), lambda: kv.copy_(torch.ones(kv.shape)), lambda: compiled(Tensor.mul_)(kv, 2)):
            with pytest.raises(UnsupportedWriteError):
                write()
        for use in (Tensor.mean, lambda kv: kv[1].detach()):
            with pytest.raises(BackendCompilerFailed, match="was given to a compiler that does not know it"):
                torch.compile(use, backend="aot_eager")(kv)
    assert type(kv) is StackedKV


@pytest.mark.parametrize(
    "some", [(0, 0, 0), (..., 0, slice(None), slice(None)), (0, slice(None), slice(1)), (..., slice(8))]
)
def test_some_heads_rows_or_channels_of_a_stack_are_read_and_refuse_writes(some: Any) -> None:
    """They are copies: what is written to one of them would be lost."""
    model = Decoder("L2")
    steps(model, compiled(model, config=FULL), (20, 1))
    kv = model.held[0]
    before = kv.dequantize()
    with torch.no_grad():
        assert torch.equal(kv[some] + 0, before[some])
        torch.testing.assert_close(compiled(lambda x: x + 1)(kv[some]), before[some] + 1)
        for write in (lambda x: x.mul_(2), lambda x: x.fill_(3.0), lambda x: x.zero_(), lambda x: x.add_(1)):
            with pytest.raises(UnsupportedWriteError):
                write(kv[some])
        with pytest.raises(UnsupportedWriteError):
            kv[some] = 5.0
    assert torch.equal(kv.dequantize(), before)


def test_copies_of_zeros_empty_a_stack() -> None:
    model = Decoder("L2")
    steps(model, compiled(model, config=FULL), (20, 1))
    kv = model.held[0]
    before, numbers = kv.dequantize(), torch.zeros(kv.shape)
    numbers[:, 1:] = 1.0
    with torch.no_grad():
        with pytest.raises(UnsupportedWriteError):
            kv.copy_(numbers)
        assert torch.equal(kv.dequantize(), before)
        kv.copy_(torch.zeros(kv.shape))
    assert not kv.dequantize().any()


def test_a_token_of_a_stack_is_written_to_by_copies_alone() -> None:
    model = Decoder("2")
    steps(model, compiled(model, config=FULL), (20, 1))
    kv, new = model.held[0], torch.randn(2, BATCH, KV, DIM)
    with torch.no_grad():
        before = kv.dequantize()
        for write in (lambda x: x.mul_(2), lambda x: x.add_(1), lambda x: x.fill_(3.0)):
            with pytest.raises(UnsupportedWriteError):
                write(kv[:, :, :, 20])
        assert torch.equal(kv.dequantize(), before)
        kv[:, :, :, 21] = new
    assert torch.equal(kv.dequantize()[:, :, :, 21], new)

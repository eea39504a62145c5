"""Keys and values that grow along another dimension than 2 of four: steps give what they give in that order."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_and_slow import fast_but
from rewrites import Rewrites, count
from states import layers_of
from stepping import interpreted
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import CacheStateError, UnsupportedWriteError, XQuantConfig, explain, memory_report, ops
from xquant_fx.cache.aliases import in_order, laid_out, merged_heads
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth
from xquant_fx.cache.laid_out_growing import LaidOutGrowingKV

LAYERS, HEADS, KV, DIM = 2, 4, 2, 16
FULL = XQuantConfig.preset("full")
CONFIG = XQuantConfig.preset("kivi-4").replace(k_group_size=8, residual_length=8, rollback_tokens=8)
SIZES = (21, 1, 1, 9, 1, 1)
Pasts = Any


class Decoder(nn.Module):
    """Two layers that keep keys and values in tuples; those of layer i with dimensions ``dims[i]``."""

    def __init__(self, *dims: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dims = dims * (LAYERS // len(dims))
        self.embed = nn.Embedding(50, HEADS * DIM)
        self.q, self.k, self.v = (
            nn.ModuleList(nn.Linear(HEADS * DIM, n * DIM, bias=False) for _ in range(LAYERS)) for n in (HEADS, KV, KV)
        )

    def forward(self, ids: Tensor, pasts: Pasts = None) -> tuple[Tensor, Pasts]:
        x, new = self.embed(ids), []
        for layer, dims in enumerate(self.dims):
            q, k, v = (m[layer](x).unflatten(-1, (-1, DIM)).transpose(1, 2) for m in (self.q, self.k, self.v))
            k, v = laid_out(k, dims), laid_out(v, dims)
            if pasts is not None:
                at = dims.index("N")
                k, v = (torch.concatenate(pair, axis=at) for pair in zip(pasts[layer], (k, v), strict=True))
            new.append((k, v))
            keys, values = (read(t, dims) for t in (k, v))
            mask = torch.ones(ids.shape[1], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - ids.shape[1])
            x = x + sdpa(q, keys, values, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
        return x @ self.embed.weight.T, tuple(new)


def read(x: Tensor, dims: str) -> Tensor:
    """``x`` as [B, H, N, D], by a view where heads are merged."""
    if heads := merged_heads(dims):
        x, dims = x.view(*x.shape[:2], int(heads), -1), dims.replace(heads, "H")
    return in_order(x, dims)


def nothing(model: Decoder, batch: int) -> Pasts:
    """Tensors without a token."""
    return tuple((laid_out(torch.zeros(batch, KV, 0, DIM), dims),) * 2 for dims in model.dims)


@torch.no_grad()
def steps(model: Decoder, step: Callable[..., Any], pasts: Pasts = None, batch: int = 0) -> tuple[Tensor, Pasts]:
    """Logits of steps of ``SIZES`` tokens, and the cache behind them."""
    batch = batch or (2 if all("B" in dims for dims in model.dims) else 1)
    ids, out = torch.randint(50, (batch, sum(SIZES)), generator=torch.Generator().manual_seed(1)), []
    for part in ids.split(SIZES, 1):
        logits, pasts = step(part, pasts)
        out.append(logits)
    return torch.cat(out, 1), pasts


def compiled(model: Decoder, made: list[Any] | None = None, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=interpreted(made, **options))


ALL = [("BNHD",), ("NBHD",), ("BHDN",), ("NHD",), ("HND",), ("HDN",), ("BN2D",), ("NB2D",), ("BHND", "BNHD")]
#: Their batch, tokens and heads are where those of the others are, or of tests below ("BNHD", "NHD").
LIKE_OTHERS = [("BNHD",), ("NBHD",), ("NHD",), ("HDN",), ("BN2D",)]
MARKED = fast_but(ALL, LIKE_OTHERS)


@pytest.mark.parametrize("dims", MARKED)
def test_steps_are_those_of_the_program(dims: tuple[str, ...]) -> None:
    """From no past on, which a step without a concatenation makes; compiled no more often than in the usual order."""
    model, made = Decoder(*dims), []
    expected, wanted = steps(model, model)
    got, pasts = steps(model, compiled(model, made, config=FULL))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)
    for mine, theirs, order in zip(pasts, wanted, model.dims, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert type(a) is (GrowingKV if order == "BHND" else LaidOutGrowingKV)
            torch.testing.assert_close(a.dequantize(), b, rtol=1e-4, atol=5e-5)
    assert len(made) <= 3  # no step that only adds tokens is compiled again


@pytest.mark.parametrize("dims", ["BNHD", *(pytest.param(dims, marks=pytest.mark.slow) for dims in ("HND", "BN2D"))])
def test_codes_and_reports_are_those_of_the_usual_order(dims: str) -> None:
    """Where the first step puts tokens behind empty tensors; one compilation for steps of a size."""
    usual, other, batch = Decoder("BHND"), Decoder(dims), 2 if "B" in dims else 1
    expected, kept = steps(usual, compiled(usual, config=CONFIG), nothing(usual, batch), batch)
    made: list[Any] = []
    got, held = steps(other, compiled(other, made, config=CONFIG), nothing(other, batch), batch)
    assert torch.equal(got, expected) and len(made) == 2
    assert count(made[0], ops.DECODE) == LAYERS
    assert memory_report(held).total_bytes == memory_report(kept).total_bytes
    seen = explain(other, torch.zeros(batch, 1, dtype=torch.long), held, options={"config": CONFIG})
    assert [(s.rewritten, s.dequantized, s.name) for s in seen.sites] == [
        (True, "", f"L['pasts'][{layer}][0]") for layer in range(LAYERS)
    ]
    ids = torch.ones(batch, 1, dtype=torch.long)
    with torch.no_grad():  # eager code, on copies
        assert torch.equal(other(ids, copy.deepcopy(held))[0], usual(ids, copy.deepcopy(kept))[0])


def grown(dims: str, n: int = 30) -> tuple[LaidOutGrowingKV, Tensor]:
    """``n`` tokens at 16 bits, and one more than these as numbers."""
    batch = 2 if "B" in dims else 1
    state = layers_of(FULL, (batch, KV, 512, DIM), torch.float32)[0][0]
    x = laid_out(torch.randn(batch, KV, n + 1, DIM, generator=torch.Generator().manual_seed(0)), dims)
    at = dims.index("N")
    empty = LaidOutGrowingKV(GrowingKV.of(Growth(state)), dims)
    return torch.cat([empty, x.narrow(at, 0, n)], at), x  # type: ignore[return-value]


@pytest.mark.parametrize("dims", ["BNHD", "NHD", "BHDN", "NB2D"])
def test_what_eager_code_does_to_one(dims: str) -> None:
    kv, x = grown(dims)
    at = dims.index("N")
    first = x.narrow(at, 0, 30)
    assert isinstance(kv, LaidOutGrowingKV) and kv.shape == first.shape and torch.equal(kv + 0, first)
    stream = io.BytesIO()
    torch.save(kv, stream)
    stream.seek(0)
    for other in (copy.deepcopy(kv), torch.load(stream, weights_only=False), kv.detach()):
        longer = torch.cat([other, x.narrow(at, 30, 1)], at - len(kv.shape))
        assert isinstance(longer, LaidOutGrowingKV) and torch.equal(longer + 0, x)
    short = kv[(slice(None),) * at + (slice(None, -4),)]  # as crop() does it
    assert isinstance(short, LaidOutGrowingKV) and torch.equal(short + 0, x.narrow(at, 0, 26))
    if "B" in dims:
        row = kv.index_select(dims.index("B"), torch.tensor([1, 1]))
        assert isinstance(row, LaidOutGrowingKV)
        assert torch.equal(row + 0, first.index_select(dims.index("B"), torch.tensor([1, 1])))
    for read_only in (torch.cat([first, kv], at), torch.cat([kv, first, first], at), kv.transpose(0, 1)):
        assert not isinstance(read_only, GrowingKV)
    with pytest.raises(UnsupportedWriteError):
        kv.zero_()


@pytest.mark.parametrize(
    "write",
    [
        lambda kv: kv[:, 5:].zero_(),
        lambda kv: kv.transpose(1, 2).mul_(2),
        lambda kv: kv.data[:, 1].add_(1),
    ],
)
@torch.no_grad()
def test_writes_of_a_graph_are_refused(write: Callable[[Tensor], Any]) -> None:
    """The graph gets numbers that are made for it: a write to a view of them would be lost."""
    kv, _ = grown("BNHD")
    with pytest.raises(BackendCompilerFailed, match="is not a way to append tokens") as error:
        torch.compile(lambda kv: (write(kv), torch.ones(1))[1], backend=interpreted(config=FULL))(kv)
    assert isinstance(error.value.inner_exception, UnsupportedWriteError)


@torch.no_grad()
def test_a_graph_may_write_to_a_copy() -> None:
    kv, x = grown("BNHD")
    doubled = torch.compile(lambda kv: kv.double().mul_(2).transpose(1, 2), backend=interpreted(config=FULL))(kv)
    assert torch.equal(doubled, 2 * x[:, :30].double().transpose(1, 2)) and torch.equal(kv + 0, x[:, :30])


def test_other_tokens_than_those_stored() -> None:
    kv, x = grown("BNHD")
    with pytest.raises(CacheStateError, match="layer 0 keys: this cache holds 2 rows, the step has 1"):
        torch.cat([kv, x[:1, :1]], 1)
    longer = torch.cat([kv, x[:, 30:]], 1)
    torch.cat([kv, x[:, :1]], 1)
    with pytest.raises(CacheStateError, match="of which those from 30 on were overwritten"):
        longer + 0


def attend(q: Tensor, k: Tensor, v: Tensor, past: Pasts, keep: int = 0) -> Any:
    """Tokens before heads, of which the last ``keep`` are kept."""
    k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
    return sdpa(*(t.transpose(1, 2) for t in (q, k, v))), ((k[:, -keep:], v[:, -keep:]) if keep else (k, v))


def along_heads(q: Tensor, k: Tensor, v: Tensor, past: Pasts) -> Any:
    """More heads each step, of the same tokens."""
    k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
    return sdpa(q[:, :1].expand(-1, k.shape[1], -1, -1), k, v), (k, v)


def read_elsewhere(q: Tensor, k: Tensor, v: Tensor, past: Pasts) -> Any:
    out, kept = attend(q, k, v, past)
    return out + kept[0].sum(), kept


def written_to(q: Tensor, k: Tensor, v: Tensor, past: Pasts) -> Any:
    k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
    k[:, 0] = 0
    return sdpa(*(t.transpose(1, 2) for t in (q, k, v))), (k, v)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (along_heads, "grow by concatenation along dimension 1 of 4"),
        (read_elsewhere, "also read by sum, which is no attention"),
        (written_to, "grow by concatenation along dimension 1 of 4"),
    ],
)
def test_what_stays_as_it_is(step: Callable[..., Any], reason: str) -> None:
    """And is compiled as the program has it: with its dimensions, contiguous."""
    x, torch_made = torch.randn(1, 3, 2, 16), Rewrites(config=FULL)
    past = (torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16))
    seen = explain(step, x, x, x, past)
    assert reason in seen.sites[0].reason and not seen.sites[0].rewritten
    torch._dynamo.reset()
    with torch.no_grad():
        (out, mine), (want, theirs) = torch.compile(step, backend=torch_made)(x, x, x, past), step(x, x, x, past)
    torch.testing.assert_close((out, mine), (want, theirs))
    assert all(type(t) is Tensor and t.is_contiguous() for t in mine)
    assert count(torch_made.made[0], torch.permute) == 0

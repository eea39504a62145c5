"""Buffers for the largest batch, of which a smaller one takes the first rows: quantized as buffers of its own size."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_and_slow import every_other
from stepping import interpreted
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import UnsupportedWriteError, XQuantConfig, explain, memory_report
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.leading_rows import LeadingRowsKV

MOST, LENGTH, KV, DIM, LAYERS = 4, 64, 2, 16, 2
FULL = XQuantConfig.preset("full")
CONFIG = XQuantConfig.preset("kivi-4").replace(k_group_size=8, residual_length=8, rollback_tokens=8)
SIZES = 20, 1, 1, 9, 1


def tokens_first(kv: list[Tensor], rows: int, p: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """Meta's Llama: [B, N, H, D], and the first tokens are read."""
    for buffer, x in zip(kv, (k, v), strict=True):
        buffer[:rows, p : p + x.shape[1]] = x
    return [buffer[:rows, : p + k.shape[1]].transpose(1, 2) for buffer in kv]


def by_positions(kv: list[Tensor], rows: int, p: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """litgpt: [B, H, N, D], and a view of the rows is written to."""
    pos = torch.arange(p, p + k.shape[1])
    return [
        buffer[:rows, ...].index_copy_(-2, pos, x.transpose(1, 2))[:, :, : p + x.shape[1]]
        for buffer, x in zip(kv, (k, v), strict=True)
    ]


def in_one_index(kv: list[Tensor], rows: int, p: int, k: Tensor, v: Tensor) -> list[Tensor]:
    for buffer, x in zip(kv, (k, v), strict=True):
        buffer[:rows, :, p : p + x.shape[1]] = x.transpose(1, 2)
    return [buffer[:rows][:, :, : p + k.shape[1]] for buffer in kv]


FORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "tokens first": (tokens_first, (MOST, LENGTH, KV, DIM)),
    "by positions": (by_positions, (MOST, KV, LENGTH, DIM)),
    "in one index": (in_one_index, (MOST, KV, LENGTH, DIM)),
}


class Decoder(nn.Module):
    """Two layers with buffers for ``MOST`` rows."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.update, shape = FORMS[form]
        self.layers = nn.ModuleList(nn.Linear(KV * DIM, 3 * KV * DIM) for _ in range(LAYERS))
        self.kv = [[torch.zeros(shape) for _ in range(2)] for _ in range(LAYERS)]

    def forward(self, x: Tensor, p: int) -> Tensor:
        for layer, kv in zip(self.layers, self.kv, strict=True):
            q, k, v = layer(x).unflatten(-1, (-1, DIM)).chunk(3, 2)
            keys, values = self.update(kv, x.shape[0], p, k, v)
            mask = torch.ones(x.shape[1], keys.shape[2], dtype=torch.bool).tril(p)
            x = x + sdpa(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2).flatten(2)
        return x

    @property
    def buffers_of_all(self) -> list[Any]:
        return [buffer for kv in self.kv for buffer in kv]


@torch.no_grad()
def steps(step: Callable[..., Tensor], rows: int, sizes: tuple[int, ...] = SIZES, begin: int = 0) -> Tensor:
    out, p = [], begin
    for n in sizes:
        out.append(step(torch.randn(rows, n, KV * DIM, generator=torch.Generator().manual_seed(p)), p))
        p += n
    return torch.cat(out, 1)


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=interpreted(**options))


@pytest.mark.parametrize(("form", "rows"), every_other(list(FORMS), [1, 3]))
def test_the_rows_of_a_batch_are_quantized(form: str, rows: int) -> None:
    """And the others are as they were."""
    fast, plain = Decoder(form), Decoder(form)
    for model in (fast, plain):
        for buffer in model.buffers_of_all:
            buffer[rows:] = 7
    torch.testing.assert_close(steps(compiled(fast, config=FULL), rows), steps(plain, rows))
    for buffer, want in zip(fast.buffers_of_all, plain.buffers_of_all, strict=True):
        assert type(buffer) is LeadingRowsKV and isinstance(buffer.leaves[0], QuantizedKV) and buffer.rows == rows
        assert tuple(buffer.shape) == tuple(want.shape)
        torch.testing.assert_close(buffer.dequantize(), want)


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_those_of_buffers_of_that_size(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Decoder(form)
    got = steps(compiled(fast, config=CONFIG), 2)
    monkeypatch.setitem(FORMS, form, (FORMS[form][0], (2, *FORMS[form][1][1:])))
    exact = Decoder(form)
    assert torch.equal(got, steps(compiled(exact, config=CONFIG), 2))
    leaves = [leaf for buffer in fast.buffers_of_all for leaf in buffer.leaves[:1]]
    assert memory_report(leaves).total_bytes == memory_report(exact.buffers_of_all).total_bytes


def test_what_eager_code_does() -> None:
    model = Decoder("tokens first")
    steps(compiled(model, config=FULL), 2)
    plain = Decoder("tokens first")
    steps(plain, 2)
    for held in (model, plain):  # which goes on uncompiled
        steps(held, 2, (3, 1), sum(SIZES))
    kv, want = model.buffers_of_all[0], plain.buffers_of_all[0]
    assert type(kv) is LeadingRowsKV
    with torch.no_grad():
        for index in (0, 3, slice(0, 2), slice(2, 4), slice(1, 2), (slice(None), 5), (..., 3), slice(1, 3)):
            torch.testing.assert_close(kv[index] + 0, want[index])
        for index in (0, slice(1, 3), (slice(0, 2), slice(None), 0)):
            with pytest.raises(UnsupportedWriteError):
                kv[index] = 5.0
        with pytest.raises(UnsupportedWriteError):
            kv.mul_(2)
        torch.testing.assert_close(kv.clone(), want)
        for held in (kv, want):
            held[3] = 2
            held[:, 34:36] = torch.arange(float(MOST * 2 * KV * DIM)).view(MOST, 2, KV, DIM)
        torch.testing.assert_close(kv + 0, want)
        file = io.BytesIO()
        torch.save(kv, file)
        file.seek(0)
        for other in (copy.deepcopy(kv), torch.load(file, weights_only=False), kv):
            assert type(other) is LeadingRowsKV
            torch.testing.assert_close(other.dequantize(), want)
        kv.zero_()
        assert not kv.dequantize().any()


def test_a_new_sequence_of_as_many_rows_stays_quantized() -> None:
    fast, plain = Decoder("tokens first"), Decoder("tokens first")
    step = compiled(fast, config=FULL)
    for _ in range(2):
        torch.testing.assert_close(steps(step, 2), steps(plain, 2))
    assert all(type(buffer) is LeadingRowsKV for buffer in fast.buffers_of_all)


@pytest.mark.parametrize(("form", "rows"), every_other(list(FORMS), [1, 4, 3], slow=[3]))
def test_a_batch_of_another_size_gives_the_buffers_back(rows: int, form: str, caplog: Any) -> None:
    fast, plain = Decoder(form), Decoder(form)
    step = compiled(fast, config=FULL)
    torch.testing.assert_close(steps(step, 2), steps(plain, 2))
    with caplog.at_level(logging.WARNING, logger="xquant_fx"), torch._dynamo.config.patch(recompile_limit=64):
        torch.testing.assert_close(steps(step, rows), steps(plain, rows))
        torch.testing.assert_close(steps(step, 2), steps(plain, 2))
    assert "the first 2 of 4 rows were quantized, and a batch of another size came" in caplog.text
    for buffer, want in zip(fast.buffers_of_all, plain.buffers_of_all, strict=True):
        assert type(buffer) is Tensor
        torch.testing.assert_close(buffer, want)


def test_it_is_explained() -> None:
    model = Decoder("tokens first")
    with torch.no_grad():
        seen = explain(model, torch.randn(2, 1, KV * DIM), 0)
    assert len(seen.sites) == LAYERS and all(site.rewritten for site in seen.sites)
    assert all(type(buffer) is Tensor for buffer in model.buffers_of_all)


class Prompts(nn.Module):
    """Buffers with tokens first, [N, B, H, D], whose prompt is written to the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (torch.zeros(LENGTH, 2, KV, DIM) for _ in range(2))

    def forward(self, x: Tensor, p: int) -> Tensor:
        end = p + x.shape[0]
        self.k[p:end], self.v[p:end] = x, 2 * x
        keys, values = (t[:end].permute(1, 2, 0, 3) for t in (self.k, self.v))
        mask = torch.ones(x.shape[0], end, dtype=torch.bool).tril(p)
        return sdpa(x.permute(1, 2, 0, 3), keys, values, attn_mask=mask)


def test_first_tokens_are_no_rows() -> None:
    fast, plain = Prompts(), Prompts()
    step, p = compiled(fast, config=FULL), 0
    with torch.no_grad():
        for n in SIZES:
            x = torch.randn(n, 2, KV, DIM)
            torch.testing.assert_close(step(x, p), plain(x, p))
            p += n
    assert isinstance(fast.k, QuantizedKV) and isinstance(fast.v, QuantizedKV)

"""Storing and loading a pair of layers, against the float64 reference in store_reference.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numeric import DTYPES, seeded
from store_reference import Case
from store_runs import ThroughOps, ThroughState, run

from xquant_fx.kernels.layout import STEP_TOKENS

MOVES = st.integers(-STEP_TOKENS, STEP_TOKENS) | st.integers(1, 3) | st.integers(9, 45)


@st.composite
def cases(draw) -> Case:
    residual = draw(st.sampled_from((4, 8, 16)))
    dim, side = draw(st.sampled_from((8, 16, 32, 96))), draw(st.sampled_from(("key", "value")))
    groups = (residual, residual // 2, 1) if side == "key" else (dim, dim // 2, 8)
    batch, max_len = draw(st.integers(1, 2)), draw(st.integers(20, 90))
    return Case(
        side=side, bits=draw(st.sampled_from((1, 2, 3, 4, 8, 16))), dtype=draw(st.sampled_from(DTYPES)),
        batch=batch, heads=draw(st.integers(1, 2)), max_len=max_len, dim=dim, residual=residual,
        group=draw(st.sampled_from(groups)), eta=draw(st.sampled_from((0.0, 1 / 6))),
        fit=draw(st.sampled_from(("least_squares", "minmax"))), shared=draw(st.booleans()),
        sinks=draw(st.sampled_from((0, 0, 1, 5))),
        padding=tuple(draw(st.lists(st.integers(0, 12), max_size=batch))) if draw(st.booleans()) else (),
        scale_dtype=draw(st.sampled_from(DTYPES)), scale=2.0 ** draw(st.integers(-6, 6)),
    )  # fmt: skip


@pytest.mark.parametrize("driver", [ThroughState, ThroughOps])
@settings(max_examples=60, deadline=None)
@given(case=cases(), script=st.lists(MOVES, min_size=1, max_size=12))
@example(case=Case(side="key", max_len=20), script=[20, 0, 1])  # a full cache that starts anew with one token
def test_any_mix_of_steps_chunks_and_rollbacks(driver: type[ThroughState], case: Case, script: list[int]) -> None:
    run(case, script, driver)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("dim", [8, 16, 32, 64, 96])
def test_every_width_and_head_dim(side: str, bits: int, dim: int) -> None:
    """A prompt, every step length, a chunk across a flush, a rollback across one."""
    turn = dim // 8 + bits
    case = Case(
        side=side, bits=bits, dim=dim, dtype=DTYPES[turn % 3], batch=1 + turn % 2, heads=2 - turn % 2,
        residual=16, group=8, max_len=110, eta=0.1, fit=("least_squares", "minmax")[turn % 2],
    )  # fmt: skip
    run(case, [19, 1, 2, 3, 4, 5, 6, 7, 8, 20, 3, -8, 5, 4], (ThroughState, ThroughOps)[turn % 2])


@pytest.mark.parametrize("side", ["key", "value"])
def test_the_default_lengths(side: str) -> None:
    """R = 128, one key group a block, one value group a token."""
    group = 128 if side == "key" else 64
    case = Case(side=side, batch=1, dim=64, residual=128, group=group, max_len=420, bits=1, eta=1 / 6, sinks=4)
    run(case, [250, 5, 1, 1, -8, 8, 150, 3], ThroughState)


@pytest.mark.parametrize("residual", [4, 16])
@pytest.mark.parametrize("prompt", [1, 3, 4, 15, 16, 17, 33, 48])
def test_what_a_prompt_leaves_in_full_precision(prompt: int, residual: int) -> None:
    """floor(S / R) R key tokens and max(0, S - R) value tokens are quantized: with a ring of NaN the rest is NaN."""
    for side, quantized in (("key", prompt // residual * residual), ("value", max(0, prompt - residual))):
        case = Case(side=side, residual=residual, max_len=50)
        lower, upper = run(case, [prompt], ThroughState)
        lower.owned["ring"].fill_(math.nan)
        upper.group.drop()
        full = lower.load(prompt).isnan()
        assert torch.equal(full, (torch.arange(prompt) >= quantized)[:, None].expand_as(full))


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_step_sees_the_state_before_its_flush(side: str) -> None:
    """The step that fills the window reads it in full precision; the next one reads codes."""
    case = Case(side=side, residual=8, bits=1)
    layers = ThroughState(case)
    x, last, after = case.tokens(7, 0), case.tokens(1, 1), case.tokens(1, 2)
    layers.step(0, 0, x)
    assert torch.equal(layers.step(0, 7, last)[:, :, :8], torch.cat([x, last], 2))
    seen = layers.step(0, 8, after)
    assert torch.equal(seen[:, :, :7], x) == (side == "value")
    assert torch.equal(seen[:, :, 8:9], after)
    layers.states[0].group.drop()
    assert not torch.equal(layers.view(0, 9)[:, :, :1], x[:, :, :1])


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_chunk_attends_to_its_own_tokens_in_full_precision(side: str) -> None:
    case = Case(side=side, bits=1)
    for driver in (ThroughState, ThroughOps):
        layers = driver(case)
        first, second = case.tokens(13, 0), case.tokens(30, 1)
        assert torch.equal(layers.step(0, 0, first)[:, :, :13], first)
        seen = layers.step(0, 13, second)
        assert torch.equal(seen[:, :, 13:43], second)
        assert not torch.equal(seen[:, :, :5], first[:, :, :5])
        assert not seen[:, :, 43:].any()


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_pair_has_one_codes_tensor_and_the_lower_layer_writes_it(side: str) -> None:
    case = Case(side=side)
    layers = ThroughState(case)
    lower, upper = layers.states
    layers.step(0, 0, case.tokens(40, 0))
    before = lower.owned["codes"].clone()
    layers.step(1, 0, case.tokens(40, 1))
    assert upper.tensor("codes") is lower.owned["codes"]
    assert "codes" not in upper.owned and {"scale", "zero", "ring"} <= set(upper.owned)
    assert torch.equal(lower.owned["codes"], before)


@pytest.mark.parametrize("fit", ["least_squares", "minmax"])
def test_padding_and_sinks_take_no_part_in_key_scales(fit: str) -> None:
    """Whatever padding and sinks hold, even NaN, the scales and all other tokens are the same."""
    case = Case(padding=(0, 6), sinks=2, fit=fit, group=8, dtype=torch.bfloat16)
    tokens = torch.arange(24)[None] < torch.tensor([[2], [8]])
    seen = []
    for junk in (0.0, math.nan, 1e30):
        layers = ThroughState(case)
        for layer in (0, 1):
            layers.step(layer, 0, torch.where(tokens[:, None, :, None], junk, case.tokens(24, layer)).to(case.dtype))
        after = torch.cat([layers.states[layer].load(24) for layer in (0, 1)], 1)
        stored = [layers.states[layer].owned[k][:, :, :3] for layer in (0, 1) for k in ("scale", "zero")]
        seen.append([torch.where(tokens[:, None, :, None], 0, after), *stored])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    assert all(t.isfinite().all() for t in seen[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_bad_number_spoils_its_group_only(side: str, bad: float) -> None:
    case = Case(side=side, residual=8, group=8)
    layers, clean = ThroughState(case), ThroughState(case)
    for layer in (0, 1):
        x = case.tokens(30, layer)
        clean.step(layer, 0, x)
        x[1, 0, 11, 5] = bad
        layers.step(layer, 0, x)
    for layer in (0, 1):
        for cache in (layers, clean):
            cache.states[0].group.drop()
        spoiled = torch.zeros(case.shape, dtype=torch.bool)
        spoiled[(1, 0, slice(8, 16), 5) if side == "key" else (1, 0, 11, slice(0, 8))] = True
        out, expected = layers.view(layer, 30), clean.view(layer, 30)
        assert out[spoiled].isnan().all()
        if layer == 0:
            assert torch.equal(out[~spoiled], expected[~spoiled])
        assert out[~spoiled].isfinite().all()


@pytest.mark.parametrize("side", ["key", "value"])
def test_tokens_of_another_dtype_are_rounded_to_the_buffer_s(side: str) -> None:
    case = Case(side=side, dtype=torch.bfloat16, residual=8)
    a, b = ThroughOps(case), ThroughOps(case)
    x = torch.randn(2, 1, 5, 16, generator=seeded(0))
    for past in (0, 5):
        assert torch.equal(a.step(0, past, x), b.step(0, past, x.bfloat16()))

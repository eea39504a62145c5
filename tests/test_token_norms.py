"""Token norms of ranked keys: what is divided by them, what they leave alone, and what follows them about."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import seeded
from states import layers_of, spec_of
from torch import Tensor
from transformers import LlamaConfig

from xquant_fx import ConfigError, XQuantCache, XQuantConfig, make_plan
from xquant_fx.cache.remake import selected
from xquant_fx.cache.room import enlarge
from xquant_fx.cache.state import KVState
from xquant_fx.evaluate.size import true_bits
from xquant_fx.kernels.small_floats import LARGEST_NORM, LEAST_NORM, decode_scale, encode_norm
from xquant_fx.plan.plan import Plan

CONFIG = XQuantConfig(k_group_size=16, residual_length=32, sink_tokens=2)
BATCH, HEADS, DIM, TOKENS, QUANTIZED = 2, 3, 16, 100, 80
#: What is stored of a key beside its norm.
REST = ("codes", "scale", "zero", "order", "center")


def keys(seed: int = 0) -> Tensor:
    """Keys [B, H, TOKENS, D] of tokens as loud as 1 to 7."""
    loud = (torch.arange(TOKENS) % 7 + 1)[:, None]
    return torch.randn(BATCH, HEADS, TOKENS, DIM, generator=seeded(seed)) * loud + torch.linspace(-1, 2, DIM)


def stored(x: Tensor, norms: bool = True) -> KVState:
    config = CONFIG.replace(k_token_norms=norms)
    state = layers_of(config, (BATCH, HEADS, 120, DIM), torch.float32, start=torch.tensor([0, 9]))[0][0]
    state.store(x, torch.arange(x.shape[2]))
    return state


def read(state: KVState) -> Tensor:
    """What a step after TOKENS sees of the quantized ones; padding and sinks are not among them."""
    state.store(torch.zeros(BATCH, HEADS, 1, DIM), torch.tensor([state.length]))
    return state.load(TOKENS)[:, :, 11:QUANTIZED]


def test_norms_are_root_mean_squares_over_all_heads() -> None:
    x = keys()
    norm = decode_scale(stored(x).owned["norm"])[:, :QUANTIZED]
    exact = x.square().mean((1, 3)).sqrt()[:, :QUANTIZED]
    assert norm.shape == (BATCH, QUANTIZED)
    assert ((norm / exact - 1).abs() <= 2**-4).all() and not torch.equal(norm, exact)


def test_all_that_is_stored_is_that_of_normalized_keys() -> None:
    """Twice the same quantizer: with norms, and without on keys that were divided by them before."""
    x = keys()
    with_norms = stored(x)
    norm = decode_scale(with_norms.owned["norm"])[:, None, :TOKENS, None]
    norm = torch.where(norm > 0, norm, 1.0)  # of the window there are none yet
    without = stored(x / norm, norms=False)
    assert without.tensor("norm") is None
    for name in REST:
        assert torch.equal(with_norms.owned[name], without.owned[name]), name
    torch.testing.assert_close(read(with_norms), read(without) * norm[:, :, 11:QUANTIZED], rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(token=st.integers(11, QUANTIZED - 1), power=st.integers(-6, 6), seed=st.integers(0, 9))
def test_a_power_of_two_goes_into_the_norm_alone(token: int, power: int, seed: int) -> None:
    x = keys(seed)
    louder = x.clone()
    louder[:, :, token] *= 2.0**power
    before, after = stored(x), stored(louder)
    for name in REST:
        assert torch.equal(before.owned[name], after.owned[name]), name
    changed = after.owned["norm"].int() - before.owned["norm"].int()
    assert (changed[:, token] == 8 * power).all(), "three bits of the byte are the mantissa's"
    changed[:, token] = 0
    assert not changed.any()
    expected = read(before)
    expected[:, :, token - 11] *= 2.0**power
    assert torch.equal(read(after), expected)


def test_sinks_and_windows_are_as_they_are() -> None:
    x = keys()
    state = stored(x)
    read(state)
    seen = state.load(TOKENS)
    assert torch.equal(seen[:, :, QUANTIZED:], x[:, :, QUANTIZED:])
    assert torch.equal(seen[0, :, :2], x[0, :, :2]) and torch.equal(seen[1, :, 9:11], x[1, :, 9:11])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_spoils_its_channel_alone(bad: float) -> None:
    x = keys()
    x[0, 1, 40, 3] = bad
    nans = read(stored(x)).isnan()
    assert nans[0, 1, 32 - 11 : 48 - 11, 3].all() and nans.sum() == 16


def test_tokens_of_zeros_and_beyond_the_bytes_range() -> None:
    x = keys()
    x[:, :, 40], x[:, :, 41], x[:, :, 42] = 0.0, x[:, :, 41] * 1e5, x[:, :, 42] * 1e-9
    state = stored(x)
    seen = read(state)
    assert seen.isfinite().all() and seen[:, :, 40 - 11].abs().max() < 1e-4
    assert decode_scale(state.owned["norm"])[0, 40:43].tolist() == [LEAST_NORM, LARGEST_NORM, LEAST_NORM]


def test_norms_in_bytes() -> None:
    norms = torch.tensor([0.0, 2.0**-30, 1.0, 1.03, 1.07, 1000.0, 1e9, math.inf, math.nan])
    expected = [2.0**-19, 2.0**-19, 1.0, 1.0, 1.125, 1024.0, 1920.0, 1920.0, 1920.0]
    assert decode_scale(encode_norm(norms)).tolist() == expected


def test_rolling_back_writes_norms_anew() -> None:
    """What was appended, taken back and replaced is nowhere to be seen: tokens of the group that is quantized then."""
    x, other = keys(), keys(1)
    back, plain = stored(x[:, :, :62]), stored(x[:, :, :58])
    back.truncate(58)
    for state in (back, plain):
        state.store(other[:, :, 58:], torch.arange(58, TOKENS))
        read(state)
    assert torch.equal(back.owned["norm"], plain.owned["norm"]) and torch.equal(back.load(TOKENS), plain.load(TOKENS))


def test_rows_take_their_norms_with_them() -> None:
    state = stored(keys())
    norm, seen = state.owned["norm"].clone(), read(state)
    index = torch.tensor([1, 0, 1])
    other = selected(state, index, state.group.with_start(state.group.start[index]), None)
    assert torch.equal(other.owned["norm"], norm[index]) and torch.equal(
        other.load(TOKENS)[:, :, 11:QUANTIZED], seen[index]
    )
    state.reorder(torch.tensor([1, 0]))
    assert torch.equal(state.owned["norm"], norm[[1, 0]])
    enlarge(state, 300)
    assert torch.equal(state.owned["norm"][:, :TOKENS], norm[[1, 0], :TOKENS])
    assert state.owned["norm"].shape[1] == state.spec.stored_tokens


def test_a_saved_cache_has_norms() -> None:
    model = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    caches = [XQuantCache(model, 120, config=CONFIG) for _ in range(2)]
    x = torch.randn(1, 2, 100, 16, generator=seeded(2))
    for layer in (0, 1):
        caches[0].update(x, x, layer)
    saved = caches[0].state_dict()
    assert saved["layers.0.key.norm"].any() and "layers.0.value.norm" not in saved
    caches[1].load_state_dict({name: t.clone() for name, t in saved.items()})
    assert torch.equal(caches[1].layers[1].keys.live.owned["norm"], saved["layers.1.key.norm"])


def test_true_bits_count_eight_per_token_and_layer() -> None:
    with_norms, without = (
        [spec_of(CONFIG.replace(k_token_norms=on), role, (1, 3, 64, 64), torch.bfloat16) for role in ("key", "value")]
        for on in (True, False)
    )
    assert true_bits(with_norms) - true_bits(without) == pytest.approx(8 / (3 * 64) / 2)


def test_which_configs_have_norms() -> None:
    assert XQuantConfig().token_norms("key") and not XQuantConfig().token_norms("value")
    assert not XQuantConfig(k_token_norms=False).token_norms("key")
    assert not XQuantConfig.preset("kivi-2").token_norms("key")
    plan = make_plan(XQuantConfig(k_bits=(2, 16)), 2)
    assert [entry.token_norms for layer in plan.layers for entry in layer] == [True, False, False, False]
    with pytest.raises(
        ConfigError, match=r"k_token_norms=True needs k_scheme to be one of .*ranked.*, got 'per_channel'"
    ):
        XQuantConfig(k_scheme="per_channel", k_token_norms=True)
    with pytest.raises(ConfigError, match="k_token_norms must be True, False or None, got 1"):
        XQuantConfig(k_token_norms=1)


def test_plans_that_are_older_than_norms_have_none() -> None:
    data = json.loads(make_plan(XQuantConfig(), 1).to_json())
    assert data["layers"][0]["key"].pop("token_norms") is True
    assert not Plan.from_json(json.dumps(data)).layers[0].key.token_norms
    data["layers"][0]["value"]["token_norms"] = True
    with pytest.raises(ConfigError, match=r"layer 0 values: token_norms .* got True with scheme 'per_token_rotated'"):
        Plan.from_json(json.dumps(data))

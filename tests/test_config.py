"""XQuantConfig, its presets, the rules of pairing, and what the options of torch.compile say."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from states import range_config
from transformers import LlamaConfig

from xquant_fx import PRESETS, ConfigError, XQuantCache, XQuantConfig
from xquant_fx.cache.allocate import Geometry, bind_all
from xquant_fx.compiler.options import MODES, parse
from xquant_fx.plan.buffer_plan import SHARED
from xquant_fx.plan.plan import make_plan
from xquant_fx.plan.presets import MEASURED_KL, TOLERABLE_KL
from xquant_fx.plan.spec import KVSpec
from xquant_fx.warn_once import forget

SHAPE = (1, 2, 64, 16)


def test_keys_of_8_bits_have_schemes_that_take_them() -> None:
    """Channels of 8 bits have no ranks; values are stored as kernels read them beside such keys."""
    for bits in (8, [8, 2]):
        config = XQuantConfig(k_bits=bits)
        assert (config.k_scheme, config.v_scheme) == ("per_channel", "per_token") and config.v_bits == 2
        assert config == XQuantConfig().replace(k_bits=bits) == XQuantConfig.from_json(config.to_json())
    assert XQuantConfig(k_bits=8, v_scheme="per_token_rotated").v_scheme == "per_token_rotated"
    assert XQuantConfig(v_bits=8) == XQuantConfig().replace(v_bits=8, k_scheme="per_channel_ranked")
    for make in (
        lambda: XQuantConfig(k_bits=8, k_scheme="per_channel_ranked"),
        lambda: XQuantConfig(v_scheme="per_token_folded").replace(k_bits=8),  # one was named: both stay
    ):
        with pytest.raises(ConfigError, match=r"k_bits must be one of .*per_channel_ranked"):
            make()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(k_bits=5, k_scheme="per_channel"), r"k_bits must be one of \(1, 2, 3, 4, 8, 16\) .*per_channel.* got 5"),
        (dict(k_bits=2.3), r"k_bits must be one of \(1.0, 1.25, .*, 4.0, 16\) .*per_channel_ranked.* got 2.3"),
        (dict(k_bits=0.75), "k_bits .* got 0.75"),
        (dict(v_bits=1.5), r"v_bits must be one of \(1, 2, 3, 4, 8, 16\) .*per_token_rotated.* got 1.5"),
        (dict(k_scheme="per_head"), "k_scheme must be one of .*'per_channel_ranked'.* got 'per_head'"),
        (dict(v_scheme=None), "v_scheme must be one of .*'per_token_rotated'.* got None"),
        (dict(v_bits=0), "v_bits .* got 0"),
        (dict(k_bits=True), "k_bits .* got True"),
        (dict(k_bits=math.nan), "k_bits .* got nan"),
        (dict(v_bits=(1, 5)), r"v_bits .* got \(1, 5\)"),
        (dict(v_bits=()), r"v_bits must hold one number per layer, got \(\)"),
        (dict(share_keys_from=-1), "share_keys_from must not be negative, got -1"),
        (dict(share_values_from=1.5), r"share_values_from as a fraction must be in \[0, 1\], got 1.5"),
        (dict(share_values_from=math.nan), "share_values_from .* got nan"),
        (dict(share_values_from=True), "share_values_from must be a layer index, .* got True"),
        (dict(share_keys_from="half"), "share_keys_from must be a layer index, .* got 'half'"),
        (dict(shared_fit="median"), "shared_fit must be one of .*least_squares.*minmax.* got 'median'"),
        (dict(k_group_size=0), "k_group_size must be an integer of at least 1, got 0"),
        (dict(v_group_size=-4), "v_group_size must be an integer of at least 1, got -4"),
        (dict(residual_length=64.0), "residual_length must be an integer of at least 1, got 64.0"),
        (dict(sink_tokens=-1), "sink_tokens must be an integer of at least 0, got -1"),
        (dict(k_group_size=32, residual_length=48), "multiple of k_group_size, got 48 and 32"),
        (dict(residual_length=64), "^residual_length must be a multiple of k_group_size, got 64 and 128"),
        (dict(k_residual_length=192), "^k_residual_length must be a multiple of k_group_size, got 192 and 128"),
        (dict(k_residual_length=0), "k_residual_length must be an integer of at least 1, got 0"),
        (dict(v_residual_length=True), "v_residual_length must be an integer of at least 1, got True"),
        (dict(v_residual_length=2**21), "v_residual_length must be at most 1048576, got 2097152"),
        (dict(eta_1bit=0.5), r'eta_1bit must be in \[0, 0.5\) or "auto", got 0.5'),
        (dict(eta_2bit=-0.1), r'eta_2bit must be in \[0, 0.5\) or "auto", got -0.1'),
        (dict(eta_2bit=math.nan), "eta_2bit .* got nan"),
        (dict(scale_dtype=torch.float64), "scale_dtype must be one of .*float16.* got torch.float64"),
        (dict(scale_dtype=torch.bfloat16), "scale_dtype must be one of .*uint8.*k_scheme='per_channel_ranked'.* got"),
        (
            dict(scale_dtype=torch.uint8, k_scheme="per_channel"),
            "scale_dtype .*k_scheme='per_channel'.* got torch.u",
        ),
        (dict(scale_dtype=torch.uint8, v_scheme="per_token"), "scale_dtype .*v_scheme='per_token'.* got torch.u"),
    ],
)
def test_a_field_that_breaks_its_rule(fields: dict, words: str) -> None:
    for make in (lambda: XQuantConfig(**fields), lambda: XQuantConfig().replace(**fields)):
        with pytest.raises(ConfigError, match=words) as caught:
            make()
        assert isinstance(caught.value, ValueError)


def test_config_is_frozen_keyword_only_and_a_value() -> None:
    config = XQuantConfig(k_bits=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k_bits = 2
    with pytest.raises(TypeError):
        XQuantConfig(4)
    assert config == XQuantConfig(k_bits=4) and hash(config) == hash(XQuantConfig(k_bits=4))
    assert config.replace(v_bits=8) == XQuantConfig(k_bits=4, v_bits=8) and config.v_bits == 2
    assert repr(XQuantConfig(k_bits=2.0, v_bits=(2.0,))) == repr(XQuantConfig(k_bits=2, v_bits=(2,)))


@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        ({}, (384, 128)),
        (dict(k_bits=1.5), (384, 128)),
        (dict(k_bits=3), (256, 256)),
        (dict(v_bits=1), (256, 256)),
        (dict(k_bits=16), (256, 256)),
        (dict(v_bits=16), (256, 256)),
        (dict(v_scheme="per_token"), (256, 256)),
        (dict(k_group_size=256), (256, 256)),
        (dict(residual_length=128), (128, 128)),
        (dict(k_residual_length=128), (128, 256)),
        (dict(v_residual_length=12), (256, 12)),
        (dict(residual_length=256, v_residual_length=12), (256, 12)),
        (dict(residual_length=12, k_residual_length=128), (128, 12)),
        (dict(k_residual_length=256, v_residual_length=1), (256, 1)),
    ],
)
def test_residual_lengths(fields: dict, lengths: tuple[int, int]) -> None:
    """A side's own comes before that of both; where nothing is said, bits and schemes decide."""
    layer = make_plan(XQuantConfig.from_json(XQuantConfig(**fields).to_json()), 1).layers[0]
    assert (layer.key.residual_length, layer.value.residual_length) == lengths


def test_residual_lengths_of_layers() -> None:
    layers = make_plan(XQuantConfig(k_bits=(2, 2.5, 1.5), v_bits=(2, 2, 1)), 3).layers
    assert [layer.key.residual_length for layer in layers] == [384, 256, 256]


NOTHING_SHARED = dict(share_keys_from=None, share_values_from=None)
EXPECTED = {
    "full": dict(k_bits=16, v_bits=16, **NOTHING_SHARED),
    "xquant-2.7": dict(k_bits=3, v_bits=2, **NOTHING_SHARED),
    "xquant-2.2": dict(k_bits=2, v_bits=2, **NOTHING_SHARED),
    "xquant-1.7": dict(k_bits=2, v_bits=1, **NOTHING_SHARED),
    "xquant-1.4": dict(k_bits=1.5, v_bits=1, **NOTHING_SHARED),
    "kivi-4": dict(k_bits=4, v_bits=4, eta_1bit=0, eta_2bit=0, **NOTHING_SHARED),
    "kivi-2": dict(k_bits=2, v_bits=2, eta_1bit=0, eta_2bit=0, **NOTHING_SHARED),
    "asymkv-1.5": dict(k_bits=2, v_bits=1, eta_1bit=0, eta_2bit=0, **NOTHING_SHARED),
    "xquant-paper": dict(k_bits=2, v_bits=1, share_keys_from=None, share_values_from=0.5, shared_fit="minmax"),
    "xquant": dict(k_bits=2, v_bits=1, share_keys_from=None, share_values_from=0.5, shared_fit="least_squares"),
    "xquant-1bit": dict(k_bits=2, v_bits=2, share_keys_from=0, share_values_from=0, shared_fit="least_squares"),
}


#: What keeps its name and its numbers.
OLDER = ("kivi-4", "kivi-2", "asymkv-1.5", "xquant-paper", "xquant", "xquant-1bit")


@pytest.mark.parametrize("name", EXPECTED)
def test_presets(name: str) -> None:
    config = XQuantConfig.preset(name)
    fields = dict(eta_1bit=1 / 6, eta_2bit=0.045) | EXPECTED[name] if "xquant" in name else EXPECTED[name]
    assert {field: getattr(config, field) for field in fields} == fields
    rest = dict(k_group_size=128, v_group_size=None, scale_dtype=None)
    windows = tuple(entry.residual_length for entry in make_plan(config, 4).layers[3])
    assert windows == ((128, 128) if name in OLDER else (384, 128) if name == "xquant-2.2" else (256, 256))
    if name in OLDER:
        rest |= dict(sink_tokens=0, k_scheme="per_channel", v_scheme="per_token")
    else:
        rest |= dict(sink_tokens=4, k_scheme="per_channel_ranked", v_scheme="per_token_rotated")
    assert {field: getattr(config, field) for field in rest} == rest


def test_preset_names() -> None:
    assert set(PRESETS) == set(EXPECTED)
    assert XQuantConfig.preset("xquant-2.2") == XQuantConfig()
    with pytest.raises(ConfigError, match=r"preset must be one of \[.*'kivi-2'.*\], got 'kivi'"):
        XQuantConfig.preset("kivi")
    with pytest.raises(TypeError):
        PRESETS["mine"] = {}
    with pytest.raises(TypeError):
        PRESETS["xquant"]["k_bits"] = 4


@pytest.mark.parametrize("name", EXPECTED)
def test_json_round_trip(name: str) -> None:
    config = XQuantConfig.preset(name).replace(v_bits=[1, 2, 16], scale_dtype=torch.float16, v_group_size=32)
    assert config.v_bits == (1, 2, 16)
    again = XQuantConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)


def test_bits_and_eta_of_a_layer() -> None:
    config = range_config(k_bits=(1, 2, 4), v_bits=8, eta_1bit=0.2, eta_2bit=0.1)
    assert [config.bits("key", i, 3) for i in range(3)] == [1, 2, 4]
    assert [config.bits("value", i, 3) for i in range(3)] == [8, 8, 8]
    assert [config.eta("per_token", bits) for bits in (1, 2, 3, 4, 8, 16)] == [0.2, 0.1, 0, 0, 0, 0]
    assert [config.eta("per_token_rotated", bits) for bits in (1, 2, 4, 8, 16)] == [0, 0, 0, 0, 0]
    with pytest.raises(ConfigError, match="k_bits must hold one number per layer: got 3 for 4 layers"):
        config.bits("key", 0, 4)


def plan(config: XQuantConfig, layers: int, role: str = "value", shapes=None, dtypes=None) -> list[KVSpec]:
    """Specs of all layers of one role."""
    geometry = [Geometry(shapes[i] if shapes else SHAPE, dtypes[i] if dtypes else torch.float16) for i in range(layers)]
    return bind_all(make_plan(config, layers), [(i, role, geometry[i]) for i in range(layers)])


def borrowing(specs: list[KVSpec]) -> dict[int, int]:
    return {spec.layer: spec.partner for spec in specs if spec.borrowed}


@pytest.mark.parametrize("layers", range(1, 14))
@pytest.mark.parametrize("share", [None, 0, 1, 2, 3, 5, 100, 0.0, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("side", ["key", "value"])
def test_which_layers_borrow(layers: int, share: float | None, side: str) -> None:
    """Pairs (2i, 2i + 1), never shifted; an upper layer borrows if its number is at or past the start."""
    field = "share_keys_from" if side == "key" else "share_values_from"
    config = range_config(**(NOTHING_SHARED | {field: share}))
    start = layers if share is None else math.floor(share * layers) if isinstance(share, float) else share
    expected = {i: i - 1 for i in range(layers) if i % 2 == 1 and i >= start}
    plans = plan(config, layers, side)
    assert borrowing(plans) == expected
    assert not borrowing(plan(config, layers, "value" if side == "key" else "key"))
    assert all((p.reason == SHARED) == p.borrowed and p.reason for p in plans)
    if layers % 2:
        assert plans[-1].reason == "the last layer has no partner"


@pytest.mark.parametrize(
    ("fields", "more", "reason"),
    [
        (dict(v_bits=(2, 1, 1, 1)), {}, "layers 0 and 1 differ in bits: 2 and 1"),
        (dict(v_bits=(16, 16, 1, 1)), {}, "16-bit storage has no codes to share"),
        (dict(v_bits=(1, 16, 1, 1)), {}, "16-bit storage has no codes to share"),
        ({}, dict(shapes=[SHAPE, (1, 2, 64, 32), SHAPE, SHAPE]), "layers 0 and 1 differ in geometry: .*64, 32"),
        ({}, dict(shapes=[(1, 2, 32, 16), SHAPE, SHAPE, SHAPE]), "layers 0 and 1 differ in geometry"),
        ({}, dict(dtypes=[torch.float32, *[torch.float16] * 3]), "layers 0 and 1 differ in geometry: .*float32"),
    ],
)
def test_pairs_that_do_not_match_stay_apart(fields: dict, more: dict, reason: str) -> None:
    plans = plan(range_config(share_values_from=0, **fields), 4, **more)
    assert borrowing(plans) == {3: 2}
    assert plans[0].reason == "lower layer of its pair" and re.match(reason, plans[1].reason)


def test_a_plan_says_where_sharing_starts_and_what_is_out_of_reach() -> None:
    reasons = [p.reason for p in plan(range_config(), 8)]
    assert reasons[1] == reasons[3] == "share_values_from starts sharing at layer 4"
    assert reasons[5] == reasons[7] == SHARED
    assert plan(range_config(), 8, "key")[5].reason == "sharing is off"
    entry = make_plan(range_config(share_values_from=0), 2).layers[1].value
    assert entry.partner == 0 and entry.bind(1, SHAPE, torch.float16, None).reason == "layer 0 is not in reach"


def test_the_spec_a_plan_makes() -> None:
    config = range_config(
        k_group_size=8, residual_length=16, v_group_size=4, eta_1bit=0.3, sink_tokens=2, scale_dtype=torch.float32
    )
    key, value = (plan(config, 2, role)[1] for role in ("key", "value"))
    assert (key.bits, key.group_size, key.eta, key.partner) == (2, 8, 0.045, None)
    assert (value.bits, value.group_size, value.eta, value.partner) == (1, 4, 0.3, 0)
    for spec in (key, value):
        assert (spec.shape, spec.dtype, spec.layer, spec.residual_length) == (SHAPE, torch.float16, 1, 16)
        assert (spec.sink_tokens, spec.scale_dtype, spec.fit) == (2, torch.float32, "least_squares")
    assert plan(config.replace(v_group_size=None), 1)[0].group_size == 16
    with pytest.raises(
        ConfigError, match=r"layer 0: v_group_size must divide head_dim, .*v_group_size=5 .*head_dim=16"
    ):
        plan(config.replace(v_group_size=5), 2)


def test_options() -> None:
    assert parse(None, None) == parse(None, {}) and parse(None, None).config is None
    assert parse(None, None).effective == XQuantConfig() and parse(None, None).strict is False
    assert parse(None, {"preset": "kivi-2"}).config == XQuantConfig.preset("kivi-2")
    assert parse(None, {"preset": "kivi-2", "v_bits": 4}).config == XQuantConfig.preset("kivi-2").replace(v_bits=4)
    assert parse(None, {"k_bits": 4}).effective == XQuantConfig(k_bits=4)
    config = XQuantConfig(sink_tokens=4)
    assert parse(None, {"config": config}).config is config
    request = parse("reduce-overhead", {"strict": True})
    assert request.strict and request.config is None and request.mode == "reduce-overhead"
    assert [parse(mode, None).mode for mode in MODES] == list(MODES)
    request = parse(None, {"preset": "kivi-2", "mode": "max-autotune", "max-autotune": False, "cpp.threads": 2})
    assert request.config == XQuantConfig.preset("kivi-2") and request.mode == "max-autotune"
    assert request.inductor == (("max_autotune", False), ("cpp.threads", 2))


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("fast", None, "mode must be one of .*'max-autotune'.* got 'fast'"),
        (None, {"bits": 2}, r"unknown option \['bits'\]; valid options are .*'config', .*'k_bits'.*'preset'.*'strict'"),
        (None, {"bits": 2, "groups": 3}, r"unknown options \['bits', 'groups'\]"),
        (None, {"preset": "kivi-2", "config": XQuantConfig()}, r"config= stands alone, got also \['preset'\]"),
        (None, {"k_bits": 2, "config": XQuantConfig()}, r"config= stands alone, got also \['k_bits'\]"),
        (None, {"config": {"k_bits": 2}}, "config must be an XQuantConfig or a Plan, got dict"),
        (None, {"preset": "kivi-3"}, "preset must be one of .* got 'kivi-3'"),
        (None, {"strict": 1}, "strict must be True or False, got 1"),
        (None, {"k_bits": 7}, "k_bits must be one of .* got 7"),
        ("default", {"mode": "max-autotune"}, "mode was given twice: 'default' and, as an option, 'max-autotune'"),
        (None, {"mode": 3}, "mode must be one of .* got 3"),
        (None, {"cpp.threads": "two"}, "cpp.threads, an option of Inductor, must be of type int, got 'two'"),
        (None, {"max_autotun": True}, r"unknown option \['max_autotun'\]; .* those of torch._inductor.list_options"),
    ],
)
def test_options_that_make_no_sense(mode: str | None, options: dict | None, words: str) -> None:
    before = dict(options or {})
    with pytest.raises(ConfigError, match=words):
        parse(mode, options)
    assert (options or {}) == before


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_ruins_real_models_warns_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    forget()
    for _ in range(2):
        parse(None, {"preset": name})
    ruins = name != "full" and MEASURED_KL[name] > TOLERABLE_KL
    assert len(caplog.messages) == ruins
    assert not ruins or f"{name!r} costs {MEASURED_KL[name]:.2f} nats" in caplog.messages[0]
    XQuantCache(LlamaConfig(num_hidden_layers=2), max_cache_len=8, config=XQuantConfig.preset(name))
    assert len(caplog.messages) == ruins, "once for all ways to use it"


def test_every_preset_was_measured_and_changes_of_one_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    forget()
    assert set(MEASURED_KL) == set(PRESETS) - {"full"}
    parse(None, {"preset": "kivi-2", "sink_tokens": 4})
    parse(None, None)
    assert not caplog.messages

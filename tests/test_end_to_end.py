"""The whole slice on trained weights: compiled with Inductor, against the independent reference."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_decoder import Decoder
from stepping import interpreted, lockstep, logits_of, relative_error, run_steps, ties
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

from xquant_fx import PRESETS, XQuantCache, XQuantConfig

pytest_plugins = ["plain_torch"]
STEPS = 300
FEWER = 70  # two flushes of each window
SMALL = dict(k_group_size=16, residual_length=32)
#: Range codes, which the independent reference knows; the others have one in attention_reference.py.
QUANTIZED = sorted(name for name in set(PRESETS) - {"full"} if PRESETS[name].get("k_scheme") == "per_channel")
#: Codes of two planes, shared by pairs of layers.
PLANES = dict(k_bits=3, v_bits=3, share_keys_from=0, share_values_from=0)
RANKED = sorted(set(PRESETS) - {"full", *QUANTIZED})


#: Of ``xquant`` the lower half shares nothing, so that what ``asymkv-1.5`` and ``kivi-2`` are made of is in it, too.
#: Pairs alone are there in two layers, and what shares nothing in one.
FAST = [
    ("xquant", {}, "two_layers"),
    ("xquant", PLANES, "two_layers"),
    ("xquant-paper", dict(share_values_from=0), "two_layers"),
    ("xquant-1bit", {}, "two_layers"),
    ("kivi-4", {}, "one_layer"),
]
SLOW = [*((name, {}) for name in QUANTIZED), ("xquant", PLANES)]


def first_layers(trained, number: int):
    model, ids = copy.deepcopy(trained)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:number], number
    return model, ids


@pytest.fixture(scope="module")
def four_layers(trained):
    return first_layers(trained, 4)


@pytest.fixture(scope="module")
def one_layer(trained):
    return first_layers(trained, 1)


@pytest.fixture(scope="module")
def two_layers(trained):
    return first_layers(trained, 2)


def small(preset: str, **more) -> XQuantConfig:
    """A preset whose windows are short enough to flush often in such a run."""
    return XQuantConfig.preset(preset).replace(**SMALL, **more)


def decode_against_reference(model, ids, preset: str, step, steps: int, **more) -> tuple[int, int]:
    """Prefill 45 tokens, decode ``steps`` over several flushes; (codes that differ at ties, codes)."""
    config = small(preset, **more)
    cache = XQuantCache(model.config, max_cache_len=384, config=config)
    plan = [(model.forward, 45)] + [(step, 1)] * steps
    got, want, reference = lockstep(model, plan, ids[:, : 45 + steps], cache, config)
    assert relative_error(got, want) < 1e-4, preset
    assert cache.states[0].length == 45 + steps
    return ties(reference)


def are_ties(taken: int, compared: int, model, steps: int) -> bool:
    """One code in 100,000 may be another, one however few there are; of 8 layers and 300 steps more than 50,000 are."""
    least = 50_000 * steps / STEPS * len(model.model.layers) / 8
    return compared > least and taken <= max(1, compared / 100_000)


@pytest.mark.parametrize(
    ("preset", "more", "name", "steps"),
    [
        *((*case, FEWER) for case in FAST),
        *(pytest.param(*case, "trained", STEPS, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_the_rewritten_graph_equals_the_reference(request, preset, more, name, steps):
    """Run op by op, so that only the passes and the ops are under test."""
    model, ids = request.getfixturevalue(name)
    step = torch.compile(model.forward, backend=interpreted(), dynamic=False)
    taken, compared = decode_against_reference(model, ids, preset, step, steps, **more)
    assert are_ties(taken, compared, model, steps), (taken, compared)


@pytest.mark.parametrize(
    ("name", "steps", "presets", "more"),
    [
        ("two_layers", FEWER, ["xquant"], dict(share_values_from=0)),
        pytest.param("four_layers", FEWER, ["xquant"], {}, marks=pytest.mark.slow),
        pytest.param("trained", STEPS, QUANTIZED, {}, marks=pytest.mark.slow),
    ],
    ids=["two_layers", "four_layers", "trained"],
)
def test_compiled_decode_equals_the_reference(request, name, steps, presets, more):
    """Inductor rounds the model's own arithmetic differently, so that a code in 100,000 may tip over at a tie.

    Layers that share nothing are compiled in test_low_precision_models, too.
    """
    model, ids = request.getfixturevalue(name)
    counts = []
    for preset in presets:
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend="xquant", dynamic=False)
        counts.append(decode_against_reference(model, ids, preset, step, steps, **more))
    taken, compared = (sum(c[i] for c in counts) for i in (0, 1))
    assert are_ties(taken, compared, model, 2 * steps), counts


@pytest.mark.parametrize(
    "preset", [n if n == "xquant-1.4" else pytest.param(n, marks=pytest.mark.slow) for n in RANKED]
)
def test_ranked_and_rotated_steps_equal_eager_ones(one_layer, preset):
    """The rewritten graph op by op, with the decode kernel; eager steps attend to dequantized keys and values."""
    model, ids = one_layer
    step = torch.compile(model.forward, backend=interpreted(), dynamic=False)
    caches = [XQuantCache(model.config, max_cache_len=384, config=small(preset)) for _ in range(2)]
    runs = [
        run_steps([(model.forward, 45)] + [(call, 1)] * FEWER, ids[:, : 45 + FEWER], cache)
        for call, cache in zip((step, model.forward), caches, strict=True)
    ]
    assert relative_error(*runs) < 1e-4
    assert any(bool(state.owned["energy"].any()) for state in caches[0].states if "energy" in state.owned)


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        pytest.param("xquant-2.2", {}, marks=pytest.mark.slow),  # test_any_room.py compiles such steps
        pytest.param("xquant-2.2", dict(v_bits=3, scale_dtype=torch.float16), marks=pytest.mark.slow),
        pytest.param("xquant-1.4", {}, marks=pytest.mark.slow),
    ],
)
def test_compiled_ranked_and_rotated_steps_equal_eager_ones(one_layer, preset, more):
    """The same with Inductor, where the C++ append quantizes, too; of a preset whose keys have whole bits."""
    model, ids = one_layer
    step = torch.compile(model.forward, backend="xquant", dynamic=False)
    caches = [XQuantCache(model.config, max_cache_len=384, config=small(preset, **more)) for _ in range(2)]
    runs = [
        run_steps([(first, 45)] + [(call, 1)] * FEWER, ids[:, : 45 + FEWER], cache)
        for first, call, cache in zip((step, model.forward), (step, model.forward), caches, strict=True)
    ]
    assert relative_error(*runs) < 1e-3  # a code or a scale may tip over at a tie


def small_model(tiny_llama, kind: str, **more):
    """``"llama"``, or ``"decoder"``: the same attention and little else, so that there is little to compile."""
    model = tiny_llama(**more) if kind == "llama" else Decoder(more["layers"]).eval()
    return model.to(more.get("dtype", torch.float32))


PLAIN = ("eager", "inductor")


@pytest.mark.parametrize(
    ("kind", "plain"), [("decoder", "eager"), *(pytest.param("llama", n, marks=pytest.mark.slow) for n in PLAIN)]
)
def test_full_equals_plain_code(tiny_llama, kind, plain):
    model = small_model(tiny_llama, kind, layers=1)
    ids = torch.randint(1, 128, (1, 65), generator=torch.Generator().manual_seed(1))
    outs = []
    for backend, cache in (
        (plain, StaticCache(model.config, max_cache_len=384)),
        ("xquant", XQuantCache(model.config, max_cache_len=384, config=XQuantConfig.preset("full"))),
    ):
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend=backend, dynamic=False)
        outs.append(run_steps([(model.forward, 45)] + [(step, 1)] * 20, ids, cache))
    assert relative_error(outs[1], outs[0]) < 1e-6


SIZES = [45, 40, 1, 3, 40, 1, 5]  # a cold prefill, chunks past the window, steps and decode between them


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("trained", "eager"),
        ("decoder", None),
        *(pytest.param("trained", dynamic, marks=pytest.mark.slow) for dynamic in (False, None)),
    ],
)
def test_prefill_and_chunks_equal_the_reference(request, name, dynamic):
    """Eager, and rewritten graphs of every length, run op by op; ``dynamic=None`` makes lengths symbolic."""
    if name == "decoder":
        request.getfixturevalue("plain_torch")
        model, ids = Decoder().eval(), torch.randint(128, (1, sum(SIZES)), generator=torch.Generator().manual_seed(1))
    else:
        model, ids = request.getfixturevalue(name)
    config = small("xquant-1bit")
    step = model.forward
    if dynamic != "eager":
        step = torch.compile(model.forward, backend=interpreted(), dynamic=dynamic)
    cache = XQuantCache(model.config, max_cache_len=256, config=config)
    got, want, reference = lockstep(model, [(step, n) for n in SIZES], ids[:, : sum(SIZES)], cache, config)
    assert relative_error(got, want) < 1e-4
    taken, compared = ties(reference)
    least = 20_000 * model.config.num_hidden_layers / 8
    assert compared > least and taken <= 1 + compared / 100_000  # one, however few codes there are


def test_a_cold_prefill_attends_to_the_prompt_alone(tiny_llama):
    """Not to a buffer of max_cache_len tokens; a later chunk attends to all there is, masked."""
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.append(args[1].shape[2])
            return func(*args, **(kwargs or {}))

    model = tiny_llama(layers=2)
    ids = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(1))
    padding = torch.arange(40) >= torch.tensor([[0], [7]])
    cache = XQuantCache(model.config, max_cache_len=256, config=small("xquant"), padding_mask=padding)
    with torch.no_grad(), Watch():
        got = model(ids[:, :40], attention_mask=padding.long(), past_key_values=cache).logits
        model(ids[:, 40:], past_key_values=cache)
        want = model(ids[:, :40], attention_mask=padding.long()).logits
    assert seen == [40, 40, 256, 256, 40, 40]
    torch.testing.assert_close(got[padding], want[padding])


@pytest.mark.parametrize(
    ("kind", "layers", "preset", "dynamic"),
    [
        ("decoder", 1, "kivi-2", False),
        *(pytest.param("llama", 2, "xquant-1bit", each, marks=pytest.mark.slow) for each in (False, None)),
    ],
)
@pytest.mark.usefixtures("all_traced")
def test_compiled_prefill_and_chunks_equal_eager(tiny_llama, kind, layers, preset, dynamic):
    """The same with Inductor, on few layers (compiling chunk graphs takes long)."""
    model = small_model(tiny_llama, kind, layers=layers)
    ids = torch.randint(1, 128, (1, sum(SIZES)), generator=torch.Generator().manual_seed(1))
    config = small(preset)
    step = torch.compile(model.forward, backend="xquant", dynamic=dynamic)
    caches = [XQuantCache(model.config, max_cache_len=256, config=config) for _ in range(2)]
    # Compiling takes long: the first of the fast tests is eager, as compiled ones of test_prompt_queries.py are not.
    sizes, first = (SIZES, step) if dynamic is None else (SIZES[:2], model.forward)
    plans = ([(model.forward, n) for n in sizes], [(first, sizes[0]), *((step, n) for n in sizes[1:])])
    outs = [run_steps(plan, ids[:, : sum(sizes)], cache) for plan, cache in zip(plans, caches, strict=True)]
    assert relative_error(outs[1], outs[0]) < 1e-4


@pytest.mark.parametrize(
    ("kind", "dtype", "compiled"),
    [
        ("decoder", torch.bfloat16, True),
        pytest.param("decoder", torch.float16, False, marks=pytest.mark.slow),
        *(
            pytest.param("llama", dtype, compiled, marks=pytest.mark.slow)
            for dtype in (torch.bfloat16, torch.float16)
            for compiled in (True, False)
        ),
    ],
)
def test_low_precision_models(request, tiny_llama, kind, dtype, compiled):
    """In 16-bit models compiled and eager round differently: compare both with an fp32 model on the same tokens."""
    if not compiled:
        request.getfixturevalue("plain_torch")
    model = small_model(tiny_llama, kind, layers=1, dtype=dtype)
    reference = small_model(tiny_llama, kind, layers=1)
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    ids = torch.randint(1, 128, (2, 75), generator=torch.Generator().manual_seed(1))
    config = small("kivi-4")
    step = torch.compile(model.forward, backend="xquant" if compiled else interpreted(), dynamic=False)
    runs = {}
    for name, net, call in (
        ("fp32", reference, reference.forward), ("eager", model, model.forward), ("ours", model, step)
    ):  # fmt: skip
        cache = XQuantCache(net.config, max_cache_len=96, config=config)
        runs[name] = run_steps([(net.forward, 45)] + [(call, 1)] * 30, ids, cache)
    assert runs["ours"].dtype == dtype
    assert relative_error(runs["ours"], runs["fp32"]) < 3 * relative_error(runs["eager"], runs["fp32"])


@pytest.mark.parametrize(("layers", "compiled"), [(2, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_two_bit_static_cache_equals_xquant_cache(tiny_llama, layers, compiled):
    """Nothing rests on our cache class: a plain StaticCache is taken over and then behaves the same."""
    model = tiny_llama(layers=layers)
    ids = torch.randint(1, 128, (1, 46 + FEWER), generator=torch.Generator().manual_seed(1))
    config = small("xquant")
    settings = dict(backend="xquant", options={"config": config})
    settings = settings if compiled else dict(backend=interpreted(config=config))
    step = torch.compile(model.forward, dynamic=False, **settings)
    plain = StaticCache(model.config, max_cache_len=256)
    ours = XQuantCache(model.config, max_cache_len=256, config=config)
    outs = [run_steps([(model.forward, 45)] + [(step, 1)] * FEWER, ids[:, :-1], cache) for cache in (plain, ours)]
    assert relative_error(outs[0], outs[1]) < 1e-4
    assert plain.layers[-1].values.state.lower is plain.layers[-2].values.state
    assert logits_of(model.forward, ids[:, -1:], plain).isfinite().all()

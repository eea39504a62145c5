"""The whole slice on trained weights: compiled with Inductor, against the independent reference."""

from __future__ import annotations

import pytest
import torch
from stepping import interpreted, lockstep, logits_of, relative_error, run_steps, ties
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

from xquant_fx import PRESETS, XQuantCache, XQuantConfig

STEPS = 300
FEWER = 100  # three flushes of each window
SMALL = dict(k_group_size=16, residual_length=32)
#: Range codes, which the independent reference knows; the others have one in attention_reference.py.
QUANTIZED = sorted(name for name in set(PRESETS) - {"full"} if PRESETS[name].get("k_scheme") == "per_channel")
#: Codes of two planes, shared by pairs of layers.
PLANES = dict(k_bits=3, v_bits=3, share_keys_from=0, share_values_from=0)
RANKED = sorted(set(PRESETS) - {"full", *QUANTIZED})


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


@pytest.mark.parametrize("steps", [FEWER, pytest.param(STEPS, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("preset", "more"), [*((name, {}) for name in QUANTIZED), ("xquant", PLANES)])
def test_the_rewritten_graph_equals_the_reference(trained, preset, more, steps):
    """Run op by op, so that only the passes and the ops are under test."""
    model, ids = trained
    step = torch.compile(model.forward, backend=interpreted(), dynamic=False)
    taken, compared = decode_against_reference(model, ids, preset, step, steps, **more)
    assert compared > 50_000 * steps / STEPS and taken <= compared / 100_000


@pytest.mark.parametrize(
    "presets", [["xquant"], pytest.param([n for n in QUANTIZED if n != "xquant"], marks=pytest.mark.slow)], ids=len
)
def test_compiled_decode_equals_the_reference(trained, presets):
    """Inductor rounds the model's own arithmetic differently, so that a code in 100,000 may tip over at a tie."""
    model, ids = trained
    counts = []
    for preset in presets:
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend="xquant", dynamic=False)
        counts.append(decode_against_reference(model, ids, preset, step, STEPS))
    taken, compared = (sum(c[i] for c in counts) for i in (0, 1))
    assert compared > 100_000 and taken <= compared / 100_000, counts


@pytest.mark.parametrize(
    "preset", [pytest.param(n, marks=pytest.mark.slow) if n == "xquant-1.7" else n for n in RANKED]
)
def test_ranked_and_rotated_steps_equal_eager_ones(trained, preset):
    """The rewritten graph op by op, with the decode kernel; eager steps attend to dequantized keys and values."""
    model, ids = trained
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
        ("xquant-2.2", {}),
        pytest.param("xquant-2.2", dict(v_bits=3, scale_dtype=torch.float16), marks=pytest.mark.slow),
        pytest.param("xquant-1.4", {}, marks=pytest.mark.slow),
    ],
)
def test_compiled_ranked_and_rotated_steps_equal_eager_ones(trained, preset, more):
    """The same with Inductor, where the C++ append quantizes, too."""
    model, ids = trained
    step = torch.compile(model.forward, backend="xquant", dynamic=False)
    caches = [XQuantCache(model.config, max_cache_len=384, config=small(preset, **more)) for _ in range(2)]
    runs = [
        run_steps([(first, 45)] + [(call, 1)] * FEWER, ids[:, : 45 + FEWER], cache)
        for first, call, cache in zip((step, model.forward), (step, model.forward), caches, strict=True)
    ]
    assert relative_error(*runs) < 1e-3  # a code or a scale may tip over at a tie


def test_full_equals_plain_inductor(tiny_llama):
    model = tiny_llama(layers=2)
    ids = torch.randint(1, 128, (1, 105), generator=torch.Generator().manual_seed(1))
    outs = []
    for backend, cache in (
        ("inductor", StaticCache(model.config, max_cache_len=384)),
        ("xquant", XQuantCache(model.config, max_cache_len=384, config=XQuantConfig.preset("full"))),
    ):
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend=backend, dynamic=False)
        outs.append(run_steps([(model.forward, 45)] + [(step, 1)] * 60, ids[:, :105], cache))
    assert relative_error(outs[1], outs[0]) < 1e-6


SIZES = [45, 40, 1, 3, 2, 40, 1, 5]  # a cold prefill, chunks past the window, steps and decode between them


@pytest.mark.parametrize("dynamic", ["eager", pytest.param(False, marks=pytest.mark.slow), None])
def test_prefill_and_chunks_equal_the_reference(trained, dynamic):
    """Eager, and rewritten graphs of every length, run op by op; ``dynamic=None`` makes lengths symbolic."""
    model, ids = trained
    config = small("xquant-1bit")
    step = model.forward
    if dynamic != "eager":
        step = torch.compile(model.forward, backend=interpreted(), dynamic=dynamic)
    cache = XQuantCache(model.config, max_cache_len=256, config=config)
    got, want, reference = lockstep(model, [(step, n) for n in SIZES], ids[:, : sum(SIZES)], cache, config)
    assert relative_error(got, want) < 1e-4
    taken, compared = ties(reference)
    assert compared > 20_000 and taken <= 1 + compared / 100_000  # one, however few codes there are


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


@pytest.mark.parametrize("dynamic", [False, pytest.param(None, marks=pytest.mark.slow)])
def test_compiled_prefill_and_chunks_equal_eager(tiny_llama, dynamic):
    """The same with Inductor, on two layers (compiling chunk graphs takes long)."""
    model = tiny_llama(layers=2)
    ids = torch.randint(1, 128, (1, sum(SIZES)), generator=torch.Generator().manual_seed(1))
    config = small("xquant-1bit")
    step = torch.compile(model.forward, backend="xquant", dynamic=dynamic)
    sizes = SIZES if dynamic is None else SIZES[:3]
    caches = [XQuantCache(model.config, max_cache_len=256, config=config) for _ in range(2)]
    calls = (model.forward, step)
    outs = [run_steps([(c, n) for n in sizes], ids[:, : sum(sizes)], k) for c, k in zip(calls, caches, strict=True)]
    assert relative_error(outs[1], outs[0]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(tiny_llama, dtype):
    """In 16-bit models compiled and eager round differently: compare both with an fp32 model on the same tokens."""
    model = tiny_llama(layers=2, dtype=dtype)
    reference = tiny_llama(layers=2, dtype=torch.float32)
    reference.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    ids = torch.randint(1, 128, (2, 75), generator=torch.Generator().manual_seed(1))
    config = small("kivi-4")
    step = torch.compile(model.forward, backend="xquant", dynamic=False)
    runs = {}
    for name, net, call in (
        ("fp32", reference, reference.forward), ("eager", model, model.forward), ("ours", model, step)
    ):  # fmt: skip
        cache = XQuantCache(net.config, max_cache_len=96, config=config)
        runs[name] = run_steps([(net.forward, 45)] + [(call, 1)] * 30, ids, cache)
    assert runs["ours"].dtype == dtype
    assert relative_error(runs["ours"], runs["fp32"]) < 3 * relative_error(runs["eager"], runs["fp32"])


def test_two_bit_static_cache_equals_xquant_cache(tiny_llama):
    """Nothing rests on our cache class: a plain StaticCache is taken over and then behaves the same."""
    model = tiny_llama(layers=4)
    ids = torch.randint(1, 128, (1, 126), generator=torch.Generator().manual_seed(1))
    config = small("xquant")
    step = torch.compile(model.forward, backend="xquant", dynamic=False, options={"config": config})
    plain = StaticCache(model.config, max_cache_len=256)
    ours = XQuantCache(model.config, max_cache_len=256, config=config)
    outs = [run_steps([(model.forward, 45)] + [(step, 1)] * 80, ids[:, :125], cache) for cache in (plain, ours)]
    assert relative_error(outs[0], outs[1]) < 1e-4
    assert plain.layers[3].values.state.lower is plain.layers[2].values.state
    assert logits_of(model.forward, ids[:, 125:126], plain).isfinite().all()

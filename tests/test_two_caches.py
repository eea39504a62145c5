"""Several caches in one graph: never paired with each other, each with its own length, faults and memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from plain_decoder import Decoder
from rewrites import sdpa
from stepping import interpreted, relative_error
from transformers import StaticCache

from xquant_fx import CacheStateError, XQuantCache, XQuantConfig
from xquant_fx.compiler.stacks import numbered, stack_of

N, SHAPE = 64, (1, 2, 64, 8)
CONFIG = XQuantConfig.preset("xquant").replace(
    k_bits=4, v_bits=4, k_group_size=4, residual_length=8, share_values_from=0, share_keys_from=0
)


def test_stacks():
    hf = "L['cache'].layers[{}].{}"
    assert stack_of(hf.format(0, "keys"), hf.format(0, "values")) == stack_of(hf.format(11, "keys"), hf.format(11, "v"))
    fast = "L['self']._modules['{}']._modules['layers']._modules['3']._buffers['{}_cache']"
    assert stack_of(fast.format("a", "k"), fast.format("a", "v")) != stack_of(
        fast.format("b", "k"), fast.format("b", "v")
    )
    assert stack_of("L['kv'][0][3][0]", "L['kv'][0][3][1]") == "L['kv'][0][*][0]"  # layer 3 of cache 0
    assert stack_of("L['k'][10]", "L['v'][10]") == stack_of("L['k'][11]", "L['v'][11]") == "L['k'][*]"
    assert stack_of("L['K']", "L['V']") != stack_of("L['k2']", "L['v2']")
    assert numbered("abac") == [0, 1, 0, 2]


def both(x, caches, positions, masks):
    out = []
    for i, (layers, pos, mask) in enumerate(zip(caches, positions, masks, strict=True)):
        for keys, values in layers:
            k, v = (x[1].flip(-1), x[2].flip(-1)) if i else (x[1], x[2])
            keys[:, :, pos], values[:, :, pos] = k, v
            out.append(sdpa(x[0], keys, values, attn_mask=mask))
    return out


def run(step, lengths, layers):
    caches = [[[torch.zeros(SHAPE) for _ in range(2)] for _ in range(n)] for n in layers]
    generator, outs = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        x = torch.randn(3, 1, 2, 30, 8, generator=generator)
        for i, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            for keys, values in cache:
                keys[:, :, :length], values[:, :, :length] = (
                    y[:, :, :length].flip(-1) if i else y for y in x[1:, :, :, :length]
                )
        for t in range(20):
            x = torch.randn(3, 1, 2, 1, 8, generator=generator)
            positions = [torch.tensor([length + t]) for length in lengths]
            outs.append(step(x, caches, positions, [torch.arange(N)[None] <= p for p in positions]))
    return outs, caches


@pytest.mark.parametrize("lengths", [(30, 10), (30, 30)])
def test_two_caches_of_ordinary_buffers(lengths):
    """Even where both happen to be equally long when they are taken over."""
    compiled = torch.compile(both, backend=interpreted(config=CONFIG), dynamic=False)
    (got, caches), (want, _) = run(compiled, lengths, (1, 2)), run(both, lengths, (1, 2))
    errors = [max(relative_error(a[i], b[i]) for a, b in zip(got, want, strict=True)) for i in range(3)]
    assert max(errors) < 0.2
    alone, _ = run(
        torch.compile(lambda *a: both(*a), backend=interpreted(config=CONFIG), dynamic=False), lengths, (1, 0)
    )
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, alone, strict=True))  # as if the other were not there
    states = [[keys.state for keys, _ in cache] for cache in caches]
    assert states[0][0].lower is None and states[1][0].lower is None and states[1][1].lower is states[1][0]
    assert states[0][0].group is not states[1][0].group
    assert [cache[0].length for cache in states] == [length + 20 for length in lengths]


def test_two_xquant_caches():
    a, b = Decoder(layers=2).eval(), Decoder(layers=3, kv_heads=4).eval()
    ids = torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(3))

    def pair(length_a=21, length_b=9):
        made = [XQuantCache(m.config, 64, CONFIG.replace(k_group_size=8)) for m in (a, b)]
        for model, cache, length in zip((a, b), made, (length_a, length_b), strict=True):
            model(ids[:, :length], past_key_values=cache)
        return made

    def step(t, ca, cb):
        return a.logits(t, ca), b.logits(t[:, :2], cb)

    calls: list = []
    compiled = torch.compile(step, backend=interpreted(calls), dynamic=False)
    with torch.no_grad():
        for _ in range(2):  # the second pair runs the same graph
            mine, theirs = pair(), pair()
            for t in (21, 24, 27):
                for got, want in zip(compiled(ids[:, t : t + 3], *mine), step(ids[:, t : t + 3], *theirs), strict=True):
                    assert relative_error(got, want) < 1e-5
        assert len(calls) == 1
        codes = weakref.ref(mine[1].states[0].owned["codes"])
        kept = mine[0]
        del mine
        gc.collect()
        assert codes() is None, "one cache keeps the other alive"
        late = pair()[1]
        late.layers[1].cumulative_length.add_(5)
        with pytest.raises(CacheStateError, match="appended"):
            compiled(ids[:, :3], kept, late)


def test_beams_of_a_cache_that_was_taken_over(tiny_llama):
    """Hugging Face replaces each buffer by selected rows of it: of codes, once, and pairs stay pairs."""
    model, config = tiny_llama(layers=2), CONFIG.replace(k_group_size=8)
    ids = torch.randint(1, 128, (3, 45), generator=torch.Generator().manual_seed(3))
    step = torch.compile(model.forward, backend=interpreted(config=config), dynamic=False)

    def decode(rows):
        cache, out = StaticCache(model.config, max_cache_len=64), []
        with torch.no_grad():
            model(ids[:, :21], past_key_values=cache)
            for t in range(21, 45):
                if t in (30, 31, 40):
                    cache.reorder_cache(torch.tensor(rows))
                out.append(step(ids[rows][:, t : t + 1], past_key_values=cache).logits)
        return torch.cat(out, 1), cache

    (plain, _), (same, cache) = decode([0, 1, 2]), decode([0, 1, 2])
    assert torch.equal(plain, same)
    keys, values = ([getattr(layer, side) for layer in cache.layers] for side in ("keys", "values"))
    assert keys[1].state.lower is keys[0].state and values[1].state.lower is values[0].state
    assert len({id(buffer.state.group) for buffer in keys + values}) == 1
    rows, last = keys[0].index_select(0, torch.tensor([2, 0])), keys[0][torch.tensor([-1])]
    assert torch.equal(rows.dense(), keys[0].dense()[[2, 0]])
    assert torch.equal(last.dense(), rows.dense()[:1])


def test_what_comes_back_dequantized_is_not_quantized_again():
    ((keys, values),) = run(torch.compile(both, backend=interpreted(config=CONFIG), dynamic=False), (30,), (1,))[1][0]
    plain = [keys.clone(), values.repeat_interleave(1, 0)]
    step = torch.compile(lambda *a: both(*a), backend=interpreted(config=CONFIG), dynamic=False)
    pos = torch.tensor([50])
    with torch.no_grad():
        step(torch.randn(3, 1, 2, 1, 8), [[plain]], [pos], [torch.arange(N)[None] <= pos])
    assert type(plain[0]) is type(plain[1]) is torch.Tensor

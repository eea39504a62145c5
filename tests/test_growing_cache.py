"""Caches that grow by concatenation: DynamicCache, which ``generate()`` makes by itself, and pasts in tuples."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dynamo_graphs import tiny
from rewrites import Rewrites, count
from states import layers_of
from stepping import interpreted
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import DynamicCache

from xquant_fx import CacheStateError, UnsupportedWriteError, XQuantCache, XQuantConfig, memory_report, ops
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import AHEAD, Growth, room_for
from xquant_fx.cache.laid_out_growing import LaidOutGrowingKV
from xquant_fx.cache.room import enlarge

SHAPE = (1, 2, 512, 16)  # [B, H, room, D]
CONFIG = XQuantConfig(k_bits=2, v_bits=2, residual_length=64, k_group_size=32, sink_tokens=2)
EXACT = XQuantConfig(k_bits=16, v_bits=16)
sdpa = torch.nn.functional.scaled_dot_product_attention


def growths(config: XQuantConfig = CONFIG, layers: int = 1) -> list[list[GrowingKV]]:
    """Empty keys and values of each layer."""
    return [[GrowingKV.of(Growth(s)) for s in pair] for pair in layers_of(config, SHAPE, torch.float32, layers)]


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("before, room", [(0, 512), (503, 512), (504, 512), (505, 1024), (5000, 8192)])
def test_room(before, room):
    assert room_for(before) == room


@pytest.mark.parametrize("before, room", [(0, 512), (504, 512), (505, 640), (632, 640), (1016, 1024), (17000, 20480)])
def test_room_by_parts_of_a_power_of_two(before, room):
    assert room_for(before, any_room=True) == room


@pytest.mark.parametrize("before, room", [(1, 512), (256, 512), (257, 1024), (480, 1024), (768, 1024), (769, 2048)])
def test_room_of_a_cache_that_is_taken_over(before, room):
    """A text of usual length is generated behind its prompt before more is needed."""
    assert room_for(before, AHEAD) == room


@pytest.mark.parametrize("config", [CONFIG, EXACT, XQuantConfig.preset("kivi-2"), XQuantConfig.preset("xquant-1bit")])
def test_moving_to_more_room_changes_nothing(config):
    """What is stored reads the same, and what comes after goes where it would in a cache that had the room."""
    small = layers_of(config, SHAPE, torch.float32, 2)
    large = layers_of(config, (1, 2, 1024, 16), torch.float32, 2)
    x, states = tokens(700), [state for layers in (small, large) for pair in layers for state in pair]
    for state in states:
        state.store(x[:, :, :500], torch.arange(500))
    for state in states[:4]:
        enlarge(state, 1024)
    for state in states:
        state.store(x[:, :, 500:], torch.arange(500, 700))
    for a, b in zip(states[:4], states[4:], strict=True):
        assert a.spec == b.spec
        assert {n: tuple(t.shape) for n, t in a.owned.items()} == {n: tuple(t.shape) for n, t in b.owned.items()}
        a.group.drop(), b.group.drop()
        assert torch.equal(a.load(700), b.load(700))


def test_eager_concatenation_appends():
    (k, _), x = growths(EXACT)[0], tokens(600)
    for begin, end in ((0, 300), (300, 301), (301, 600)):
        k = torch.cat([k, x[:, :, begin:end]], dim=-2)
        assert isinstance(k, GrowingKV) and k.shape[2] == end
        assert torch.equal(k + 0, x[:, :, :end])
    assert k.spec.shape[2] == 1024


def test_other_concatenations_read():
    (k, _), x = growths(EXACT)[0], tokens(4)
    k = torch.cat([k, x], dim=2)
    for made in (torch.cat([x, k], dim=2), torch.cat([k, x], dim=1), torch.cat([k, x, x], dim=2)):
        assert type(made) is torch.Tensor
    assert k.shape[2] == 4 and torch.equal(k + 0, x)


def test_an_older_tensor_may_be_continued_once():
    (k, _), x = growths()[0], tokens(200)
    old = torch.cat([k, x[:, :, :150]], dim=2)
    first = torch.cat([old, x[:, :, 150:155]], dim=2)
    other = torch.cat([old, x[:, :, 160:163]], dim=2)
    assert other.shape[2] == 153 and torch.equal((other + 0)[:, :, 150:], x[:, :, 160:163])
    with pytest.raises(CacheStateError, match=r"has 155 tokens, of which those from 150 on were overwritten"):
        first + 0
    with pytest.raises(CacheStateError, match=r"layer 0 keys.*continue copies"):
        torch.cat([first, x[:, :, :1]], dim=2)
    assert torch.equal((old + 0)[:, :, -4:], x[:, :, 146:150])


def test_an_older_tensor_whose_tokens_cannot_come_back_raises():
    (k, _), x = growths()[0], tokens(200)
    old = torch.cat([k, x[:, :, :150]], dim=2)
    new = torch.cat([old, x[:, :, 150:]], dim=2)
    with pytest.raises(CacheStateError, match="at most 20 tokens can be rolled back"):
        torch.cat([old, x[:, :, :1]], dim=2)
    assert torch.equal((new + 0)[:, :, -4:], x[:, :, 196:])


def test_copies_grow_apart():
    (k, _), x = growths()[0], tokens(200)
    k = torch.cat([k, x[:, :, :100]], dim=2)
    stream = io.BytesIO()
    torch.save(k, stream)
    stream.seek(0)
    for other in (copy.deepcopy(k), torch.load(stream, weights_only=False)):
        theirs = torch.cat([other, x[:, :, 100:]], dim=2)
        assert torch.equal(theirs + 0, torch.cat([copy.deepcopy(k), x[:, :, 100:]], dim=2) + 0)
    ours = torch.cat([k, x[:, :, :1]], dim=2)
    assert ours.shape[2] == 101 and theirs.shape[2] == 200


def test_there_is_no_memory_to_hand_out():
    kv = growths()[0][0]
    with pytest.raises(CacheStateError, match=r"^layer 0 keys: codes are stored.*to_dlpack; dequantize\(\)"):
        torch.utils.dlpack.to_dlpack(kv)
    with pytest.raises(RuntimeError, match="data pointer"):  # what C++ code asks for
        torch._C._to_dlpack(kv)


@pytest.mark.parametrize("dims", ["BHND", "BNHD"])
@pytest.mark.parametrize("use", [Tensor.mean, Tensor.detach, lambda kv: torch.cat([kv, kv], 0), lambda kv: kv[..., 1:]])
@torch.no_grad()
def test_another_compiler_is_refused(dims, use):
    """What it traces has no codes: it would read memory that nobody wrote."""
    kv = torch.cat([growths()[0][0], tokens(100)], dim=2)
    kv = kv if dims == "BHND" else LaidOutGrowingKV(kv, dims)
    with pytest.raises(BackendCompilerFailed, match="was given to a compiler that does not know it") as error:
        torch.compile(use, backend="aot_eager")(kv)
    assert isinstance(error.value.inner_exception, CacheStateError)


def test_tokens_between_others_are_not_evicted():
    k = torch.cat([growths()[0][0], tokens(60)], dim=2)
    with pytest.raises(CacheStateError, match=r"^layer 0 keys: tokens of one quantized cache are put behind"):
        torch.cat([k[:, :, :4], k[:, :, -40:]], dim=2)
    assert torch.cat([k, tokens(1)], dim=2).shape[2] == 61
    exact, x = growths(EXACT)[0][0], tokens(60)
    exact = torch.cat([exact, x], dim=2)
    assert torch.equal(
        torch.cat([exact[:, :, :4], exact[:, :, -40:]], dim=2), torch.cat([x[:, :, :4], x[:, :, -40:]], 2)
    )


def test_writes_are_refused():
    k = torch.cat([growths()[0][0], tokens(9)], dim=2)
    for write in (
        lambda: k.zero_(),
        lambda: k[:, :, 3:4].copy_(tokens(1)),
        lambda: k.index_copy_(2, torch.tensor([3]), tokens(1)),
    ):
        with pytest.raises(UnsupportedWriteError):
            write()


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.zeros(2, 2, 1, 16), "layer 0 keys: this cache holds 1 row, the step has 2: make a cache for 2"),
        (tokens(1).bfloat16(), "layer 0 keys: this cache holds torch.float32, the step has torch.bfloat16"),
        (torch.zeros(1, 3, 1, 16), r"layer 0 keys: this cache is for \[1, 2, tokens, 16\], the step has \[1, 3"),
    ],
)
def test_other_tokens_than_those_stored(x, why):
    """One sentence, of eager code and of a compiled step; the cache goes on."""
    past = [torch.cat([t, tokens(30)], 2) for t in growths()[0]]
    torch._dynamo.reset()
    step = torch.compile(attend, backend=Rewrites(config=CONFIG))
    for run in (attend, step):
        with pytest.raises(CacheStateError, match=why), torch.no_grad():
            run(x, x, x, past)
    with torch.no_grad():
        _, past = step(*[tokens(1)] * 3, past)
    assert [t.shape[2] for t in past] == [31, 31] and all(isinstance(t, GrowingKV) for t in past)


def test_nothing_may_be_appended():
    k = torch.cat([growths()[0][0], tokens(9)], dim=2)
    for nothing in (tokens(0), torch.tensor([])):
        assert torch.equal(torch.cat([k, nothing], dim=2) + 0, k + 0)


def attend(q, k, v, past):
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return sdpa(q, k, v), (k, v)


def test_the_graph_returns_nothing_of_the_cache():
    seen = Rewrites(preset="kivi-2")
    step = torch.compile(attend, backend=seen)
    x = tokens(40)
    with torch.no_grad():
        _, past = step(x, x, x, (torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16)))
        assert not seen.made and all(isinstance(t, GrowingKV) for t in past)
        for _ in range(3):
            out, past = step(x[:, :, :1], x[:, :, :1], x[:, :, :1], past)
    (graph,) = seen.made
    assert count(graph, ops.DECODE) == 1 and count(graph, ops.STORE) == 2 and count(graph, torch.cat) == 0
    assert [t.shape[2] for t in past] == [43, 43]
    x = torch.cat([x, *[x[:, :, :1]] * 3], 2)  # 43 tokens: all in full precision yet
    torch.testing.assert_close(out, sdpa(x[:, :, :1], x, x), rtol=0, atol=1e-6)


def test_steps_of_any_number_of_tokens():
    """The count of new tokens is found in the program's inputs, some of which the passes drop."""
    step, known = torch.compile(attend, backend=Rewrites(config=EXACT)), tokens(30)
    past = [torch.cat([t, known], 2) for t in growths(EXACT)[0]]
    for seed, new in enumerate((1, 3, 2)):
        x = tokens(new, seed)
        known = torch.cat([known, x], 2)
        with torch.no_grad():
            out, past = step(x, x, x, past)
        torch.testing.assert_close(out, sdpa(x, known, known), rtol=0, atol=1e-6)
        assert [t.shape[2] for t in past] == [known.shape[2]] * 2


def test_two_caches_in_one_graph_keep_their_lengths():
    def both(x, mine, theirs):
        return attend(x, x, x, mine), attend(x, x, x, theirs)

    step, x, y = torch.compile(both, backend=Rewrites(config=EXACT)), tokens(30), tokens(50, seed=1)
    mine, theirs = ([torch.cat([t, z], 2) for t in growths(EXACT)[0]] for z in (x, y))
    new = tokens(1, seed=2)
    with torch.no_grad():
        (a, mine), (b, theirs) = step(new, mine, theirs)
    for out, past, known in ((a, mine, x), (b, theirs, y)):
        known = torch.cat([known, new], 2)
        assert past[0].shape[2] == known.shape[2]
        torch.testing.assert_close(out, sdpa(new, known, known), rtol=0, atol=1e-6)


def test_layers_of_one_cache_may_hold_different_numbers_of_tokens():
    """One of them was cropped alone: what hides the room behind the tokens is a mask of its own."""

    def both(x, lower, upper):
        return attend(x, x, x, lower), attend(x, x, x, upper)

    known, new = tokens(40), tokens(1, seed=2)
    pasts = [[torch.cat([t, known], 2) for t in layer] for layer in growths(layers=2)]  # all in full precision yet
    pasts[1] = [t[:, :, :37] for t in pasts[1]]
    with torch.no_grad():
        outs = torch.compile(both, backend=Rewrites(config=CONFIG), dynamic=True)(new, *pasts)
    for (out, past), length in zip(outs, (40, 37), strict=True):
        longer = torch.cat([known[:, :, :length], new], 2)
        assert past[0].shape[2] == length + 1
        torch.testing.assert_close(out, sdpa(new, longer, longer), rtol=0, atol=1e-6)


def test_a_layer_whose_past_begins_in_the_graph_stays_beside_quantized_ones():
    """As when a first prompt broke off between two layers of a DynamicCache."""

    def both(x, past):
        empty = torch.tensor([])
        return attend(x, x, x, past), attend(x, x, x, (empty, empty))

    known, new = tokens(30), tokens(1, seed=2)
    past = [torch.cat([t, known], 2) for t in growths(EXACT)[0]]
    with torch.no_grad():
        (a, past), (b, fresh) = torch.compile(both, backend=Rewrites(config=EXACT))(new, past)
    assert past[0].shape[2] == 31 and torch.equal(fresh[0], new)
    torch.testing.assert_close(a, sdpa(new, *[torch.cat([known, new], 2)] * 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(b, new, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def models():
    """A model compiled for each setting, by Inductor and op by op, and as it is."""
    plain = tiny("llama", num_hidden_layers=1)
    made = {}
    for name, config in (("exact", EXACT), ("kivi-2", XQuantConfig.preset("kivi-2"))):
        made[name] = copy.deepcopy(plain)
        made[name].compile(backend="xquant", options={"config": config})
    made["kivi-2, op by op"] = copy.deepcopy(plain)
    made["kivi-2, op by op"].compile(backend=interpreted(preset="kivi-2", self_check=False))
    made["op by op"] = copy.deepcopy(plain)
    made["op by op"].compile(backend=interpreted(config=EXACT, self_check=False))
    return plain, made


#: Kernels that Inductor makes for caches that grow are run by the test that names no ``way``, and in test_any_room.py.
WAYS = pytest.mark.parametrize("way", ["op by op", pytest.param("exact", marks=pytest.mark.slow)])


def prompt(rows: int = 1, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **more):
    return model.generate(ids, **{"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **more})


def test_generate_without_a_cache(models):
    """The one line: what ``generate()`` makes by itself is quantized, and one graph serves all decode steps."""
    plain, made = models
    torch._dynamo.reset()
    counters.clear()
    out = generate(made["exact"], prompt(), return_dict_in_generate=True)
    assert torch.equal(out.sequences, generate(plain, prompt()))
    assert counters["stats"]["unique_graphs"] == 1
    assert all(isinstance(layer.keys, GrowingKV) for layer in out.past_key_values.layers)
    again = generate(made["exact"], prompt(seed=1))
    assert torch.equal(again, generate(plain, prompt(seed=1))) and counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("way", ["kivi-2, op by op", pytest.param("kivi-2", marks=pytest.mark.slow)])
def test_generate_is_as_with_an_xquant_cache(models, way):
    """Of a padded prompt: the mask, too, becomes as long as the room."""
    plain, made = models
    torch._dynamo.reset()
    counters.clear()
    ids, config = prompt(length=200), XQuantConfig.preset("kivi-2")
    more = dict(attention_mask=torch.ones(1, 200, dtype=torch.int64), return_dict_in_generate=True, output_logits=True)
    more["attention_mask"][0, :7] = 0
    out = generate(made[way], ids, **more)
    cache = XQuantCache(plain.config, 512, config)
    want = generate(made[way], ids, past_key_values=cache, **more)
    assert torch.equal(out.sequences, want.sequences)
    assert counters["xquant"]["one_call"] == (2 if way == "kivi-2" else 0)
    assert not any("one by one" in name for name in counters["xquant"])
    torch.testing.assert_close(out.logits, want.logits, rtol=0, atol=2e-5)
    mine, theirs = memory_report(out.past_key_values), memory_report(cache)
    assert mine.parts | {"other": 0} == theirs.parts | {"other": 0}
    assert mine.full_bytes < theirs.full_bytes  # of the 205 tokens that it has


@WAYS
@pytest.mark.parametrize(
    "more", [dict(num_beams=3), pytest.param(dict(prompt_lookup_num_tokens=3), marks=pytest.mark.slow)]
)
def test_generate_in_other_ways(models, more, way):
    plain, made = models
    torch._dynamo.reset()
    ids = torch.cat([prompt()] * 2, 1)
    assert torch.equal(generate(made[way], ids, **more), generate(plain, ids, **more))


@WAYS
def test_rows_of_different_lengths(models, way):
    plain, made = models
    torch._dynamo.reset()
    ids, mask = prompt(2), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :7] = 0
    mine, theirs = (generate(m, ids * mask, attention_mask=mask) for m in (made[way], plain))
    assert torch.equal(mine, theirs)


@WAYS
def test_a_chat(models, way):
    """Turns of many tokens, past the room there is, a crop, and copies that go on apart."""
    plain, made = models
    torch._dynamo.reset()
    results = []
    for model in (made[way], plain):
        cache, logits = DynamicCache(config=plain.config), []

        def step(ids, model=model, logits=logits):
            with torch.no_grad():
                logits.append(model(ids, past_key_values=cache).logits[:, -1])  # noqa: B023

        for length in (100, 1, 1, 40, 1, 450, 1):
            step(prompt(length=length, seed=length))
        cache.crop(-3)
        step(prompt(length=1, seed=7))
        cache = copy.deepcopy(cache)
        step(prompt(length=1, seed=8))
        results.append(torch.stack(logits))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_rows_of_the_batch_stay_codes():
    """Selected, repeated, dropped: the same codes, in a cache of its own, and the old one goes on."""
    k = GrowingKV.of(Growth(layers_of(CONFIG, (2, *SHAPE[1:]), torch.float32)[0][0]))
    x = torch.randn(2, 2, 200, 16, generator=torch.Generator().manual_seed(0))
    k = torch.cat([k, x[:, :, :150]], dim=2)
    k.live.group.drop()  # a chunk just written is read in full precision until then
    before = k + 0
    for rows, made in (
        ([1, 0], k.index_select(0, torch.tensor([1, 0]))),
        ([1], k[torch.tensor([1]), ...]),
        ([1], k[torch.tensor([False, True])]),
        ([0, 0, 1, 1], k[torch.tensor([0, 0, 1, 1])]),
    ):
        assert isinstance(made, GrowingKV) and torch.equal(made + 0, before[rows])
        longer = torch.cat([made, x[rows, :, 150:]], dim=2)
        assert torch.equal(longer + 0, (torch.cat([copy.deepcopy(k), x[:, :, 150:]], dim=2) + 0)[rows])
    assert torch.equal(k + 0, before)


def test_threads_begin_caches_of_their_own():
    """One graph, many first steps at once: each thread's cache holds its own tokens."""
    step = torch.compile(attend, backend=Rewrites(config=EXACT))
    nothing = torch.zeros(1, 2, 0, 16)
    with torch.no_grad():
        step(*[tokens(40)] * 3, (nothing, nothing))

        def begin(seed: int) -> bool:
            x = tokens(40, seed)
            with torch.no_grad():
                return all(torch.equal(t + 0, x) for t in step(x, x, x, (nothing, nothing))[1])

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(begin, range(32)))

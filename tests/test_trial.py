"""Caches of transformers are quantized before their first step is traced, and become what they were if it is wrong."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from fast_and_slow import every_other, fast_but
from stepping import relative_error
from test_later_prompts import EMPTIES_IN_PLACE, OPTIONS, Run, graphs, ids_of, one
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from torch import Tensor
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantConfig
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.compiler import new_caches, trial, untraced
from xquant_fx.compiler.backend import xquant_backend
from xquant_fx.compiler.trial import Asked, Trial

KINDS = [StaticCache, DynamicCache]


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was decided of each cache that was tried."""
    found: list[Any] = []
    end = Trial.end

    def noting(self: Trial, *args: Any, **kwargs: Any) -> bool:
        decided = end(self, *args, **kwargs)
        found.append(decided)
        return decided

    monkeypatch.setattr(Trial, "end", noting)
    return found


def new(run: Run, kind: type, room: int = 64) -> Any:
    return DynamicCache(config=run.model.config) if kind is DynamicCache else StaticCache(run.model.config, room)


def sides(cache: Any) -> list[Tensor]:
    return [getattr(layer, side) for layer in cache.layers for side in ("keys", "values")]


def is_quantized(cache: Any) -> bool:
    return all(isinstance(x, STORED_KV) for x in sides(cache))


@torch.no_grad()
def prefilled(run: Run, kind: type, tokens: int = 20, room: int = 64) -> Any:
    """A cache that uncompiled code has filled, as ``generate()`` fills a static one."""
    run.model(ids_of(tokens), past_key_values=(cache := new(run, kind, room)))
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_caches_that_were_filled_elsewhere_are_stored_as_by_a_takeover(kind: type, ended: list[Any]) -> None:
    """The same codes and the same numbers; of graphs one for all caches, where a takeover is one more."""
    outs, caches = [], []
    for traced in (False, True):
        run = Run(traced=traced)
        for tokens in (20, 13):
            caches.append(cache := prefilled(run, kind, tokens))
            outs.append(torch.cat([run(one(), cache) for _ in range(6)], 1))
        # Dynamo traces a takeover once more for what grows: of other lengths.
        assert graphs() == 1 + traced * (1 + (kind is DynamicCache)) and ended == [True, True]
    for i in range(2):
        for mine, theirs in zip(sides(caches[i]), sides(caches[i + 2]), strict=True):
            assert mine.live.spec == theirs.live.spec
            assert relative_error(mine.dequantize(), theirs.dequantize()) < (1e-5 if kind is StaticCache else 0.05)
        # What takes over a cache that grows attends to what it held in full precision.
        assert relative_error(outs[i][:, 1:], outs[i + 2][:, 1:]) < (1e-6 if kind is StaticCache else 0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [20, 1])
def test_copies_of_a_prompt_are_quantized_before_their_turns(run: Run, kind: type, prefix: int) -> None:
    """A prefix that many questions share. The first question's graph says how; others have none."""
    held = new(run, kind)
    run(ids_of(prefix), held)
    for times in range(3):
        cache, before = copy.deepcopy(held), graphs()
        outs = [run(ids_of(11, seed=times), cache), *(run(one(), cache) for _ in range(3))]
        assert is_quantized(cache) and not is_quantized(held) and int(cache.get_seq_length()) == prefix + 14
        assert (graphs() > before) == (times == 0)
        with torch.no_grad():
            plain = copy.deepcopy(held)
            expected = [run.model(ids_of(11, seed=times), past_key_values=plain).logits]
            expected += [run.model(one(), past_key_values=plain).logits for _ in range(3)]
        assert relative_error(torch.cat(outs, 1), torch.cat(expected, 1)) < 0.2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_of_which_a_graph_leaves_a_layer_alone(run: Run, kind: type) -> None:
    """Their turns are traced, and leave it in full precision, too."""

    def call(ids: Tensor, past_key_values: Any) -> Tensor:
        out = run.model(ids, past_key_values=past_key_values).logits
        return out + past_key_values.layers[1].values.sum()

    step = torch.compile(call, backend=run.backend)
    step(ids_of(20), past_key_values=(first := new(run, kind)))
    for cache in (first, prefilled(run, kind), prefilled(run, kind)):
        step(ids_of(11), past_key_values=cache)
        assert isinstance(cache.layers[0].keys, STORED_KV) and type(cache.layers[1].values) is Tensor


@pytest.mark.parametrize("kind", fast_but(KINDS, KINDS[1:]))
def test_a_graph_break_between_layers(kind: type, ended: list[Any]) -> None:
    """The first graph has one layer of two: all become what they were, that step is exact, and the next takes over."""
    run = Run()
    run.model.model.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    held = prefilled(run, kind)
    for times in range(2):
        cache, plain = copy.deepcopy(held), copy.deepcopy(held)
        out = run(one(), cache)
        with torch.no_grad():
            expected = run.model(one(), past_key_values=plain).logits
        if not times:
            assert ended == [False]
            if kind is StaticCache:
                assert type(cache.layers[0].keys) is Tensor
                assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
        assert relative_error(out, expected) < 0.1
        run(one(), cache)
        assert is_quantized(cache) and int(cache.get_seq_length()) == 22
    assert ended == [False]  # none was tried again


def test_what_is_refused_becomes_what_it_was(run: Run, ended: list[Any]) -> None:
    """Values that are read for something else than attention, too."""
    for kind in KINDS:
        torch._dynamo.reset()
        ended.clear()
        cache = prefilled(run, kind)
        plain = copy.deepcopy(cache)

        def call(ids: Tensor, past_key_values: Any) -> Tensor:
            out = run.model(ids, past_key_values=past_key_values).logits
            return out + past_key_values.layers[1].values.sum()

        step = torch.compile(call, backend=run.backend)
        with torch.no_grad():
            out, expected = step(one(), past_key_values=cache), call(one(), past_key_values=plain)
        assert ended == [False] and relative_error(out, expected) < 1e-6
        assert all(type(x) is Tensor for x in sides(cache))
        for mine, theirs in zip(sides(cache), sides(plain), strict=True):
            assert torch.equal(mine[:, :, :20], theirs[:, :, :20]) and relative_error(mine, theirs) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_failed_leaves_the_cache_as_it_was(run: Run, kind: type, ended: list[Any], monkeypatch: Any) -> None:
    cache = prefilled(run, kind)
    plain = copy.deepcopy(cache)
    buffers = sides(cache)
    with monkeypatch.context() as failing, pytest.raises(Exception, match="on purpose"):
        failing.setattr(trial, "detect_in", lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
        run(one(), cache)
    assert ended == [False]
    assert all(a is b for a, b in zip(sides(cache), buffers, strict=True))
    assert all(torch.equal(*pair) for pair in zip(sides(cache), sides(plain), strict=True))
    run(one(), cache)
    assert is_quantized(cache) and int(cache.get_seq_length()) == 21


def test_strict_raises_and_changes_nothing(ended: list[Any]) -> None:
    run = Run(strict=True, **OPTIONS)
    cache = prefilled(run, StaticCache)
    plain = copy.deepcopy(cache)

    def call(ids: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        return run.model(ids, past_key_values=cache).logits, cache.layers[1].keys + 1

    step = torch.compile(call, backend=run.backend)
    with pytest.raises(Exception, match="strict=True"), torch.no_grad():
        step(one(), cache)
    assert ended == [False] and all(torch.equal(*pair) for pair in zip(sides(cache), sides(plain), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_where_torch_lets_the_step_run_uncompiled(run: Run, kind: type, ended: list[Any]) -> None:
    """Nothing is read or stored quantized: uncompiled code that gets to the cache finds it as it was."""
    cache = prefilled(run, kind)
    plain = copy.deepcopy(cache)
    uncompiled = torch._dynamo.disable(run.model.forward)
    run.call = torch.compile(
        lambda ids, past_key_values: uncompiled(ids, past_key_values=past_key_values),
        backend=run.backend,
    )
    for ids in (ids_of(8), one()):
        out = run(ids, cache)
        with torch.no_grad():
            assert torch.equal(out, run.model(ids, past_key_values=plain).logits)
        assert all(type(x) is Tensor for x in sides(cache)) and not graphs()
        assert all(torch.equal(*pair) for pair in zip(sides(cache), sides(plain), strict=True))
    assert ended == [False] and int(cache.get_seq_length()) == 29


def begun_anew(cache: Any) -> None:
    cache.reset()


def rows_turned(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def two_less(cache: Any) -> None:
    for layer in cache.layers:
        layer.crop(-2) if hasattr(layer, "crop") else None


def copied(cache: Any) -> Any:
    return copy.deepcopy(cache)


@pytest.mark.parametrize(
    ("kind", "change", "is_compiled"), every_other(KINDS, [begun_anew, rows_turned, two_less, copied], [True, False])
)
@torch.no_grad()
def test_what_the_function_does_to_the_cache_first(run: Run, kind: type, change: Any, is_compiled: bool) -> None:
    """Before the step: the cache is then what it would be if nothing had been tried."""
    if (change, EMPTIES_IN_PLACE) == (begun_anew, True):
        pytest.skip("transformers 5.17 writes zeros to what a DynamicCache holds")

    def call(ids: Tensor, cache: Any) -> Tensor:
        return run.model(ids, past_key_values=change(cache) or cache).logits

    cache = new(run, kind)
    run.model(ids_of(20, 2), past_key_values=cache)
    plain = copy.deepcopy(cache)
    uncompiled = torch._dynamo.disable(call)
    step = torch.compile(call if is_compiled else lambda ids, cache: uncompiled(ids, cache), backend=run.backend)
    for _ in range(2):
        out, expected = step(one(2), cache), call(one(2), plain)
        assert relative_error(out, expected) < (0.1 if is_compiled else 1e-6)
        assert int(cache.get_seq_length()) == int(plain.get_seq_length())
        for mine, theirs in zip(sides(cache), sides(plain), strict=True):
            mine = mine.dequantize() if isinstance(mine, STORED_KV) else mine
            assert mine.shape == theirs.shape and relative_error(mine, theirs) < (0.3 if is_compiled else 1e-6)


@torch.no_grad()
def test_functions_that_do_no_step(run: Run) -> None:
    """One that empties the cache, and one that returns what it holds, uncompiled: as tensors of their own."""
    if not EMPTIES_IN_PLACE:
        cache = prefilled(run, DynamicCache)
        torch.compile(lambda ids, cache: cache.reset(), backend=run.backend)(one(), cache)
        assert cache.get_seq_length() == 0
    held = torch._dynamo.disable(lambda cache: cache.layers[0].keys)
    for kind in KINDS:
        cache = prefilled(run, kind)
        plain = copy.deepcopy(cache)
        keys = torch.compile(lambda ids, cache: held(cache), backend=run.backend)(one(), cache)
        assert type(keys) is type(cache.layers[0].keys) is Tensor
        assert torch.equal(keys, plain.layers[0].keys) and torch.equal(cache.layers[0].keys, keys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_that_fails_in_its_graph_may_be_taken_again(run: Run, kind: type) -> None:
    cache = prefilled(run, kind)
    plain = copy.deepcopy(cache)
    with pytest.raises((IndexError, RuntimeError)):
        run(one() + 1000, cache)
    assert all(torch.equal(*pair) for pair in zip(sides(cache), sides(plain), strict=True))
    run(one(), cache), run(one(), cache)
    assert is_quantized(cache) and int(cache.get_seq_length()) == 22


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_first_step_that_fails_behind_its_appends_is_forgotten(run: Run, kind: type) -> None:
    """The layers of a static cache have counted its token by then; one that grows goes on from the tensors it holds."""

    def call(ids: Tensor, cache: Any, at: Tensor) -> Tensor:
        return run.model(ids, past_key_values=cache).logits.index_select(2, at)

    run = Run(config=XQuantConfig.preset("full"))
    step = torch.compile(call, backend=run.backend)
    cache = prefilled(run, kind)
    plain = copy.deepcopy(cache)
    with pytest.raises((IndexError, RuntimeError)):
        step(one(), cache, torch.tensor([1000]))
    assert int(cache.get_seq_length()) == 20
    if kind is StaticCache:
        assert all(torch.equal(*pair) for pair in zip(sides(cache), sides(plain), strict=True))
    got = torch.cat([step(one(), cache, torch.arange(60)) for _ in range(2)], 1)
    assert is_quantized(cache) and int(cache.get_seq_length()) == 22
    expected = torch.cat([run.model(one(), past_key_values=plain).logits[..., :60] for _ in range(2)], 1)
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("kind", fast_but(KINDS, KINDS[:1]))
def test_queries_that_were_noted_are_there_for_a_takeover(run: Run, kind: type, ended: list[Any]) -> None:
    run.model.model.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    run(ids_of(30), cache := new(run, kind))
    run(one(), cache), run(one(), cache)
    assert ended == [False] and is_quantized(cache)
    assert all(bool(layer.keys.live.owned["energy"].any()) for layer in cache.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_wrapper_around_a_function_that_has_graphs(run: Run, kind: type, ended: list[Any]) -> None:
    """Dynamo keeps them with the code: nobody is asked again."""
    for _ in range(3):
        call = torch.compile(run.model.forward, backend=run.backend)
        cache = prefilled(run, kind)
        with torch.no_grad():
            call(one(), past_key_values=cache), call(one(), past_key_values=cache)
        assert is_quantized(cache) and int(cache.get_seq_length()) == 22
    assert all(ended) and len(ended) == 3


def test_buffers_that_somebody_sees_are_not_tried(run: Run, ended: list[Any]) -> None:
    cache = prefilled(run, StaticCache)
    seen = cache.layers[1].values[:, :, :4]
    run(one(), cache)
    assert not ended and type(cache.layers[1].values) is Tensor
    del seen
    cache = prefilled(run, StaticCache)
    cache.layers[0].keys[:, :, 30] = 1  # behind what it holds
    run(one(), cache)
    assert not ended and type(cache.layers[0].keys) is Tensor


def test_what_is_not_tried(run: Run, ended: list[Any]) -> None:
    """A chunk has no graph that could be judged; other dtypes are not quantized; steps for other rows must be wrong."""
    with pytest.raises(Exception, match="size"):
        run(one(3), prefilled(run, DynamicCache))
    cache = prefilled(run, StaticCache)
    run(ids_of(12), cache)
    assert not ended and is_quantized(cache)  # by a takeover
    run.model.double()
    run(one(), cache := prefilled(run, DynamicCache))
    assert not ended and not is_quantized(cache)


def test_caches_that_stay_as_they_are_are_looked_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by one of the functions that are given them."""
    looked: list[Any] = []
    begin = new_caches.begin_trial
    monkeypatch.setattr(new_caches, "begin_trial", lambda *args: (looked.append(args[0]), begin(*args))[1])
    run.model.double()
    cache = prefilled(run, StaticCache)
    for _ in range(3):
        run(one(), cache)
    other = torch.compile(
        lambda ids, past_key_values: run.model(ids, past_key_values=past_key_values), backend=run.backend
    )
    with torch.no_grad():
        other(one(), cache)
    assert len(looked) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_compiled_one_by_one_are_not_tried(run: Run, kind: type, ended: list[Any]) -> None:
    """Each is given the cache of all."""
    for layer in run.model.model.layers:
        layer.compile(backend=run.backend)
    cache = prefilled(run, kind)
    with torch.no_grad():
        for _ in range(3):
            run.model(one(), past_key_values=cache)
    assert not ended and is_quantized(cache)


def test_tokens_whose_keys_are_zeros(run: Run, ended: list[Any]) -> None:
    """Of what grows they are tokens like others; in a buffer they may be no tokens at all."""
    for kind in KINDS:
        cache = prefilled(run, kind)
        cache.layers[0].keys[:, :, 3] = 0
        run(one(), cache)
    assert ended == [True] and is_quantized(cache)


def test_options_of_the_compiled_function_are_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Asked] = []
    monkeypatch.setattr(new_caches, "begin_trial", lambda cache, rows, asked, known: seen.append(asked))
    monkeypatch.setattr(untraced, "_backends", [])
    untraced.leave_prompts_untraced(xquant_backend, lambda mode, options: Asked((mode, options)))  # type: ignore[arg-type]
    for more in ({}, dict(options={"preset": "xquant"}), dict(mode="max-autotune-no-cudagraphs")):
        torch._dynamo.reset()
        call = torch.compile(run.model.forward, backend=xquant_backend, **more)
        cache = prefilled(run, StaticCache)
        with pytest.raises(IndexError), torch.no_grad():
            call(one() + 1000, past_key_values=cache)
        assert seen.pop().request == (more.get("mode"), more.get("options"))


@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_ranked_by_the_queries_of_the_prompt(run: Run, kind: type) -> None:
    """Rows are selected behind the prompt, which makes other tensors of a cache that grows."""
    run(ids_of(30).expand(2, -1), cache := new(run, kind))
    cache.reorder_cache(torch.tensor([1, 0]))
    run(one(2), cache)
    assert is_quantized(cache) and all(bool(layer.keys.live.owned["energy"].any()) for layer in cache.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_of_padded_prompts_has_one_graph(run: Run, kind: type) -> None:
    """Masks are longer at each step: Dynamo would take the first for one of a fixed length."""
    run.model.compile(backend=run.backend)
    for tokens in (20, 12, 31):
        ids, mask = ids_of(tokens, 2), torch.ones(2, tokens, dtype=torch.long)
        mask[0, :5] = 0
        cache = new(run, kind)
        run.model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert graphs() == 1 and is_quantized(cache) and int(cache.get_seq_length()) == tokens + 5


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_in_case_is_let_go(run: Run, kind: type) -> None:
    cache = prefilled(run, kind)
    kept = [weakref.ref(x.untyped_storage()) for x in sides(cache)] if kind is DynamicCache else []
    memory = [x.untyped_storage()._cdata for x in sides(cache)]
    run(one(), cache)
    gc.collect()
    assert is_quantized(cache) and memory and not any(ref() is not None for ref in kept)
    assert not new_caches._untouched


def test_prompts_of_caches_that_grow(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones are traced, so that one layer at a time is in full precision; and all, where nothing is quantized."""
    monkeypatch.setattr(new_caches, "MOST_TOKENS", 30)
    run(ids_of(31), cache := new(run, DynamicCache))
    assert graphs() == 1 and is_quantized(cache)
    run(ids_of(30), cache := new(run, DynamicCache))
    assert graphs() == 1 and is_quantized(cache)  # it is known by now

    plain = Run()
    plain(ids_of(30), cache := new(plain, DynamicCache))
    assert not graphs() and not is_quantized(cache)
    plain.model.double()
    plain(one(), cache := prefilled(plain, DynamicCache))


def test_scores_of_texts(run: Run) -> None:
    """Prompts without any step are compiled in the end, and known then."""
    made = []
    for tokens in range(20, 24 + new_caches.MANY_PROMPTS):
        run(ids_of(tokens), cache := new(run, DynamicCache))
        made.append(graphs())
    assert made[: new_caches.MANY_PROMPTS] == [0] * new_caches.MANY_PROMPTS and made[-1] == 1 and is_quantized(cache)


def test_16_bits_are_exact() -> None:
    """Whatever way a cache takes: in full precision, none of them shows."""
    for kind in KINDS:
        run = Run(config=XQuantConfig.preset("full"))
        for by_model in (True, False):
            cache, plain = new(run, kind), new(run, kind)
            with torch.no_grad():
                first = run.model.forward if by_model else run.call
                outs = [first(ids_of(20), past_key_values=cache).logits]
                expected = [run.model(ids_of(20), past_key_values=plain).logits]
                for ids in (one(), ids_of(11), one(), one()):
                    outs.append(run(ids, cache))
                    expected.append(run.model(ids, past_key_values=plain).logits)
            assert is_quantized(cache) and relative_error(torch.cat(outs, 1), torch.cat(expected, 1)) < 1e-6

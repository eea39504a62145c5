"""Prompts of new ``DynamicCache``s are stored as a compiled function's first one was, and not traced any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamo_graphs import SMALL
from numeric import seeded
from stepping import interpreted, relative_error
from test_sliding_windows import LOW, WINDOW, model_of
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.later_prompts import LaterPrompt
from xquant_fx.compiler import untraced

OPTIONS = dict(preset="xquant-2.2", k_group_size=4, residual_length=4)
#: Whether ``reset()`` writes zeros to what a ``DynamicCache`` holds, as transformers 5.17 has it.
EMPTIES_IN_PLACE = "reset" not in vars(DynamicLayer)


def ids_of(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=seeded(tokens + seed))


def one(batch: int = 1) -> Tensor:
    return torch.ones(batch, 1, dtype=torch.long)


def graphs() -> int:
    """That Dynamo has made."""
    return counters["stats"]["unique_graphs"]


class Run:
    """A model that a backend compiles which leaves prompts untraced."""

    def __init__(self, model: Any = None, traced: bool = False, **options: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = model or LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
        self.backend = interpreted(self_check=False, **(options or OPTIONS))
        if not traced:
            untraced.leave_prompts_untraced(self.backend, self.backend.asked)
        self.call = torch.compile(self.model.forward, backend=self.backend)
        counters.clear()

    def cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
        return self.call(ids, past_key_values=cache, **kwargs).logits

    def first_prompt(self, tokens: int = 20) -> None:
        """From which all others are known, and two steps behind it."""
        cache = self.cache()
        self(ids_of(tokens), cache), self(one(), cache), self(one(), cache)


@pytest.fixture
def run() -> Run:
    made = Run()
    made.first_prompt()
    return made


def stored(cache: DynamicCache) -> dict[str, Tensor]:
    sides = [(i, side) for i in range(len(cache.layers)) for side in ("keys", "values")]
    tensors = {(i, side): getattr(cache.layers[i], side).live.tensors for i, side in sides}
    return {f"{i} {side} {name}": x for (i, side), of in tensors.items() for name, x in of.items() if x is not None}


def both(make: Callable[[bool], Run], prompts: tuple[int, ...]) -> None:
    """Prompts and steps behind them, untraced and traced: the same numbers, the same codes."""
    outs, caches = [], []
    for traced in (False, True):
        run, logits, of_prompts = make(traced), list[Tensor](), 0
        run.first_prompt()
        for tokens in prompts:
            caches.append(cache := run.cache())
            before = graphs()
            logits.append(run(ids_of(tokens), cache))
            of_prompts += graphs() - before
            logits += [run(one(), cache), run(one(), cache)]
        outs.append(logits)
        assert bool(of_prompts) == traced
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))
    for mine, theirs in zip(caches[: len(prompts)], caches[len(prompts) :], strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        mine, theirs = stored(mine), stored(theirs)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_they_are_stored_as_traced_ones() -> None:
    """Ranks have seen the queries, pairs of layers share codes; prompts that need more room than the first one, too."""
    both(lambda traced: Run(traced=traced), (20, 37, 9, 600))
    shared = dict(preset="xquant", k_group_size=4, residual_length=4)
    both(lambda traced: Run(traced=traced, **shared), (33,))


def test_sliding_windows_are_stored_as_traced_ones() -> None:
    """Shorter than the window, longer, and past the room; beside a layer of all tokens."""
    model = model_of("Mistral", num_hidden_layers=2)
    both(lambda traced: Run(model, traced, config=LOW), (WINDOW // 2, WINDOW + 9, 5 * WINDOW))
    hybrid = model_of("Gemma3Text")
    both(lambda traced: Run(hybrid, traced, config=LOW), (WINDOW + 9,))


def test_nothing_is_traced_again(run: Run) -> None:
    """Of any number of tokens, in new caches and in reset ones, whose layers are new again."""
    before = graphs()
    for tokens in (11, 30, 11):
        run(ids_of(tokens), cache := run.cache()), run(one(), cache)
        assert cache.get_seq_length() == tokens + 1 and isinstance(cache.layers[1].values, GrowingKV)
        if not EMPTIES_IN_PLACE:
            cache.reset()
            run(ids_of(tokens + 2), cache), run(one(), cache)
            assert cache.get_seq_length() == tokens + 3 and isinstance(cache.layers[1].values, GrowingKV)
    assert graphs() == before


def test_caches_that_make_their_layers_later(run: Run) -> None:
    """Steps of ``DynamicCache()`` have a graph of their own, as Dynamo sees how layers are made."""
    for graphs_of_steps in (1, 0):
        before, cache = graphs(), DynamicCache()
        run(ids_of(11), cache)
        assert graphs() == before and len(cache.layers) == 2 and isinstance(cache.layers[1].values, GrowingKV)
        run(one(), cache), run(one(), cache)
        assert graphs() == before + graphs_of_steps and cache.get_seq_length() == 13


def test_generate_traces_no_prompt() -> None:
    run = Run()
    run.model.compile(backend=run.backend)
    made = []
    for tokens in (20, 12, 9):
        run.model.generate(ids_of(tokens), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        made.append(graphs())
    assert made[0] == made[1] == made[2] == 1


def test_another_batch_is_known(run: Run) -> None:
    cache, before = run.cache(), graphs()
    out = run(ids_of(14, batch=3), cache)
    assert graphs() == before and isinstance(cache.layers[0].keys, GrowingKV)
    with torch.no_grad():
        expected = run.model(ids_of(14, batch=3)).logits
    assert relative_error(out, expected) < 1e-5
    run(one(3), cache)
    assert cache.layers[0].keys.shape[:3] == (3, 2, 15)


def test_other_models_are_stored_by_the_same_plan() -> None:
    """Of other dtypes, heads and head_dims, in a function that takes any model of as many layers."""
    run = Run()
    models = [run.model]
    for more in (dict(num_key_value_heads=4), dict(head_dim=16), {}):
        models.append(LlamaForCausalLM(LlamaConfig(**{**SMALL, **more})).eval())
    models[-1].bfloat16()
    call = torch.compile(lambda model, ids, cache: model(ids, past_key_values=cache).logits, backend=run.backend)
    with torch.no_grad():
        for model in models:
            cache, before = DynamicCache(config=model.config), graphs()
            out = call(model, ids_of(20), cache)
            assert graphs() == before
            is_known = model is not run.model  # from the first one's step
            assert all(isinstance(layer.values, GrowingKV) == is_known for layer in cache.layers)
            assert cache.layers[0].keys.dtype == model.dtype
            assert relative_error(out, model(ids_of(20)).logits) < (1e-5 if model.dtype == torch.float32 else 0.02)
            call(model, one(), cache), call(model, one(), cache)
            assert cache.get_seq_length() == 22 and isinstance(cache.layers[1].keys, GrowingKV)


def test_what_settings_are_not_for_stays_in_full_precision() -> None:
    """Groups of 8 channels, and head_dim 12."""
    run = Run(preset="xquant", k_group_size=4, residual_length=4, v_group_size=8)
    other = LlamaForCausalLM(LlamaConfig(**{**SMALL, "head_dim": 12})).eval()
    call = torch.compile(lambda model, ids, cache: model(ids, past_key_values=cache).logits, backend=run.backend)
    with torch.no_grad():
        call(run.model, ids_of(20), run.cache())
        cache = DynamicCache(config=other.config)
        out = call(other, ids_of(20), cache)
        assert type(cache.layers[0].keys) is type(cache.layers[1].values) is Tensor
        assert relative_error(out, other(ids_of(20)).logits) < 1e-5


def test_two_caches_of_one_call_are_traced() -> None:
    """As guidance has them: both are quantized."""
    run = Run()

    def guided(ids: Tensor, cache: Any, other: Any) -> Tensor:
        return run.model(ids, past_key_values=cache).logits - run.model(ids.flip(1), past_key_values=other).logits

    call = torch.compile(guided, backend=run.backend)
    with torch.no_grad():
        for _ in range(2):
            caches = run.cache(), run.cache()
            call(ids_of(20), *caches), call(one(), *caches)
            assert all(isinstance(cache.layers[1].keys, GrowingKV) for cache in caches)


def test_layers_that_were_made_for_nothing_go() -> None:
    """In a cache that makes its layers one by one: of a model that has fewer, and of a prompt that failed."""
    run = Run()
    fewer = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    call = torch.compile(lambda model, ids, cache: model(ids, past_key_values=cache).logits, backend=run.backend)
    with torch.no_grad():
        call(run.model, ids_of(20), DynamicCache())
        call(fewer, ids_of(20), cache := DynamicCache())
        assert len(cache.layers) == 1 and isinstance(cache.layers[0].keys, GrowingKV) and cache.is_initialized
        call(run.model, ids_of(20), DynamicCache())
        with pytest.raises(IndexError):
            call(run.model, ids_of(20) + 1000, cache := DynamicCache())
        assert not cache.layers


def test_gradients_are_not_quantized(run: Run) -> None:
    cache, before = run.cache(), graphs()
    run.call(ids_of(12), past_key_values=cache)
    assert type(cache.layers[0].keys) is Tensor and graphs() > before


def test_a_compiled_loop_is_found_out(run: Run) -> None:
    """It is known from a call that was one prompt; a call that is more than that runs uncompiled once."""

    def several(ids: Tensor, past_key_values: Any, times: int) -> Tensor:
        for _ in range(times):
            out = run.model(ids, past_key_values=past_key_values).logits
        return out

    call = torch.compile(several, backend=run.backend)
    with torch.no_grad():
        call(ids_of(20), run.cache(), 1)
        for is_traced in (False, True):
            before, cache = graphs(), run.cache()
            call(ids_of(20), cache, 2)
            assert cache.get_seq_length() == 40 and (graphs() > before) == is_traced


def test_layers_are_their_own_again(run: Run) -> None:
    """Also behind a prompt that failed, which is no reason to trace the next; and what failed leaves no tokens."""
    cache = run.cache()
    with pytest.raises(IndexError):
        run(ids_of(5) + 1000, cache)
    assert all("update" not in vars(layer) for layer in cache.layers) and cache.get_seq_length() == 0
    before = graphs()
    run(ids_of(5), cache)
    assert all("update" not in vars(layer) for layer in cache.layers) and cache.get_seq_length() == 5
    assert graphs() == before


def test_layers_that_are_not_quantized_stay_so() -> None:
    """A plan may leave some in full precision at 16 bits, and a window may be too short."""
    hybrid = model_of("Gemma3Text")
    run = Run(hybrid, preset="xquant-2.2")
    run.first_prompt()
    before, cache = graphs(), run.cache()
    run(ids_of(WINDOW + 9), cache)
    assert graphs() == before
    assert type(cache.layers[0].keys) is Tensor and isinstance(cache.layers[1].keys, GrowingKV)


def test_other_caches_are_traced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other functions, subclasses, and such as record what leaves a window."""
    monkeypatch.setattr(LaterPrompt, "__init__", None)

    class Mine(DynamicCache):
        pass

    run(ids_of(12), Mine(config=run.model.config))
    other = torch.compile(lambda ids, cache: run.model(ids, past_key_values=cache).logits, backend=run.backend)
    with torch.no_grad():
        other(ids_of(12), run.cache())
    recorded = model_of("Mistral", num_hidden_layers=1)
    mistral = Run(recorded, config=LOW)
    mistral.first_prompt()
    cache = mistral.cache()
    cache.activate_past_recording()
    mistral(ids_of(12), cache)

"""Threads and one cache: they may take turns with it, in any order, and are told if they step through it at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from stepping import interpreted, logits_of, relative_error

from xquant_fx import CacheStateError, XQuantCache, XQuantConfig
from xquant_fx.compiler.backend import compile_graph
from xquant_fx.compiler.options import parse

CONFIG = XQuantConfig.preset("xquant-1bit").replace(k_group_size=8, residual_length=16)
IDS = torch.randint(1, 128, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    return tiny_llama(layers=2)


def filled(model: Any) -> XQuantCache:
    """20 tokens in it."""
    cache = XQuantCache(model.config, 64, CONFIG)
    logits_of(model.forward, IDS[:1, :20], cache)
    return cache


class Pause:
    """Called by the other thread, it waits there until it is let go; later calls pass."""

    def __init__(self) -> None:
        self.reached, self.go, self.armed = threading.Event(), threading.Event(), False

    def __call__(self, *_: Any) -> None:
        if self.armed and threading.current_thread() is not threading.main_thread() and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(60)


def meanwhile(pause: Pause, step: Callable[[], Any], here: Callable[[], None]) -> Any:
    """What ``step`` gives, which runs in a thread; ``here`` runs while it pauses."""
    pause.armed = True
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(step)
        try:
            assert pause.reached.wait(60)
            here()
        finally:
            pause.go.set()
        return there.result()


def test_in_the_middle_of_an_eager_step_another_thread_is_told(model: Any) -> None:
    """And changes nothing: the step that was there first is right."""
    cache, pause = filled(model), Pause()
    hook = model.model.layers[1].register_forward_pre_hook(pause)
    want = logits_of(model.forward, IDS[:1, 20:21], filled(model))

    def here() -> None:
        with pytest.raises(CacheStateError, match=r"^layer 0 holds 21 keys, layer 1 20: two threads.*cache.fork\(\)"):
            logits_of(model.forward, IDS[1:, :1], cache)

    got = meanwhile(pause, lambda: logits_of(model.forward, IDS[:1, 20:21], cache), here)
    assert torch.equal(got, want) and {state.length for state in cache.states} == {21}
    hook.remove()
    logits_of(model.forward, IDS[:1, 21:22], cache)


def test_a_step_whose_positions_are_old_is_told(model: Any) -> None:
    """It made its positions and its mask, then another thread stepped. From then on nobody goes on, but after crop."""
    cache, pause = filled(model), Pause()
    hook = model.model.layers[0].register_forward_pre_hook(pause)
    with pytest.raises(CacheStateError, match="two threads stepped through this cache at once"):
        meanwhile(
            pause,
            lambda: logits_of(model.forward, IDS[1:, :1], cache),
            lambda: logits_of(model.forward, IDS[:1, 20:21], cache),
        )
    hook.remove()
    with pytest.raises(CacheStateError, match=r"two threads.*reset\(\) empties it"):
        logits_of(model.forward, IDS[:1, 21:22], cache)
    cache.crop(20 - int(cache.get_seq_length()))
    want = logits_of(model.forward, IDS[:1, 20:21], filled(model))
    assert torch.equal(logits_of(model.forward, IDS[:1, 20:21], cache), want)


def test_two_compiled_steps_at_once(tiny_llama: Any) -> None:
    """Both are told: the second one at once, the first one at its end."""
    model, pause = tiny_llama(layers=1), Pause()

    class Pausing(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if "decode_attention" in str(n.target):
                pause()
            return super().run_node(n)

    def backend(gm: Any, inputs: Any, **_: Any) -> Any:
        return compile_graph(gm, inputs, parse(None, None), lambda graph, *_: lambda *args: Pausing(graph).run(*args))

    step, cache, other = torch.compile(model.forward, backend=backend, dynamic=False), filled(model), filled(model)
    logits_of(step, IDS[:1, 20:21], cache)

    def here() -> None:
        with pytest.raises(CacheStateError, match="two threads"):
            logits_of(step, IDS[1:, :1], cache)
        logits_of(step, IDS[:1, 20:21], other)  # which is nobody else's

    with pytest.raises(CacheStateError, match="two threads"):
        meanwhile(pause, lambda: logits_of(step, IDS[:1, 21:22], cache), here)
    assert {state.length for state in other.states} == {21}
    with pytest.raises(CacheStateError, match="two threads"):
        logits_of(step, IDS[:1, 22:23], cache)
    cache.reset()
    logits_of(model.forward, IDS[:1, :20], cache)
    logits_of(step, IDS[:1, 20:21], cache)


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_may_take_turns(model: Any, compiled: bool) -> None:
    """As a server's pool runs steps; one breaks off, and is taken back elsewhere; a copy is another cache."""
    step = torch.compile(model.forward, backend=interpreted(), dynamic=False) if compiled else model.forward
    cache, twin = filled(model), filled(model)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:

        def in_turn(at: int, cache: XQuantCache) -> Any:
            return (one, two)[at % 2].submit(logits_of, step, IDS[:1, at : at + 1], cache)

        got = torch.cat([in_turn(at, cache).result() for at in range(20, 26)], 1)
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.submit(logits_of, model.forward, IDS[:1, :1], cache).result()
        hook.remove()
        cache.crop(-1)
        got = torch.cat([got, *(in_turn(at, cache).result() for at in (27, 28)), in_turn(29, cache.fork()).result()], 1)
    at = [*range(20, 26), 27, 28, 29]
    want = torch.cat([logits_of(model.forward, IDS[:1, t : t + 1], twin) for t in at], 1)
    assert relative_error(got, want) < 1e-5


def test_a_thread_for_each_stage(model: Any) -> None:
    """Layers of one step may run in different threads, one after the other."""
    cache, (k, v) = filled(model), torch.randn(2, 1, 2, 1, 16)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two, torch.no_grad():
        for _ in range(3):
            cache.get_mask_sizes(1, 0)
            one.submit(cache.update, k, v, 0).result()
            two.submit(cache.update, k, v, 1).result()
    assert {state.length for state in cache.states} == {23}


def test_uncompiled_steps_while_another_thread_compiles(model: Any) -> None:
    """torch's flag "is compiling" is one for all threads: what an eager prompt leaves must not depend on it."""
    config = XQuantConfig(k_group_size=8, residual_length=16)
    model.set_attn_implementation("eager")  # with sdpa transformers asks for the flag, too, and makes another mask

    def eager() -> dict[str, torch.Tensor]:
        cache = XQuantCache(model.config, 64, config)
        logits_of(model.forward, IDS[:1, :39], cache)
        logits_of(model.forward, IDS[:1, 39:], cache)
        return cache.state_dict()

    want, got = eager(), {}

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            got.update(pool.submit(eager).result())
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)

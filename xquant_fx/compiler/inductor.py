"""How our graphs go through Inductor: its settings, and what keeps a first step short.

A first step of 30 layers would be 25 s of Python, and half as much of C++ compilers. So equal layers are compiled once
(``layers.py``). What Inductor would ask a compiler for later, with Python waiting, is asked for at once, in the
background (``begin``), and no garbage is looked for.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from xquant_fx.cache.stacked import stored_in
from xquant_fx.compiler.any_room import OfAnyRoom, rooms_of
from xquant_fx.compiler.cache_key import cache_key_patch
from xquant_fx.compiler.chunks import has_chunk, is_known_chunk
from xquant_fx.compiler.index_checks import checks_behind_indices
from xquant_fx.compiler.inductor_options import in_force
from xquant_fx.compiler.kept_steps import are_expected, place_of
from xquant_fx.compiler.layers import compile_layers, restored_layers
from xquant_fx.compiler.layers_in_turn import compile_in_turn
from xquant_fx.compiler.loop_splits import whole_loops
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.tracing_time import wait_for_hashes
from xquant_fx.kernels.cpu.any_room import compiled_for
from xquant_fx.kernels.cpu.one_call import switched
from xquant_fx.passes.graph import make_fake_inputs, named_once

#: For graphs with a quantized cache on a CPU: what takes time there and changes nothing in the code of a step.
CPU_SETTINGS: dict[str, Any] = {
    "graph_partition": False,  # for CUDA graphs
    "benchmark_harness": False,  # code that would run the graph alone, on random inputs
    "max_fusion_buffer_group_pairwise_attempts": 16,  # of 64: readers of a buffer further apart are in other layers
}


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python's cyclic garbage collector is off inside, in the whole process.

    A compilation makes a million objects that stay, and each full collection looks at all of them: a tenth of its
    time. What it leaves in cycles goes once Dynamo is through (``tracing_time.py``), or with a collection afterwards.
    """
    was_on = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()


def begin(inputs: list[Any]) -> None:
    """Where kernels of ours are going to be compiled, find out in the background what that takes."""
    if not are_expected() and any(_is_on_cpu(each) for each in stored_in(inputs)):
        from xquant_fx.kernels.cpu.build import begin_probes  # brings in Inductor's compiler

        begin_probes()


def _is_on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def compile_by_inductor(
    gm: GraphModule, inputs: list[Any], request: Request, settings: str | None
) -> Callable[..., Any] | None:
    """Inductor's function for ``gm``; ``settings`` is what the key of its caches has to hold besides the graph.

    Without ``settings`` there is nothing of ours in the graph, which Inductor compiles as if we were not there, but for
    faults of its C++ that are mended. None where the program's graph is to run as it stands (``chunks.py``).
    """
    with in_force(request.inductor):
        return _compile(gm, inputs, request, settings)


def _compile(gm: GraphModule, inputs: list[Any], request: Request, settings: str | None) -> Callable[..., Any] | None:
    on_cpu = all(_is_on_cpu(each) or not isinstance(each, Tensor) for each in inputs)
    rooms = rooms_of(gm.graph.find_nodes(op="placeholder"))
    if settings is not None and on_cpu and has_chunk(gm.graph, known_too=rooms is not None):
        return None
    one_call = "one_call" not in request.disable
    patches = _patches(request, settings, on_cpu)
    if settings is not None:
        inputs = [named_once(each) for each in inputs]
        if rooms is not None:
            patches["size_asserts"] = False  # of inputs that may have another room
    by_layers = settings is not None and on_cpu and one_call
    in_turn = by_layers and is_known_chunk(gm.graph)
    place = place_of(gm.graph, inputs, patches) if by_layers and not in_turn else None
    if place and (restored := restored_layers(gm, inputs, place)):
        return restored if rooms is None else OfAnyRoom(restored, lambda: True)  # no others are kept
    make_fake_inputs(gm.graph, inputs)
    with switched(one_call), _mended(), compiled_for(rooms):
        compile_one = _compile_one(patches)
        made = None
        if in_turn:
            made = compile_in_turn(gm, inputs, compile_one)
        elif by_layers:
            made = compile_layers(gm, inputs, compile_one, place)
        compiled: Any = made or compile_one(gm, inputs)
    return compiled if rooms is None else OfAnyRoom(compiled, rooms.are_open)


@contextlib.contextmanager
def _mended() -> Iterator[None]:
    """Inside, Inductor writes no C++ of which we know that it is wrong."""
    with checks_behind_indices(), whole_loops():
        yield


def _patches(request: Request, settings: str | None, on_cpu: bool) -> dict[str, Any]:
    """What Inductor's config has for one graph: ours, where the program did not ask for something else."""
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options

    usual = dict(list_mode_options(request.mode)) if request.mode not in (None, "default") else {}
    if settings is not None:
        # A step's loops are short: of 512 numbers a second thread starts later than the first is through with all.
        usual["cpp.min_chunk_size"] = max(inductor_config.cpp.min_chunk_size, 4096)
        usual |= CPU_SETTINGS if on_cpu else {}
    asked = {name for name, _ in request.inductor}
    patches = {name: value for name, value in usual.items() if name not in asked}
    return patches if settings is None else patches | cache_key_patch(settings)


def _compile_one(patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor, which is imported here and not before: not where a step is restored."""
    wait_for_hashes()
    from torch._inductor.compile_fx import compile_fx

    import xquant_fx.kernels.lowerings  # noqa: F401  (registers them)

    return functools.partial(compile_fx, config_patches=patches or None)

"""What Dynamo works out again for each instruction and each node while it traces, worked out once.

- settings that each instruction, node or guard asks Dynamo's config for;
- classes that ``VariableBuilder._wrap`` makes for each value, and leaves as garbage;
- what operations give for fake tensors that look like those of another layer (``fake_values.py``);
- the text of a frame, in the stack trace of each node: most frames are those of the node before (``frame_texts.py``);
- whether a file is one of ``torch.nn.modules``, whose frames the stack trace leaves out;
- the frames above the trace, which each message about a changed object shows, shown or not;
- names of functions, for which source files are read and which only logs show that are off;
- the code of a module of all nodes, which is made to look for asserts and never run;
- ``torch.distributed``'s tensors, which are imported to ask whether a function is one of theirs;
- how long guards take with nothing in the processor's caches, which are emptied for it: 0.03 s a graph, for a log;
- lengths of caches: those that are equal are one symbol, where each of 60 tensors had its own (0.8 of 4 s);
- numbers like a norm's epsilon, attributes of modules, under ``dynamic=True``: constants until one changes, as they are
  without it; each was an input, and the model traced three times to find which of them cannot be one;
- numbers of tokens that sliding windows count: Dynamo leaves them open from the first step on, and not once it has
  traced one for a number and found another in the next.

The trace is the same but for these symbols and constants. Relied on: how ``symbolic_convert``, ``output_graph``,
``side_effects``, ``guards`` and ``builder`` name these, that Dynamo's config is a module of a class of its own that
looks up what it does not have itself, that a function keeps the builtins its globals had when it was made, and that
``_automatic_dynamic`` returns a list of ``DimDynamic``. Checked on torch 2.11, 2.13 and 2.14, the lengths on the
first two alone; what is not there is left out.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch._dynamo import config, guards, output_graph, side_effects, symbolic_convert, utils
from torch._dynamo.variables import builder, higher_order_ops
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.symbolic_shapes import DimDynamic

from xquant_fx.cache.growing import STORED_KV
from xquant_fx.compiler.fake_values import remembering
from xquant_fx.compiler.frame_texts import traceback_of_one_trace

#: Loggers of ``TORCH_LOGS=trace_call`` and ``trace_source``, which show names of functions.
_NAMING_LOGS = ("output_graph.__trace_call", "symbolic_convert.__trace_call", "symbolic_convert.__trace_source")
#: That of ``TORCH_LOGS=guards``, which shows how long guards take.
_GUARDS_LOG = ("guards.__guards",)
#: Where ``torch.distributed``'s ``local_map`` is, and who asks whether a function is its.
_OF_LOCAL_MAP = "torch.distributed.tensor.experimental._func_map"
LocalMap = vars(higher_order_ops).get("LocalMapWrappedHigherOrderVariable")

#: Settings that are asked for thousands of times in a trace.
_SETTINGS = (
    "verbose", "nested_graph_breaks", "use_graph_deduplication", "track_nodes_for_deduplication",
    "skip_tensor_guards_with_matching_dict_tags", "enable_faithful_generator_behavior",
    "max_saved_pointers_for_recursive_dict_tags_check", "skip_nnmodule_hook_guards", "rewrite_assert_with_torch_assert",
    "_unsafe_skip_fsdp_module_guards", "trace_numpy", "dont_skip_tracing", "dynamo_profiler", "issue_3_13_0_warning",
)  # fmt: skip

#: Sources of what ``StaticSlidingWindowLayer`` and ``DynamicSlidingWindowLayer`` of transformers count in.
_COUNTERS = r".*\.cumulative_length(_int)?$"


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Inside, Dynamo takes them."""
    translator = symbolic_convert.InstructionTranslatorBase
    replaced: list[tuple[Any, str, Any]] = [
        (output_graph, "traceback", traceback_of_one_trace()),
        (output_graph, "fx", SimpleNamespace(**{**vars(torch.fx), "GraphModule": _GraphModule})),
        (translator, "is_co_filename_from_nn_modules", _is_of_nn_modules),
    ]
    if isinstance(wrap := vars(builder.VariableBuilder).get("_wrap"), FunctionType):
        replaced.append((builder.VariableBuilder, "_wrap", _with_classes_once(wrap)))
    if (number_of := vars(builder.VariableBuilder).get("wrap_symfloat")) is not None:
        replaced.append((builder.VariableBuilder, "wrap_symfloat", _constant_in_modules(number_of)))
    if (context_of := vars(builder).get("_automatic_dynamic")) is not None:
        replaced.append((builder, "_automatic_dynamic", _with_one_length(context_of)))
    if (is_local_map := vars(LocalMap or object).get("should_wrap_in_hop")) is not None:
        replaced.append((LocalMap, "should_wrap_in_hop", _without_import(is_local_map)))
    if (frames_above := vars(side_effects).get("get_stack_above_dynamo")) is not None:
        replaced.append((side_effects, "get_stack_above_dynamo", functools.cache(frames_above)))
    if (value_of := vars(utils).get("_get_fake_value_impl")) is not None and _values_may_repeat():
        replaced.append((utils, "_get_fake_value_impl", remembering(value_of)))
    if not _shown(_NAMING_LOGS):
        replaced.append((symbolic_convert, "get_funcname", _no_name))
    if not _shown(_GUARDS_LOG):
        replaced.append((guards, "profile_guard_manager", _time_of_guards))
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(_counters_open())
        stack.enter_context(_settings_at_hand())
        yield


@contextlib.contextmanager
def _counters_open() -> Iterator[None]:
    """Inside, _COUNTERS are symbols, unless the program wants no number to become one by itself."""
    by_itself = config.automatic_dynamic_shapes and config.assume_static_by_default
    settings: Any = torch.compiler.config
    if not by_itself or not hasattr(settings, "dynamic_sources"):
        yield
        return
    with settings.patch(dynamic_sources=",".join(filter(None, (settings.dynamic_sources, _COUNTERS)))):
        yield


@contextlib.contextmanager
def _settings_at_hand() -> Iterator[None]:
    """Inside, ``_SETTINGS`` are attributes of the config, until somebody sets them: to all threads, which Dynamo lets
    trace one by one, those of this one."""
    kept, kind = vars(config), type(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of settings that a newer torch is about to drop
        at_hand = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}

    def set_one(self: Any, name: str, value: object) -> None:
        kept.pop(name, None)
        super(kind, self).__setattr__(name, value)

    kept.update(at_hand)
    kind.__setattr__ = set_one  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del kind.__setattr__
        for name in at_hand:
            kept.pop(name, None)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    if before is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Lazily(type):
    """Of a class whose instances are torch's graph modules, made as Dynamo's last one is: with code when it is run."""

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.fx.GraphModule:
        return _make_graph_module(*args, **kwargs)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch.fx.GraphModule)


class _GraphModule(metaclass=_Lazily):
    """In the place of ``torch.fx.GraphModule``, of which Dynamo makes one of all nodes to look for asserts."""


def _without_import(is_local_map: Any) -> Any:
    """Dynamo's question whether a function is ``local_map``'s, which imports that for it: 0.1 s."""

    def asked(cls: type, value: object) -> bool:
        return _OF_LOCAL_MAP in sys.modules and is_local_map.__get__(None, cls)(value)

    return classmethod(asked)


@functools.cache
def _is_file_of_nn_modules(name: str) -> bool:
    return re.match(r".*torch/nn/modules.*", name) is not None


def _is_of_nn_modules(self: Any) -> bool:
    return _is_file_of_nn_modules(getattr(self.f_code, "co_filename", "<unknown>"))


def _constant_in_modules(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's function for a float, for which those of modules are constants first, as their ints are."""

    def wrapped(self: Any, value: float) -> Any:
        if config.assume_static_by_default or not self.source.guard_source.is_unspecialized_nn_module():
            return wrap(self, value)
        with config.patch(assume_static_by_default=True):
            return wrap(self, value)

    return wrapped


def _with_one_length(context_of: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's function that says which sizes of a tensor are open, for which those of equal length have one symbol.

    As sizes that Dynamo leaves open by itself have. Not sliding windows: when they are full, they are shorter.
    """

    def context(e: Any, *args: Any, **kwargs: Any) -> Any:
        found = context_of(e, *args, **kwargs)
        if isinstance(e, STORED_KV) and not (e.spec.window or getattr(e, "is_tail", False)):
            _share(found, getattr(e, "token_dim", 2))
        return found

    return context


def _share(found: Any, dim: int | None) -> None:
    """Have a size that Dynamo leaves open by itself, and nobody's mark does, share a symbol."""
    if dim is None or found.dynamic_sizes[dim] is not DimDynamic.DYNAMIC:
        return
    constraint = found.constraint_sizes[dim]
    if constraint is None or getattr(constraint, "warn_only", False):
        found.dynamic_sizes[dim], found.constraint_sizes[dim] = DimDynamic.DUCK, None


def _values_may_repeat() -> bool:
    """Not where Dynamo asks what each node writes to, nor where torch's cache of fake values is off, or checked."""
    asks = config.use_graph_deduplication or config.track_nodes_for_deduplication
    return config.fake_tensor_cache_enabled and not (asks or config.fake_tensor_cache_crosscheck_enabled)


def _shown(logs: Iterable[str]) -> bool:
    return any(logging.getLogger(f"torch._dynamo.{name}").isEnabledFor(logging.DEBUG) for name in logs)


def _time_of_guards(root: Any, scope: Any, times: int) -> float:
    """Microseconds, for Dynamo's metrics: as often as it wants to know, but with what the caches hold."""
    begin = time.perf_counter()
    for _ in range(times):
        root.check(scope)
    return (time.perf_counter() - begin) / times * 1e6


def _no_name(filename: str, lineno: int) -> None:
    """In the place of Dynamo's ``get_funcname``, which splits a whole file into tokens."""


@functools.cache
def _with_classes_once(function: FunctionType) -> FunctionType:
    """``function``, which finds the classes that it defines made by its first call."""
    made: dict[CodeType, Any] = {}

    def build_class(body: FunctionType, *args: Any, **kwargs: Any) -> Any:
        if body.__code__ not in made:
            made[body.__code__] = builtins.__build_class__(body, *args, **kwargs)
        return made[body.__code__]

    names = function.__globals__
    before = names["__builtins__"]
    names["__builtins__"] = {**vars(builtins), "__build_class__": build_class}  # which a function keeps from its start
    try:
        parts = (function.__name__, function.__defaults__, function.__closure__)
        return FunctionType(function.__code__, names, *parts)
    finally:
        names["__builtins__"] = before

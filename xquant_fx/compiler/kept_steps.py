"""What a graph of equal layers was compiled to, kept on disk: a later process neither imports Inductor nor asks it.

Inductor's own caches spare it the compilation, too, but not 0.4 s of imports, 0.4 of hashing torch's sources, the
preprocessor, and a look for each part of a graph. A kept step is found by all that these caches look at: the graph with
the layouts of its tensors, configs of Inductor and AOTAutograd, our sources, versions, and the processor. What has no
stable text is not kept: ops that somebody registered, passes that somebody gave Inductor without a uuid.

Relied on: ``save_config_portable`` and ``get_hash`` of torch's config modules, ``_get_qualified_name``, and where
Inductor's caches are. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import _get_qualified_name

from xquant_fx.compiler.open_numbers import known_of
from xquant_fx.compiler.repeats import compared, described_value
from xquant_fx.kernels.cpu.kept_call import folder, machine
from xquant_fx.passes.find_writes import is_opaque
from xquant_fx.passes.trace import fake

#: Ops whose bodies change with the versions of torch or of this package only.
_NAMESPACES = ("aten", "prims", "xquant")
_MODULES = ("torch", "_operator", "operator", "math", "builtins")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)
#: Passes of a user, which Inductor leaves out of the values of its config.
_PASSES = (
    "pre_grad_custom_pass", "post_grad_custom_post_pass", "joint_custom_pre_pass", "joint_custom_post_pass",
    "_pre_fusion_custom_pass", "_fuse_ddp_communication_passes",
)  # fmt: skip


class NotKeptError(Exception):
    """Something has no text that is the same in another process whenever it does the same."""


def are_expected() -> bool:
    """Whether there are any: then what only a compilation needs can wait until there is one."""
    return _wanted() and folder().is_dir()


def place_of(graph: Graph, inputs: Sequence[Any], patches: Mapping[str, Any]) -> Path | None:
    """The file that keeps the step which ``graph`` becomes under these ``patches`` of Inductor's config, or is to."""
    if not _wanted():
        return None
    try:
        text = repr((_surroundings(patches), _inputs(graph, inputs), _graph(graph)))
    except NotKeptError:
        return None
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _wanted() -> bool:
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    caches = config.fx_graph_cache and functorch_config.enable_autograd_cache
    return bool(caches) and not config.force_disable_caches and not torch.is_autocast_enabled("cpu")


def _surroundings(patches: Mapping[str, Any]) -> tuple[Any, ...]:
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch.compiler import config as compiler_config

    values = config.save_config_portable(ignore_private_configs=False)  # a hash misses what was changed in its place
    values |= {name: getattr(config, name, None) for name in _PASSES}
    settings = {name: _setting(value) for name, value in {**values, **patches}.items()}
    switches = (
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        getattr(torch.utils.deterministic, "fill_uninitialized_memory", None), torch.backends.mkldnn.enabled,
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), compiler_config.cache_key_tag,
    )  # fmt: skip
    return sorted(settings.items()), switches, functorch_config.get_hash(), machine()


def _setting(value: Any) -> Any:
    """A value of a config; of a pass its uuid, since its text says nothing of what it does."""
    if isinstance(value, tuple | list):
        return [_setting(each) for each in value]
    if callable(value):
        value = value.uuid() if hasattr(value, "uuid") else None
        if value is None:
            raise NotKeptError
    return repr(value)


def _inputs(graph: Graph, values: Sequence[Any]) -> list[Any]:
    """Layouts of ``values``, and which of them lie in one storage: AOTAutograd looks at both; numbers by name."""
    nodes, storages = graph.find_nodes(op="placeholder"), dict[int, int]()
    names, known = _numbers(values)
    found: list[Any] = [known]
    for i, (node, value) in enumerate(zip(nodes, values, strict=True)):
        if isinstance(value, torch.SymInt):
            found.append(names[value.node.expr])
        else:
            place = storages.setdefault(_plain(value).untyped_storage().data_ptr(), i)
            found.append((_layout(node, value, names), value.storage_offset(), value.dtype, value.device, place))
    return found


def _numbers(values: Sequence[Any]) -> tuple[dict[Any, Symbol], list[str]]:
    """What each number among ``values`` is called, and what is known of them: their ranges, what Dynamo guards on.

    Numbers that are one have one name. How large they are does not matter.
    """
    given = [value.node for value in values if isinstance(value, torch.SymInt)]
    if not given:
        return {}, []
    names, env = dict[Any, Symbol](), given[0].shape_env
    for node in given:
        if not node.expr.is_symbol:
            raise NotKeptError
        names.setdefault(node.expr, Symbol(f"n{len(names)}"))
    return names, known_of(env, names)


def _layout(node: Node, value: Tensor, names: Mapping[Any, Symbol]) -> list[Any]:
    """Sizes and strides, those that differ from step to step by names."""
    seen, real = fake(node), (*value.shape, *value.stride())
    known = real if seen is None else (*seen.shape, *seen.stride())
    return [_size(a, names) if isinstance(a, torch.SymInt) else b for a, b in zip(known, real, strict=True)]


def _size(size: torch.SymInt, names: Mapping[Any, Symbol]) -> str:
    expr = size.node.expr
    if not expr.free_symbols <= names.keys():
        raise NotKeptError
    return str(expr.xreplace(names))


def _plain(value: Any) -> Tensor:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        raise NotKeptError
    if value.is_conj() or value.is_neg():
        raise NotKeptError
    return cast(Tensor, value)


def _graph(graph: Graph) -> list[Any]:
    numbers: dict[Node, int] = {}
    lines = []

    def name(operand: Node) -> str:
        return f"%{numbers[operand]}"

    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") or is_opaque(node):
            raise NotKeptError
        target = "" if node.op in ("placeholder", "output") else _target(node.target)
        given = compared(node.args, name, _text), compared(node.kwargs, name, _text)
        lines.append((node.op, target, given, described_value(node)))
        numbers[node] = len(numbers)
    return lines


def _target(target: Any) -> str:
    if isinstance(target, str):  # a method
        return target
    if isinstance(target, OpOverload):
        name = f"torch.ops.{target}"
    else:
        try:
            name = _get_qualified_name(target)
        except (RuntimeError, AttributeError) as error:
            raise NotKeptError from error
    module, *rest = name.split(".")
    if module not in _MODULES or (rest[0] == "ops" and rest[1] not in _NAMESPACES):
        raise NotKeptError
    return name


def _text(value: Any) -> tuple[str, str]:
    if type(value) in _PLAIN or value is Ellipsis:
        return type(value).__name__, repr(value)
    raise NotKeptError

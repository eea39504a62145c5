"""The ops that the pass inserts: schemas and their traceable bodies. Registered at import.

They are CompositeImplicitAutograd: AOTAutograd takes them apart into plain torch ops in place, and
Inductor generates C++ or Triton from those. All state is passed in, one tensor per argument. What the
arguments are, ``kernels/*/arguments.py`` says; schemas come from there. Nothing here knows of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.at_hand import are_wanted
from xquant_fx.kernels.decode_attention import cpu_call as cpu_attention
from xquant_fx.kernels.decode_attention import plain_torch as plain_attention
from xquant_fx.kernels.decode_attention import triton_launch as triton_attention
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.linear_rows import cpu_call as cpu_linear
from xquant_fx.kernels.linear_rows import plain_torch as plain_linear
from xquant_fx.kernels.linear_rows.arguments import SCHEMA as LINEAR_SCHEMA
from xquant_fx.kernels.linear_rows.arguments import LinearArguments
from xquant_fx.kernels.quantize_store import cpu_call as cpu_store
from xquant_fx.kernels.quantize_store import plain_torch as plain_store
from xquant_fx.kernels.quantize_store import triton_launch as triton_store
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.kernels.quantize_store.both_arguments import BOTH, BothArguments
from xquant_fx.kernels.rotation import rotate_values
from xquant_fx.kernels.rows import row_of
from xquant_fx.kernels.shared_code_load import cpu_call as cpu_load
from xquant_fx.kernels.shared_code_load import plain_torch as plain_load
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.triton_host import has_triton
from xquant_fx.tracing import is_traced, is_watched

_lib = torch.library.Library("xquant", "DEF")
_lib.define("rotate_values(Tensor x, bool back) -> Tensor")
for _schema in (
    StoreArguments.schema("quantize_store", OWN),
    StoreArguments.schema("quantize_store.borrowed", BORROWED),
    StoreArguments.schema("append_cpu", OWN),
    StoreArguments.schema("append_cpu.borrowed", BORROWED),
    *(BothArguments.schema(f"quantize_store_both{name and '.'}{name}", each) for name, each in BOTH.items()),
    LoadArguments.schema("shared_code_load", returns="Tensor"),
    DecodeArguments.schema("decode_attention", returns="Tensor"),
    DecodeArguments.schema("decode_attention_cpu", returns="Tensor"),
    LINEAR_SCHEMA,
):
    _lib.define(_schema)

LONG_CHUNK = 256  # tokens from which on an uncompiled chunk has a kernel

STORE = torch.ops.xquant.quantize_store.default
STORE_BORROWED = torch.ops.xquant.quantize_store.borrowed
#: By ``BothArguments.overload``.
STORE_BOTH = {name: getattr(torch.ops.xquant.quantize_store_both, name or "default") for name in BOTH}
LOAD = torch.ops.xquant.shared_code_load.default
APPEND_CPU = torch.ops.xquant.append_cpu.default
APPEND_CPU_BORROWED = torch.ops.xquant.append_cpu.borrowed
DECODE = torch.ops.xquant.decode_attention.default
DECODE_CPU = torch.ops.xquant.decode_attention_cpu.default
ROTATE = torch.ops.xquant.rotate_values.default
LINEAR_ROWS = torch.ops.xquant.linear_rows.default


class Kernel(NamedTuple):
    """A faster way than plain torch, on one type of device."""

    run: Callable[[Any], Any]
    """Takes the op's arguments."""
    applies: Callable[[Tensor], bool]
    """Whether there is one for this input, which is on the device."""
    why_not: Callable[[Any], str] = lambda a: ""
    """Why not for these arguments, in words; "" if it takes them."""


def _append_cpu(a: StoreArguments) -> None:
    a.replace(x=a.x.to(a.quantized.ring.dtype)).call(APPEND_CPU, APPEND_CPU_BORROWED)


def _is_triton_here(x: Tensor) -> bool:
    return has_triton()


def _attend_cpu(a: DecodeArguments) -> Tensor:
    return DECODE_CPU(**a._asdict()) if is_watched(a.q, a.mask, a.sink_logits) else cpu_attention.attend(a)


#: Device type to the kernel that appends a step of up to STEP_TOKENS tokens there. On the CPU only compiled code
#: has one: eager code has no compiler to wait for, but in many steps (``cache/uncompiled.py``).
STEP_KERNELS = {
    "cpu": Kernel(_append_cpu, is_traced),
    "cuda": Kernel(triton_store.append, _is_triton_here, triton_store.why_not),
}

#: Device type to the kernel that appends a step of both sides there. On the CPU a call costs next to nothing.
BOTH_KERNELS = {
    "cuda": Kernel(triton_store.append_both, _is_triton_here, triton_store.why_not_both),
}

#: Device type to the kernel that attends straight to the codes there.
DECODE_KERNELS = {
    "cpu": Kernel(_attend_cpu, lambda x: True),
    "cuda": Kernel(
        lambda a: triton_attention.decode_attention(**a._asdict()), _is_triton_here, triton_attention.why_not
    ),
}


def _run(kernels: Mapping[str, Kernel], x: Tensor, a: Any, otherwise: Callable[[Any], Any]) -> Any:
    """By the kernel of the device of ``x``, or ``otherwise``; that a kernel does not take ``a`` is counted."""
    kernel = kernels.get(x.device.type)
    if kernel is None or not kernel.applies(x):
        return otherwise(a)
    reason = kernel.why_not(a)
    if reason:
        from torch._dynamo.utils import counters  # imports Dynamo

        counters["xquant"][f"plain torch: {reason}"] += 1
    return otherwise(a) if reason else kernel.run(a)


def append_uncompiled(a: StoreArguments) -> None:
    """Store tokens by the CPU's kernel, in eager code."""
    cpu_store.run(a.replace(x=a.x.to(a.quantized.ring.dtype)))


def _is_worth_waiting(x: Tensor) -> bool:
    """Whether an uncompiled chunk takes plain torch so long that its kernel is built, if it was not yet; in a compiled
    model each does, whose steps have the same kernel."""
    return not is_traced(x) and (x.shape[2] >= LONG_CHUNK or are_wanted())


#: Device type to the kernel that appends longer chunks there, in uncompiled code. A graph has plain torch, which
#: Inductor compiles.
CHUNK_KERNELS = {
    "cpu": Kernel(append_uncompiled, _is_worth_waiting, cpu_store.why_no_chunk),
}


def quantize_store(*args: Any, **kwargs: Any) -> None:
    """Store tokens and quantize those that are due; ``fit`` (overload ``borrowed``) for borrowed codes."""
    _store(StoreArguments(*args, **kwargs))


def _is_step(a: StoreArguments) -> bool:
    new = a.x.shape[2]
    return isinstance(new, int) and new <= STEP_TOKENS


def _is_known_chunk(a: StoreArguments) -> bool:
    """Whether a graph for CPUs has a kernel for a longer chunk, as one for a step: plain torch would be as much to
    compile as all else of a layer."""
    is_known = isinstance(a.x.shape[2], int) and a.length.dim() == 1
    return a.x.device.type == "cpu" and is_known and is_traced(a.x) and not cpu_store.why_no_chunk(a)


def _store(a: StoreArguments) -> None:
    if a.bits == 16:
        _store_rows(plain_store.store_full, a)
    elif _is_step(a):
        _run(STEP_KERNELS, a.x, a, _store_plainly)
    elif _is_known_chunk(a):
        _append_cpu(a)
    else:
        _store_rows(lambda row: _run(CHUNK_KERNELS, row.x, row, plain_store.store), a)


def _store_rows(store: Callable[[StoreArguments], None], a: StoreArguments) -> None:
    """By ``store``, which takes a batch of one length: rows with positions of their own one after the other."""
    if a.length.dim() == 1:
        store(a)
        return
    begins = (a.pos[:, :1] == 0) & (a.length[:, :1] < a.max_len)
    a.length.masked_fill_(begins, 0)
    for row in range(a.x.shape[0]):
        store(row_of(a, row))


def _store_plainly(a: StoreArguments) -> None:
    _store_rows(plain_store.store, a)


def quantize_store_both(*args: Any, **kwargs: Any) -> None:
    """``quantize_store`` of up to STEP_TOKENS keys and of their values, below 16 bits: one after the other, or in one
    launch."""
    a = BothArguments(*args, **kwargs)
    kernel = BOTH_KERNELS.get(a.k_x.device.type)
    if kernel is not None and kernel.applies(a.k_x) and not kernel.why_not(a):
        kernel.run(a)
        return
    for side in a.sides:
        _run(STEP_KERNELS, side.x, side, _store_plainly)


def shared_code_load(*args: Any, **kwargs: Any) -> Tensor:
    """Dequantized [B, H, n, D] as attention sees it in a step of ``new_tokens`` after ``past`` (int64 [1] or [B])."""
    a = LoadArguments(*args, **kwargs)
    rows = a.past.shape[0]
    return _load(a) if rows == 1 else torch.cat([_load(row_of(a, row)) for row in range(rows)])


def _load(a: LoadArguments) -> Tensor:
    """A batch of one length, in uncompiled code on a CPU by a kernel."""
    out = cpu_load.dequantized(a)
    return plain_load.load(a) if out is None else out


def decode_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention of a step's queries [B, heads, q, D] to a quantized cache, straight from the codes.

    Tokens past the last one written count as zeros, as in the static buffer that this replaces, unless the mask
    leaves them out. A chunk of more than STEP_TOKENS tokens passes its keys and values as ``k_new`` and ``v_new``,
    and the rings as they were before it.
    """
    a = DecodeArguments(*args, **kwargs)
    return _run(DECODE_KERNELS, a.q, a, _attend_plainly)


def _attend_plainly(a: DecodeArguments) -> Tensor:
    """Rows with lengths of their own one after the other."""
    rows = a.past.shape[0]
    return plain_attention.attend(a) if rows == 1 else torch.cat([_attend_plainly(row_of(a, i)) for i in range(rows)])


def linear_rows(*args: Any, **kwargs: Any) -> Tensor:
    """Linear layers of up to 8 rows, ``x`` [..., in]; summed in float32, rounded once, one behind the other."""
    return plain_linear.linear(LinearArguments(*args, **kwargs))


_lib.impl("rotate_values", rotate_values, "CompositeImplicitAutograd")
_lib.impl("linear_rows", linear_rows, "CompositeExplicitAutograd")
_lib.impl("linear_rows", cpu_linear.run_cpu, "CPU")
_lib.impl("linear_rows", cpu_linear.empty_output, "Meta")
_lib.impl("decode_attention", decode_attention, "CompositeImplicitAutograd")
_lib.impl("decode_attention_cpu", cpu_attention.run_cpu, "CPU")
_lib.impl("decode_attention_cpu", cpu_attention.empty_output, "Meta")
_lib.impl("shared_code_load", shared_code_load, "CompositeImplicitAutograd")
for _name in BOTH:
    _lib.impl(f"quantize_store_both{_name and '.'}{_name}", quantize_store_both, "CompositeImplicitAutograd")
for _overload in ("", ".borrowed"):
    _lib.impl(f"quantize_store{_overload}", quantize_store, "CompositeImplicitAutograd")
    _lib.impl(f"append_cpu{_overload}", cpu_store.run_cpu, "CPU")
    _lib.impl(f"append_cpu{_overload}", cpu_store.no_output, "Meta")

"""The ops that the pass inserts: schemas and their traceable bodies. Registered at import.

They are CompositeImplicitAutograd: AOTAutograd takes them apart into plain torch ops in place, and
Inductor generates C++ or Triton from those. All state is passed in, one tensor an argument.

Common arguments (see ``KVSpec`` for the shapes of the state tensors):
    x           new keys or values [B, H, q, D]
    pos         int64 [q], consecutive positions; the first is the number of tokens stored so far
    codes       int32 words, or for 16 bits the tensor itself
    start       int64 [B], first token of each sequence that is not padding
    fault       int32 [1], set to a code of ``faults.FAULTS`` when positions do not follow
    length      int64 [2], tokens stored and the furthest token ever stored; updated
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from xquant_fx.kernels.decode_attention import arguments as attention_kernel
from xquant_fx.kernels.decode_attention import triton_launch as triton_attention
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store import cpu_call as append_kernel
from xquant_fx.kernels.quantize_store import plain_torch as store_kernel
from xquant_fx.kernels.quantize_store import triton_launch as triton_store
from xquant_fx.kernels.shared_code_load import plain_torch as load_kernel
from xquant_fx.tracing import is_traced

_STATE = "Tensor(b!)? scale, Tensor(c!)? zero, Tensor(d!)? ring, Tensor(e!)? sink"
_META = "Tensor start, Tensor(f!) length, Tensor(g!) fault"
_STATIC = "str side, int bits, int group_size, int residual_length, float eta, int sink_tokens, int max_len"

_lib = torch.library.Library("xquant", "DEF")
_lib.define(f"quantize_store(Tensor x, Tensor pos, Tensor(a!) codes, {_STATE}, {_META}, {_STATIC}) -> ()")
_lib.define(
    f"quantize_store.borrowed(Tensor x, Tensor pos, Tensor codes, {_STATE}, {_META}, {_STATIC}, *, str fit) -> ()"
)
_lib.define(
    "shared_code_load(Tensor codes, Tensor? scale, Tensor? zero, Tensor? ring, Tensor? sink, Tensor start, "
    "Tensor past, SymInt new_tokens, SymInt n, str side, int bits, int group_size, int residual_length, *, "
    "Tensor? x=None) -> Tensor"
)
_lib.define(f"append_cpu(Tensor x, Tensor pos, Tensor(a!) codes, {_STATE}, {_META}, {_STATIC}) -> ()")
_lib.define(
    f"append_cpu.borrowed(Tensor x, Tensor pos, Tensor codes, {_STATE}, {_META}, {_STATIC}, *, str fit) -> ()"
)

_SIDES = ", ".join(
    f"Tensor {side}_codes, Tensor {side}_scale, Tensor {side}_zero, Tensor {side}_ring, Tensor? {side}_sink"
    for side in ("k", "v")
)
_DECODE = (
    f"(Tensor q, {_SIDES}, Tensor start, Tensor past, Tensor? mask, Tensor? sink_logits, int new_tokens, int max_len, "
    "int k_bits, int k_group, int v_bits, int v_group, int residual_length, float scale, float softcap, int window, "
    "Tensor? k_new=None, Tensor? v_new=None) "
    "-> Tensor"
)
_lib.define("decode_attention" + _DECODE)
_lib.define("decode_attention_cpu" + _DECODE)


def quantize_store(
    x: Tensor, pos: Tensor, codes: Tensor, scale: Tensor | None, zero: Tensor | None, ring: Tensor | None,
    sink: Tensor | None, start: Tensor, length: Tensor, fault: Tensor, side: str, bits: int, group_size: int,
    residual_length: int, eta: float, sink_tokens: int, max_len: int, *, fit: str | None = None,
) -> None:
    """Store tokens and quantize those that are due; ``fit`` (overload ``borrowed``) for borrowed codes."""
    if bits == 16:
        store_kernel.store_full(x, pos, codes, length, fault, max_len)
        return
    assert scale is not None and zero is not None and ring is not None
    tensors = (codes, scale, zero, ring, sink, start, length, fault)
    static = (side, bits, group_size, residual_length, eta, sink_tokens, max_len)
    if triton_store.applies(x):
        triton_store.append(x, pos, *tensors, *static, fit)
        return
    new = x.shape[2]
    if x.device.type == "cpu" and isinstance(new, int) and new <= STEP_TOKENS and is_traced(x):
        # Compiled, a step's append is one C++ kernel. Eager code has no compiler to wait for.
        args = (x.to(ring.dtype), pos, *tensors, *static)
        APPEND_CPU(*args) if fit is None else APPEND_CPU_BORROWED(*args, fit=fit)
        return
    state = store_kernel.Side(
        codes, scale, zero, ring, start, sink_tokens, side, bits, group_size, residual_length, eta, fit
    )
    store_kernel.store(state, x, pos, length, fault, sink, max_len)


def shared_code_load(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, ring: Tensor | None, sink: Tensor | None,
    start: Tensor, past: Tensor, new_tokens: int, n: int, side: str, bits: int, group_size: int,
    residual_length: int, *, x: Tensor | None = None,
) -> Tensor:
    """Dequantized [B, H, n, D] as attention sees it in a step of ``new_tokens`` after ``past`` (int64 [1])."""
    return load_kernel.load(
        codes, scale, zero, ring, sink, start, past, new_tokens, n, side, bits, group_size, residual_length, x
    )


def decode_attention(*args: Any) -> Tensor:
    """Attention of a step's queries [B, Hq, q, D] to a quantized cache, straight from the codes: [B, Hq, q, Dv].

    ``mask`` (bool, True where attention is allowed, or added to the logits) has shape [B or 1, Hq or
    1, q or 1, max_len]; ``sink_logits`` [Hq] joins the softmax without a value; ``softcap`` and
    ``window`` (tokens a query sees, its own included) are off at 0. Tokens past the last one written
    count as zeros, as in the static buffer that this replaces, unless the mask leaves them out. A chunk
    of more than STEP_TOKENS tokens passes its keys and values as ``k_new`` and ``v_new`` [B, H, q, D]
    and the rings as they were before it.
    """
    a = attention_kernel.Arguments(*args)
    if a.q.device.type == "cpu":
        return torch.ops.xquant.decode_attention_cpu.default(*a)
    if a.q.device.type == "cuda" and triton_attention.has_triton():
        return triton_attention.decode_attention(*a)
    return attention_kernel.dequantized(*a)


_lib.impl("decode_attention", decode_attention, "CompositeImplicitAutograd")
_lib.impl("decode_attention_cpu", attention_kernel.run_cpu, "CPU")
_lib.impl("decode_attention_cpu", attention_kernel.empty_output, "Meta")

_lib.impl("append_cpu", append_kernel.run_cpu, "CPU")
_lib.impl("append_cpu.borrowed", append_kernel.run_cpu, "CPU")
_lib.impl("append_cpu", append_kernel.no_output, "Meta")
_lib.impl("append_cpu.borrowed", append_kernel.no_output, "Meta")
_lib.impl("quantize_store", quantize_store, "CompositeImplicitAutograd")
_lib.impl("quantize_store.borrowed", quantize_store, "CompositeImplicitAutograd")
_lib.impl("shared_code_load", shared_code_load, "CompositeImplicitAutograd")

STORE = torch.ops.xquant.quantize_store.default
STORE_BORROWED = torch.ops.xquant.quantize_store.borrowed
LOAD = torch.ops.xquant.shared_code_load.default
APPEND_CPU = torch.ops.xquant.append_cpu.default
APPEND_CPU_BORROWED = torch.ops.xquant.append_cpu.borrowed
DECODE = torch.ops.xquant.decode_attention.default
DECODE_CPU = torch.ops.xquant.decode_attention_cpu.default


def load_arguments(node: Node) -> dict[str, Any]:
    """Arguments of a ``shared_code_load`` node by name."""
    names = [argument.name for argument in LOAD._schema.arguments]
    return {"x": None, **dict(zip(names, node.args, strict=False)), **node.kwargs}

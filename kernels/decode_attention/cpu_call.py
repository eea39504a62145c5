"""The CPU kernel behind ``xquant::decode_attention``: its call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xquant_fx.kernels.cpu.at_hand import built, why_none
from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.decode_attention.cpu_source import SIZES, Problem, row_block, source
from xquant_fx.kernels.rows import row_loop
from xquant_fx.kernels.schemes import wrap_of
from xquant_fx.tracing import shown


def empty_output(*args: Any, **kwargs: Any) -> Tensor:
    """An uninitialised result [B, heads, q, D of the values]."""
    return _empty(DecodeArguments(*args, **kwargs))


def _empty(a: DecodeArguments) -> Tensor:
    return a.q.new_empty((*a.q.shape[:3], a.v_ring.shape[3]))


def problem_of(a: DecodeArguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Problem:
    """The kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    (_, query_heads, queries, k_dim), (_, heads, _, v_dim) = sizes(a.q), sizes(a.v_ring)
    assert a.max_len or a.mask is None, "a mask says how many tokens there are"
    mask = (1, 1, 1, 1) if a.mask is None else sizes(a.mask)
    k_tokens, v_tokens = sizes(a.k_codes)[3], sizes(a.v_scale)[3]
    rows = query_heads // heads * queries
    return Problem(
        dtype=dtype(a.q),
        scale_dtype=dtype(a.k_scale),
        heads=heads,
        query_heads=query_heads,
        queries=queries,
        k_dim=k_dim,
        v_dim=v_dim,
        long_spans=_batch(a, sizes) * heads * (rows // row_block(rows)) >= 8,
        k_scheme=a.k_scheme,
        k_bits=a.k_bits,
        k_group=a.k_group,
        k_wrap=wrap_of(a.k_scheme, k_tokens, a.max_len, k_dim, a.k_bits, a.k_group, a.k_residual),
        k_residual=a.k_residual,
        k_ring=sizes(a.k_ring)[2],
        v_scheme=a.v_scheme,
        v_bits=a.v_bits,
        v_group=a.v_group,
        v_wrap=wrap_of(a.v_scheme, v_tokens, a.max_len, v_dim, a.v_bits, a.v_group, a.v_residual),
        v_residual=a.v_residual,
        v_ring=sizes(a.v_ring)[2],
        sinks=sizes(a.k_sink)[2] - 1 if a.k_sink is not None else 0,
        scale=a.scale,
        softcap=a.softcap,
        window=a.window,
        mask_dtype=dtype(a.mask) if a.mask is not None else None,
        mask_heads=mask[1] > 1,
        mask_queries=mask[2] > 1,
        sink_logits_dtype=dtype(a.sink_logits) if a.sink_logits is not None else None,
        k_norms=a.k_norm is not None,
        chunk=a.k_new is not None,
        by_row=_by_row(a, sizes),
    )


def _by_row(a: DecodeArguments, sizes: Any) -> bool:
    return sizes(a.past)[0] > 1


def _batch(a: DecodeArguments, sizes: Any) -> int:
    return 1 if _by_row(a, sizes) else sizes(a.q)[0]


def sizes_given(a: DecodeArguments, sizes: Any = sizes_of) -> list[int]:
    """What the kernel takes behind the tensors and the output: ``SIZES``, and those of a loop over rows."""
    given = {
        "batch": _batch(a, sizes),
        "max_len": a.max_len,
        "k_tokens": sizes(a.k_codes)[3],
        "v_tokens": sizes(a.v_scale)[3],
        "mask_batch": 1 if a.mask is None or _by_row(a, sizes) else sizes(a.mask)[0],
        "queries": sizes(a.q)[2],
    }
    return [*(given[name] for name in SIZES), *(_loop(a, sizes) if _by_row(a, sizes) else ())]


def _loop(a: DecodeArguments, sizes: Any) -> tuple[int, ...]:
    shapes = {name: sizes(tensor) for name, tensor in a.tensors.items()}
    return row_loop(sizes(a.q)[0], {**shapes, "out": (*sizes(a.q)[:3], sizes(a.v_ring)[3])})


def run_cpu(*args: Any, **kwargs: Any) -> Tensor:
    """The op's body: :func:`attend` of its arguments."""
    return attend(DecodeArguments(*args, **kwargs))


def attend(a: DecodeArguments) -> Tensor:
    """Build the kernel for this problem, or take one that was built before, and run it."""
    return _run(a, problem_of(a))


def attend_chunk(a: DecodeArguments) -> Tensor | None:
    """The same by a kernel that serves chunks of any number of tokens; None where it cannot be built."""
    problem = problem_of(a).any_queries()
    if why_none(source, problem):
        return None
    with shown("xquant::decode_attention"):
        return _run(a, problem)


def _run(a: DecodeArguments, problem: Problem) -> Tensor:
    out = _empty(a)
    built(source, problem)(*[tensor.contiguous() for tensor in a.tensors.values()], out, *sizes_given(a))
    return out

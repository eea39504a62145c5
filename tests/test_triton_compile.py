"""The Triton kernels compile for NVIDIA and AMD chips, within their registers and shared memory.

What is compiled is what the host code would launch, constants included. Nothing runs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from states import spec_of
from torch import Tensor
from triton_compiled import CHIPS, Needs, compiled, launches

from xquant_fx import XQuantConfig, ops
from xquant_fx.kernels.decode_attention import triton_launch as triton_attention
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments, of_sides
from xquant_fx.kernels.decode_attention.triton_settings import shared_bytes
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store import triton_launch as triton_store
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.quantize_store.both_arguments import BothArguments
from xquant_fx.kernels.triton_device import SYSTEM_SHARED, Device

triton = pytest.importorskip("triton")


FACTS = ("scheme", "bits", "group", "residual")


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stored(side: str, dtype: torch.dtype, config: XQuantConfig, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """The tensors of one side without data, and what the spec says under ``FACTS``."""
    spec = spec_of(config, side, shape, dtype)
    tensors = {name: empty(*shape, dtype=dtype) for name, (shape, dtype) in spec.tensor_shapes().items()}
    facts = (spec.scheme, spec.bits, spec.group_size, spec.residual_length)
    return {**tensors, **dict(zip(FACTS, facts, strict=True))}


def schemes(ranked: bool) -> dict[str, Any]:
    """Fields of a config: the pair of schemes with ranked keys, or the other one."""
    return dict(k_scheme=f"per_channel{'_ranked' * ranked}", v_scheme=f"per_token{'_rotated' * ranked}")


def decode_arguments(
    *, dim: int = 128, k_bits: float = 2, v_bits: int = 1, ranked: bool = False, dtype: torch.dtype = torch.bfloat16,
    group: int = 4, query: int = 1, mask: torch.dtype | None = torch.bool, k_group: int = 128,
    v_group: int | None = None, residual: int = 128, sinks: int = 0, softcap: float = 0.0, window: int = 0,
    extra: bool = False, max_len: int = 32768, kv_heads: int = 8, scales: torch.dtype | None = None,
    norms: bool | None = None,
    v_residual: int | None = None, rows: int = 1,
) -> DecodeArguments:  # fmt: skip
    """Arguments of ``decode_attention`` without data, of ``rows`` sequences, each of a length of its own."""
    config = XQuantConfig(
        **schemes(ranked), k_bits=k_bits, v_bits=v_bits, share_values_from=None, k_group_size=k_group,
        v_group_size=v_group, residual_length=residual, v_residual_length=v_residual, sink_tokens=sinks,
        scale_dtype=scales, k_token_norms=norms,
    )  # fmt: skip
    key, value = (stored(side, dtype, config, (rows, kv_heads, max_len, dim)) for side in ("key", "value"))
    facts = {f"{side}_{name}": t[name] for side, t in (("k", key), ("v", value)) for name in FACTS}
    chunk = empty(rows, kv_heads, query, dim, dtype=dtype) if query > STEP_TOKENS else None
    return DecodeArguments(
        q=empty(rows, kv_heads * group, query, dim, dtype=dtype),
        **of_sides(key.get, value.get),
        **facts,
        start=empty(rows, dtype=torch.int64),
        past=empty(rows, dtype=torch.int64),
        mask=None if mask is None else empty(rows, 1, query, max_len, dtype=mask),
        sink_logits=empty(kv_heads * group, dtype=dtype) if extra else None,
        new_tokens=query,
        max_len=max_len,
        scale=dim**-0.5,
        softcap=softcap,
        window=window,
        k_new=chunk,
        v_new=chunk,
    )


def append_arguments(
    *, side: str, new: int = 1, dim: int = 128, bits: float = 2, group: int = 128, residual: int = 128, sinks: int = 0,
    fit: str | None = None, dtype: torch.dtype = torch.bfloat16, max_len: int = 32768, ranked: bool = False,
    scales: torch.dtype | None = None, norms: bool | None = None, rows: int = 0,
) -> StoreArguments:  # fmt: skip
    """Arguments of ``triton_store.launch`` without data; ``rows`` sequences have positions of their own, 0: one."""
    groups = dict(k_group_size=group) if side == "key" else dict(k_group_size=residual, v_group_size=group)
    bits_of = dict(k_bits=bits) if side == "key" else dict(v_bits=bits)
    fields: dict[str, Any] = dict(residual_length=residual, sink_tokens=sinks, scale_dtype=scales, k_token_norms=norms)
    config = XQuantConfig(**fields, **bits_of, **schemes(ranked), **groups)
    t = stored(side, dtype, config, (rows or 1, 8, max_len, dim))
    if rows:
        t["length"] = empty(rows, 2, dtype=torch.int64)
    step = ("x", "pos", "start", "fault")
    tensors = {name: t.get(name) for name in StoreArguments.tensor_names() if name not in step}
    return StoreArguments(
        x=empty(rows or 1, 8, new, dim, dtype=dtype),
        pos=empty(*([rows] if rows else []), new, dtype=torch.int64),
        **tensors,
        start=empty(rows or 1, dtype=torch.int64),
        fault=empty(rows or 1, dtype=torch.int32),
        scheme=t["scheme"],
        bits=bits,
        group_size=group,
        residual_length=residual,
        eta=0.045,
        sink_tokens=sinks,
        max_len=max_len,
        fit=fit,
    )


FAST = {
    "head_dim 64": dict(dim=64),
    "head_dim 128": dict(),
    "head_dim 256": dict(dim=256),
    "4 bits": dict(k_bits=4, v_bits=4),
    "a chunk": dict(query=512),
    "ranked": dict(ranked=True, v_bits=2, residual=384, v_residual=128),
    "ranked, values of 3 bits": dict(ranked=True, v_bits=3, residual=256),
}
MORE = {
    "small groups, 4 query tokens": dict(k_group=16, v_group=32, query=4),
    "small groups, float32, 4 query tokens": dict(k_group=16, v_group=32, query=4, dtype=torch.float32),
    "float32, 4 query tokens": dict(dtype=torch.float32, query=4),
    "a chunk, head_dim 64": dict(query=512, dim=64),
    "a chunk, head_dim 256": dict(query=512, dim=256),
    "a chunk, float32": dict(query=512, dtype=torch.float32),
    "a chunk, 4 bits": dict(query=512, k_bits=4, v_bits=4),
    "a chunk, small groups": dict(query=512, k_group=16, v_group=32),
    "a chunk and all of it": dict(query=64, softcap=50.0, window=512, mask=torch.bfloat16, sinks=4, extra=True),
    "head_dim 8": dict(dim=8),
    "head_dim 96": dict(dim=96),
    "1 bit": dict(k_bits=1),
    "2 bits": dict(v_bits=2),
    "8 bits": dict(k_bits=8, v_bits=8),
    "3 bits": dict(k_bits=3, v_bits=3),
    "3 bits, head_dim 64": dict(k_bits=3, v_bits=3, dim=64),
    "3 bits, head_dim 256": dict(k_bits=3, v_bits=3, dim=256),
    "3 bits, float32": dict(k_bits=3, v_bits=3, dtype=torch.float32),
    "3 bits, a chunk": dict(k_bits=3, v_bits=3, query=512),
    "3 bits, small groups": dict(k_bits=3, v_bits=3, k_group=16, v_group=32),
    "3 bits, all of it": dict(
        k_bits=3, v_bits=3, query=3, softcap=50.0, window=512, mask=torch.bfloat16, sinks=4, extra=True
    ),
    "float16": dict(dtype=torch.float16),
    "float32": dict(dtype=torch.float32),
    "one query head": dict(group=1, mask=None),
    "rows": dict(rows=4),
    "rows, all of it": dict(rows=4, query=3, softcap=50.0, window=512, mask=torch.bfloat16, sinks=4, extra=True),
    "rows, a chunk": dict(rows=4, query=64),
    "8 query tokens": dict(query=8, group=8),
    "all of it": dict(query=3, softcap=50.0, window=512, mask=torch.bfloat16, sinks=4, extra=True),
    "all of it, head_dim 256": dict(dim=256, query=3, softcap=50.0, window=512, mask=torch.bfloat16, sinks=4),
    "small groups": dict(k_group=16, v_group=32),
    "small groups, head_dim 256": dict(dim=256, k_group=16, v_group=32),
    **{
        f"ranked, {name}": dict(ranked=True, residual=256, **case)
        for name, case in {
            "1.5 and 2 bits": dict(k_bits=1.5, v_bits=2),
            "3 and 2 bits": dict(k_bits=3, v_bits=2),
            "4 and 4 bits": dict(k_bits=4, v_bits=4),
            "3 and 3 bits": dict(k_bits=3, v_bits=3),
            "float16 scales": dict(v_bits=2, scales=torch.float16),
            "float16 scales, 3 and 3 bits, head_dim 256": dict(dim=256, k_bits=3, v_bits=3, scales=torch.float16),
            "float16 scales, head_dim 256": dict(dim=256, k_bits=3, v_bits=2, scales=torch.float16),
            "values of 3 bits, head_dim 64": dict(dim=64, v_bits=3),
            "values of 3 bits, head_dim 256": dict(dim=256, v_bits=3),
            "values of 3 bits, float32": dict(v_bits=3, dtype=torch.float32),
            "values of 3 bits, groups of channels": dict(v_group=32, v_bits=3),
            "values of 3 bits, a chunk": dict(query=512, v_bits=3),
            "head_dim 64": dict(dim=64, v_bits=2),
            "head_dim 80": dict(dim=80),
            "head_dim 96": dict(dim=96, v_bits=2),
            "head_dim 256": dict(dim=256, v_bits=2),
            "head_dim 256, 3 bits, float32": dict(dim=256, k_bits=3, v_bits=2, dtype=torch.float32),
            "float32": dict(dtype=torch.float32),
            "groups of 32 tokens": dict(k_group=32, v_bits=2),
            "groups of channels": dict(v_group=32, v_bits=2),
            "groups of channels, head_dim 256": dict(dim=256, v_group=32, v_bits=2),
            "8 query tokens": dict(query=8, group=8),
            "a chunk": dict(query=512, v_bits=2),
            "a chunk, head_dim 256": dict(query=512, dim=256, v_bits=2),
            "a chunk, float32": dict(query=512, dtype=torch.float32),
            "all of it": dict(query=3, softcap=50.0, window=512, mask=torch.bfloat16, sinks=4, extra=True),
            "one query head": dict(group=1, mask=None, v_bits=2),
            "rows": dict(rows=4, v_bits=2, v_residual=128),
            "rows, head_dim 256, 3 query tokens": dict(rows=4, dim=256, query=3, v_bits=2, sinks=4),
        }.items()
    },
}
#: What is fast: each on a chip or two; of what two programs a multiprocessor are claimed, both of NVIDIA's.
QUICK_CHIPS = {
    "head_dim 64": ("sm_80",),
    "head_dim 128": ("sm_80", "sm_90"),
    "head_dim 256": ("sm_80", "gfx942"),
    "4 bits": ("sm_90",),
    "a chunk": ("sm_90",),
    "ranked": ("sm_80", "sm_90"),
    "ranked, values of 3 bits": ("gfx942",),
}


def on_chips(cases: Iterable[str], quick: Mapping[str, Collection[str]]) -> list[Any]:
    """(name, chip) of each of ``cases`` and CHIPS; slow but for those in ``quick``."""
    return [
        pytest.param(name, chip, marks=() if chip in quick.get(name, ()) else pytest.mark.slow)
        for name in cases
        for chip in CHIPS
    ]


#: Bytes that a thread keeps in memory for want of registers, where there are any.
SPILLED = {("ranked, float16 scales, 3 and 3 bits, head_dim 256", "sm_90"): 32}
#: Triton 3.6 finds fewer registers, and fails on AMD's chips where heads are wide.
OLD = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 8)


def check(needs: Needs, chip: str, spilled: int = 0) -> None:
    """No thread keeps anything in memory for want of registers, and a program fits on the chip."""
    assert needs.spilled <= max(spilled, 40 * OLD)
    assert needs.shared <= CHIPS[chip][3]


@pytest.mark.parametrize(("name", "chip"), on_chips([*FAST, *MORE], QUICK_CHIPS))
def test_decode_attention(name: str, chip: str) -> None:
    case = {**FAST, **MORE}[name]
    *_interior, decode, combine = launches(triton_attention.launch, decode_arguments(**case), hip=chip[:3] == "gfx")
    if OLD and chip == "gfx942" and case.get("dim") == 256 and len(case) > 1:
        pytest.xfail("failed to translate module to LLVM IR")
    needs = compiled(decode, chip)
    check(needs, chip, SPILLED.get((name, chip), 0))
    # On the matrix unit but for float32, which has none on NVIDIA without losing digits.
    assert needs.matrix_products or case.get("dtype") == torch.float32
    if name == "head_dim 128":
        check(compiled(combine, chip), chip)


APPEND = {
    "keys": dict(side="key"),
    "values": dict(side="value"),
    "fitted keys": dict(side="key", fit="least_squares", new=8, sinks=4),
    "fitted values": dict(side="value", fit="least_squares", new=8, sinks=4),
    "keys, minmax, 8 bits": dict(side="key", bits=8, fit="minmax", group=32),
    "values, 8 tokens, head_dim 256": dict(side="value", bits=1, new=8, dim=256, group=256),
    "keys, 3 bits": dict(side="key", bits=3),
    "fitted keys, 3 bits, head_dim 96": dict(side="key", fit="least_squares", bits=3, dim=96, new=8),
    "values, 3 bits, 8 tokens": dict(side="value", bits=3, new=8),
    "fitted values, 3 bits": dict(side="value", fit="least_squares", bits=3, new=8, sinks=4),
    "ranked keys, float16 scales": dict(side="key", ranked=True, residual=256, scales=torch.float16),
    "rotated values, float16 scales": dict(side="value", ranked=True, new=8, scales=torch.float16),
    "rotated values, 3 bits, 8 tokens": dict(side="value", ranked=True, bits=3, new=8),
    "values, groups of 32": dict(side="value", new=3, group=32),
    "keys, head_dim 96, 4 bits": dict(side="key", new=8, dim=96, bits=4, group=16),
    "ranked keys": dict(side="key", ranked=True, residual=256),
    "rotated values": dict(side="value", ranked=True),
    "ranked keys, rows": dict(side="key", ranked=True, residual=256, rows=4, norms=True, sinks=4),
    "ranked keys, head_dim 256, 8 tokens": dict(side="key", ranked=True, residual=256, dim=256, new=8, sinks=4),
    "ranked keys, head_dim 80, 1.5 bits": dict(side="key", ranked=True, residual=256, dim=80, bits=1.5, new=4),
    "ranked keys, head_dim 96, 4 bits": dict(side="key", ranked=True, residual=96, group=32, dim=96, bits=4),
    "ranked keys, float32, 3 bits": dict(side="key", ranked=True, residual=64, group=32, bits=3, dtype=torch.float32),
    "rotated values, head_dim 256, 8 tokens": dict(side="value", ranked=True, dim=256, group=256, new=8),
    "keys, rows": dict(side="key", rows=4, new=3, sinks=4),
    "rotated values, rows": dict(side="value", rows=4, ranked=True),
    "rotated values, head_dim 96, groups of 32": dict(side="value", ranked=True, dim=96, group=32, new=3, bits=1),
}
BOTH = {
    "ranked keys, rotated values": ("ranked keys", "rotated values"),
    "keys, values": ("keys", "values"),
    "ranked keys, rotated values, rows": ("ranked keys, rows", "rotated values, rows"),
    "ranked keys, fitted values, 8 tokens": ("ranked keys, head_dim 256, 8 tokens", "fitted values"),
}
QUICK = {
    "fitted keys": ("sm_90",),
    "fitted values": ("gfx942",),
    "ranked keys, rotated values": ("gfx942",),
    "keys, values": ("sm_80",),
}


@pytest.mark.parametrize(("name", "chip"), on_chips(APPEND, QUICK))
def test_append(name: str, chip: str) -> None:
    (kernel,) = launches(triton_store.launch, append_arguments(**APPEND[name]))
    check(compiled(kernel, chip), chip)


@pytest.mark.parametrize(("name", "chip"), on_chips(BOTH, QUICK))
def test_append_of_both_sides(name: str, chip: str) -> None:
    """In one launch, of programs of the one that wants more warps."""
    sides = [append_arguments(**{**APPEND[side], "new": 8}) for side in BOTH[name]]
    (kernel,) = launches(triton_store.launch, *sides)
    assert kernel.options["num_warps"] == (8 if "ranked" in name else 4)
    check(compiled(kernel, chip), chip)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head_dim 128", "ranked", "small groups"])
@pytest.mark.parametrize("chip", CHIPS)
def test_codes_that_start_over(name: str, chip: str) -> None:
    """The storage of a sliding window takes no more registers than there are."""
    made = launches(triton_attention.launch, decode_arguments(**{**FAST, **MORE}[name]), hip=chip[:3] == "gfx")[:-1]
    sides = [append_arguments(side=side, ranked=name == "ranked", residual=256) for side in ("key", "value")]
    for launch in made + launches(triton_store.launch, *sides):
        wraps = {constant: 1024 for constant in launch.arguments if "WRAP" in constant}
        assert len(wraps) == 2
        warps = {"num_warps": 8} if launch.kernel.fn.__name__ == "append_kernel" else {}  # as the launcher has it then
        replaced = dict(arguments={**launch.arguments, **wraps}, options={**launch.options, **warps})
        check(compiled(dataclasses.replace(launch, **replaced), chip), chip)


@pytest.mark.parametrize("case", ["head_dim 128", "ranked"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_occupancy_at_head_dim_128(chip: str, case: str) -> None:
    """Two programs fit on a multiprocessor, so that one works while the other waits."""
    *_interior, decode, _ = launches(triton_attention.launch, decode_arguments(**FAST[case]), hip=False)
    needs = compiled(decode, chip)
    assert 2 * 128 * needs.registers <= 65536
    assert 2 * needs.shared <= CHIPS[chip][3]
    facts = decode.arguments
    bits = 2.0 if case == "ranked" else 2
    most = shared_bytes(128, 128, bits, facts["V_BITS"], torch.bfloat16, facts["TILE"], facts["FULL_TILE"], 2)
    assert needs.shared <= most  # what the number of splits comes from
    assert Device(1, shared=CHIPS[chip][3] + SYSTEM_SHARED).programs(warps=4, shared=most) == 2


@pytest.mark.parametrize("case", ["head_dim 128", "ranked"])
def test_codes_stay_in_registers(case: str) -> None:
    """Words are brought into the order of the matrix unit, not the codes, which are up to 16 times larger."""
    if OLD:
        pytest.skip("Triton 3.6 takes the codes through shared memory")
    *_interior, decode, _ = launches(triton_attention.launch, decode_arguments(**FAST[case]), hip=False)
    ttgir = compiled(decode, "sm_90").asm["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    loop = loop[: loop.index("scf.yield")]
    moved = [line for line in loop.splitlines() if "ttg.local_alloc" in line or "ttg.convert_layout" in line]
    assert moved and not any(re.search("128x(32|64|128)x", line) for line in moved), moved
    assert "dot_op<{opIdx = 0" in loop


@pytest.mark.parametrize("ranked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_inductor_inlines_the_kernels(ranked: bool) -> None:
    """No call back into Python, no copies: partial results and the output are all that is allocated.

    As many parts as the card has room for, here 12 multiprocessors.
    """
    from fake_cuda import CARD, fake_cuda, generated_code

    def make_args() -> tuple[Any, ...]:
        given = decode_arguments(query=2, max_len=4096, ranked=ranked)
        return (given.mapped(lambda t: torch.zeros(t.shape, dtype=t.dtype, device="cuda"))._asdict(),)

    with fake_cuda(SimpleNamespace(**{**vars(CARD), "multi_processor_count": 12})):
        code = generated_code(lambda given: triton_attention.decode_attention(**given), make_args, backend="inductor")
    call = code[code.index("def call(") :]
    parts = 12 * 8 // 8 + 3  # programs of 8 KV heads at a time, and those of the edges and windows
    assert f"= empty_strided_cuda((64, {parts}, 128)" in call
    assert "torch.ops.xquant" not in call and ".clone(" not in call
    runs = [call.count(f"{name}_kernel_{i}.run(") for i, name in enumerate(("interior", "decode", "combine"))]
    assert runs == [1, 1, 1]
    assert call.count("= empty_strided_cuda(") == 3


def test_inductor_inlines_appends() -> None:
    """Ranked keys and rotated values: no call back into Python, nothing copied, nothing allocated; one launch."""
    from fake_cuda import fake_cuda, generated_code

    def make_args() -> tuple[Any, ...]:
        sides = [append_arguments(side=side, ranked=True, max_len=4096) for side in ("key", "value")]
        both = BothArguments.of_sides(*sides)
        return (both.mapped(lambda t: torch.zeros(t.shape, dtype=t.dtype, device="cuda"))._asdict(),)

    with fake_cuda():
        store = ops.STORE_BOTH[""]
        code = generated_code(lambda given: store(**given), make_args, backend="inductor")
    call = code[code.index("def call(") :]
    assert "torch.ops.xquant" not in call and ".clone(" not in call and "= empty_strided_cuda(" not in call
    assert call.count("_kernel_0.run(") == 1 and call.count(".run(") == 1


def named(kernel: Any, found: dict[str, Any]) -> None:
    """Put into ``found`` what the global names stand for that ``kernel`` uses, and what it calls."""
    for name in sorted({*kernel.fn.__code__.co_names} & {*kernel.fn.__globals__}):
        thing = kernel.fn.__globals__[name]
        if name in found:
            one, other = (getattr(each, "value", each) for each in (found[name], thing))
            assert one == other, f"{name} is two things"
            continue
        found[name] = thing
        if isinstance(thing, triton.JITFunction):
            named(thing, found)


def test_a_name_is_one_thing_in_all_that_a_kernel_calls() -> None:
    """Inductor writes it all into one file, by names: of two functions of one name, in two modules, only the first."""
    from xquant_fx.kernels.decode_attention.triton_interior import interior_kernel
    from xquant_fx.kernels.decode_attention.triton_kernels import combine_kernel, decode_kernel
    from xquant_fx.kernels.quantize_store.triton_append import append_kernel

    for kernel in (interior_kernel, decode_kernel, combine_kernel, append_kernel):
        found: dict[str, Any] = {}
        named(kernel, found)
        assert "tl" in found


def never(a: Any) -> None:
    raise AssertionError("a kernel that does not take these arguments ran")


def test_what_kernels_do_not_take_runs_in_plain_torch() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    given = decode_arguments(ranked=True, k_group=24, residual=48, max_len=480, mask=None)
    with mock.patch.dict(ops.DECODE_KERNELS, meta=ops.DECODE_KERNELS["cuda"]._replace(run=never)):
        out = ops.decode_attention(**given._asdict())
    assert out.shape == given.q.shape
    step = append_arguments(side="key", ranked=True, dim=512, max_len=480)
    with mock.patch.dict(ops.STEP_KERNELS, meta=ops.STEP_KERNELS["cuda"]._replace(run=never)):
        ops.quantize_store(**step._asdict())
    assert dict(counters["xquant"]) == {
        "plain torch: ranked keys in groups of 24 tokens, which is no multiple of 32": 1,
        "plain torch: channels are ranked up to head_dim 256": 1,
    }

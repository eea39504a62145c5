"""The C++ kernels for NEON, compiled for 64-bit ARM and run by qemu, held to what the other CPU tests hold."""

from __future__ import annotations

from typing import ClassVar

import arm
import pytest
import torch
from attention_cases import CASES, allowed
from attention_runs import Setup, arguments, errors, inputs
from states import layers_of
from store_reference import Case
from store_runs import ThroughKernel, load_arguments, pair_of
from store_runs import append as append_by_op
from store_runs import run as run_steps
from test_cpu_load import check
from torch import Tensor

from xquant_fx import XQuantConfig
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.decode_attention import cpu_call as attention
from xquant_fx.kernels.decode_attention import cpu_source as cpu_attention
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.quantize_store import cpu_call as append
from xquant_fx.kernels.quantize_store import cpu_source as cpu_store
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load import cpu_call as load
from xquant_fx.kernels.shared_code_load import cpu_source as cpu_load
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.shared_code_load.plain_torch import load as plain_load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(arm.missing()), reason=f"not installed: {arm.missing()}"),
]
PROCESSORS = {"neon": (), "dotprod": ("-march=armv8.2-a+dotprod",)}
DECODES = (
    "float32", "float16", "bfloat16", "keys 1, values 8 bits", "keys 8, values 1 bits", "4 bits, float32",
    "8 bits, float32", "softcap", "no mask, softcap, window", "mask lets through unwritten tokens", "alibi",
    "sink tokens", "sink logits", "head_dim 8", "a chunk of odd head_dims", "several tiles a split",
)  # fmt: skip
APPENDS = {
    "keys": dict(bits=2, dtype=torch.float32, eta=0.1),
    "keys, minmax": dict(bits=1, dtype=torch.bfloat16, fit="minmax", eta=1 / 6, dim=32),
    "keys, odd head_dim": dict(bits=4, dtype=torch.float16, dim=40, scale_dtype=torch.bfloat16, padding=(0, 3)),
    "values": dict(side="value", bits=2, dtype=torch.float16, group=16, eta=0.1),
    "values, 8 bits, sinks": dict(side="value", bits=8, dtype=torch.float32, group=8, dim=24, sinks=2),
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", DECODES)
def test_decode_attention(name: str, processor: str) -> None:
    setup = Setup(**CASES[name])
    given = inputs(setup)
    a = DecodeArguments(**arguments(setup, given))
    a = a.replace(**{n: t.contiguous() for n, t in a.tensors.items()})
    types, code = cpu_attention.source(attention.problem_of(a), ISAS["neon"])
    out = attention.empty_output(**a._asdict())
    sizes = map(torch.tensor, attention.sizes_given(a))
    arm.run(types, code, [*a.tensors.values(), out, *sizes], PROCESSORS[processor])
    result = errors(setup, out, given)
    assert result["same_nan"] and result["zeros_are_zero"] and result["largest"] > 0
    assert result["error"] <= allowed(result, vars(setup)), result


class ThroughArm(ThroughKernel):
    """Steps by the C++ kernel for NEON."""

    flags: ClassVar[tuple[str, ...]]

    @classmethod
    def append(cls, state: KVState, x: Tensor, pos: Tensor) -> None:
        fit = state.spec.fit if state.spec.borrowed else None
        constants = state.spec.store_constants()
        a = StoreArguments(x=x.contiguous(), pos=pos, **state.tensors, **constants, fit=fit)
        types, code = cpu_store.source(append.problem_of(a), ISAS["neon"])
        arm.run(types, code, [*a.tensors.values(), *map(torch.tensor, append.sizes_given(a))], cls.flags)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", APPENDS)
def test_append(name: str, processor: str) -> None:
    driver = type("Through" + processor.title(), (ThroughArm,), {"flags": PROCESSORS[processor]})
    steps = [9, 1, 1, 3, -3, 1, 3, 3, 0, 12, 3, 3, 1]
    run_steps(Case(**{"residual": 8, "max_len": 60, **APPENDS[name]}), steps, driver)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", [*APPENDS, "ranked", "rotated"])
def test_load(name: str, processor: str) -> None:
    if name in APPENDS:
        state = pair_of(Case(**{"residual": 8, "max_len": 60, **APPENDS[name]}))[0]
    else:
        small = XQuantConfig(k_residual_length=16, k_group_size=8, v_residual_length=8)
        state = layers_of(small, (2, 2, 60, 24), torch.float16)[0][name == "rotated"]
    batch, heads, _, dim = state.spec.shape
    x = torch.randn(batch, heads, 50, dim, generator=torch.Generator().manual_seed(0)).to(state.spec.dtype)
    append_by_op(state, x, torch.arange(50))
    a = LoadArguments(**load_arguments(state, 47, 3, 60))
    types, code = cpu_load.source(load.problem_of(a), ISAS["neon"])
    tensors = load.tensors_given(a)
    arm.run(types, code, [*tensors, *map(torch.tensor, load.sizes_given(a))], PROCESSORS[processor])
    check(a, plain_load(a), tensors[-1])

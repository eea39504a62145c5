"""Linear layers of few rows: the kernel against float64, and which layers the pass gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import fresh
from numeric import seeded
from rewrites import Rewrites, quantized_layers, two_layers
from torch import Tensor, nn
from torch._dynamo.utils import counters

from xquant_fx import ops
from xquant_fx.kernels.cpu import build as cpu_build
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.linear_rows.arguments import LinearArguments
from xquant_fx.kernels.linear_rows.cpu_call import is_faster_here, problem_of
from xquant_fx.kernels.linear_rows.cpu_source import FASTER, source
from xquant_fx.kernels.linear_rows.plain_torch import linear

EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
#: dtype, rows, in, out, bias: whole vectors and rests, one thread's work and more.
SHAPES = [
    (torch.bfloat16, 1, 576, 192, False),
    (torch.bfloat16, 3, 75, 13, True),
    (torch.bfloat16, 8, 96, 50, True),
    (torch.float16, 1, 64, 31, True),
    (torch.float16, 5, 40, 6, False),
    (torch.float32, 1, 200, 180, True),
    (torch.float32, 8, 17, 9, False),
]


def problem(dtype: torch.dtype, rows: int, inner: int, out: int, bias: bool) -> LinearArguments:
    generator = seeded(rows * inner)
    x, weight, b = (torch.randn(s, generator=generator) for s in ((1, rows, inner), (out, inner), (out,)))
    return LinearArguments(x.to(dtype), weight.to(dtype), b.to(dtype) if bias else None)


def check(a: LinearArguments, out: Tensor) -> None:
    """One rounding to the dtype, and what float32 sums may lose."""
    x, weight = a.x.double(), a.weight.double()
    bias = None if a.bias is None else a.bias.double()
    truth = nn.functional.linear(x, weight, bias)
    terms = nn.functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    rounded = EPS[a.x.dtype] * truth.abs() * (a.x.dtype != torch.float32)
    budget = 1.001 * rounded + 2.0**-24 * (8 + a.x.shape[-1] / 8) * terms
    assert out.dtype == a.x.dtype and ((out.double() - truth).abs() <= budget).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_truth(shape: Any) -> None:
    a = problem(*shape)
    check(a, ops.LINEAR_ROWS(a.x, a.weight, a.bias))
    check(a, linear(a))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_vectors(isa: str) -> None:
    if ISAS[isa].lanes > cpu_build.isa().lanes:
        pytest.skip(f"this machine has {cpu_build.isa().name} only")
    for shape in SHAPES[1], SHAPES[4], SHAPES[5]:
        a = problem(*shape)
        types, code = source(problem_of(a), ISAS[isa])
        out = torch.empty(*a.x.shape[:-1], a.weight.shape[0], dtype=a.x.dtype)
        cpu_build.load(types, code)(*a.tensors.values(), out, a.weight.shape[1], a.weight.shape[0])
        check(a, out)


def test_nan_and_infinity_stay() -> None:
    a = problem(torch.bfloat16, 2, 64, 8, False)
    a.x[0, 0, 5], a.weight[3, 7], a.weight[4] = torch.nan, torch.inf, 0.0
    out = ops.LINEAR_ROWS(a.x, a.weight)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isinf().tolist() == [n == 3 for n in range(8)] and out[0, 1, 4] == 0


def test_opcheck() -> None:
    a = problem(torch.float32, 2, 32, 8, True)
    torch.library.opcheck(ops.LINEAR_ROWS, (a.x, a.weight, a.bias), test_utils=("test_schema", "test_faketensor"))


class Around(nn.Module):
    """A decode step of two layers between linear layers of several kinds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.plain, self.biased = nn.Linear(16, 24, bias=False, dtype=dtype), nn.Linear(24, 16, dtype=dtype)
        self.across = nn.Parameter(torch.randn(16, 16, dtype=dtype))

    def forward(self, x: Tensor, *step: Any) -> Any:
        y = self.biased(self.plain(x))
        return two_layers(*step), nn.functional.linear(y, self.across.t())  # the last is not [out, in] in memory


def run(rows: int, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, int], Rewrites]:
    """What a step returns, the counters, and the graphs that Inductor would get."""
    torch._dynamo.reset()
    counters.clear()
    module, x = Around(), torch.randn(1, rows, 16, generator=seeded(2))
    seen = Rewrites(**(options or {}))
    torch.manual_seed(0)
    with torch.no_grad():
        out = torch.compile(module, backend=seen, dynamic=False)(x, *fresh(1), quantized_layers(), torch.arange(1))
    return out[1], dict(counters["xquant"]), seen


@pytest.mark.skipif(not is_faster_here(), reason="no kernel for this processor")
@pytest.mark.parametrize(("rows", "replaced"), [(1, 2), (8, 2), (9, 0)])
def test_which_layers_are_replaced(rows: int, replaced: int) -> None:
    out, counted, _ = run(rows)
    assert counted["linear_rows"] == replaced
    with torch.no_grad():
        module, x = Around(), torch.randn(1, rows, 16, generator=seeded(2))
        y = module.biased(module.plain(x))
        torch.testing.assert_close(out, nn.functional.linear(y, module.across.t()))


def test_it_may_be_off() -> None:
    assert "linear_rows" not in run(1, {"disable": ["linear_rows"]})[1]


def test_only_where_it_was_measured() -> None:
    assert set(FASTER) <= set(ISAS) and "portable" not in FASTER

"""Linear layers of few rows: the kernel against float64, and which layers the pass gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import fresh
from fast_and_slow import fast_but
from numeric import seeded
from rewrites import Rewrites, quantized_layers, two_layers
from torch import Tensor, nn
from torch._dynamo.utils import counters

from xquant_fx import ops
from xquant_fx.kernels.cpu import build as cpu_build
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.linear_rows.arguments import LinearArguments
from xquant_fx.kernels.linear_rows.cpu_call import empty_output, is_faster_here, problem_of, sizes_given
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
    (torch.bfloat16, 7, 50, 11, True),
]
#: The same with weights [in, out], of one layer: parts of 8 rows and the rest, whole vectors and rests.
IN_FIRST = [
    (torch.bfloat16, 1, 576, 192, True),
    (torch.bfloat16, 3, 75, 13, True),
    (torch.bfloat16, 8, 96, 50, False),
    (torch.float16, 1, 67, 31, True),
    (torch.float32, 1, 200, 180, False),
    (torch.float32, 8, 5, 9, True),
]
#: Outputs of several layers, by their sum; that of one output has no bias.
LAYERS = {50: [1, 49], 180: [100, 63, 17], 6: [2, 1, 3]}


def problem(dtype: torch.dtype, rows: int, inner: int, out: int, bias: bool) -> LinearArguments:
    generator = seeded(rows * inner)
    x, weight, b = (torch.randn(s, generator=generator) for s in ((1, rows, inner), (out, inner), (out,)))
    cuts = LAYERS.get(out, [out])
    biases = [part.to(dtype) if bias and part.shape[0] != 1 else None for part in b.split(cuts)]
    return LinearArguments(x.to(dtype), list(weight.to(dtype).split(cuts)), biases)


def in_first(a: LinearArguments) -> LinearArguments:
    """The same of one layer, its weights laid out as ``addmm`` takes them."""
    bias = None if None in a.biases else torch.cat([each for each in a.biases if each is not None])
    return LinearArguments(a.x, [torch.cat(list(a.weights)).t().contiguous()], [bias], in_first=True)


def check(a: LinearArguments, out: Tensor) -> None:
    """One rounding to the dtype, and what float32 sums may lose."""
    x, rows = a.x.double(), a.x.shape[:-1].numel()
    parts = out.split([rows * size for size in sizes_given(a)[1:]])
    assert out.dtype == a.x.dtype
    for weight, bias, part in zip(a.weights, a.biases, parts, strict=True):
        weight, bias = (weight.t() if a.in_first else weight).double(), None if bias is None else bias.double()
        truth = nn.functional.linear(x, weight, bias)
        terms = nn.functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
        rounded = EPS[a.x.dtype] * truth.abs() * (a.x.dtype != torch.float32)
        budget = 1.001 * rounded + 2.0**-24 * (8 + a.x.shape[-1] / 8) * terms
        assert ((part.view(truth.shape).double() - truth).abs() <= budget).all()


#: Whose dtype, rows and bias others have.
SLOW = {SHAPES[6], SHAPES[7], IN_FIRST[2]}


@pytest.mark.parametrize("shape", fast_but(SHAPES, SLOW))
def test_against_the_truth(shape: Any) -> None:
    a = problem(*shape)
    check(a, ops.LINEAR_ROWS(a.x, a.weights, a.biases))
    check(a, linear(a))


@pytest.mark.parametrize("shape", fast_but(IN_FIRST, SLOW))
def test_weights_of_addmm_against_the_truth(shape: Any) -> None:
    a = in_first(problem(*shape))
    check(a, ops.LINEAR_ROWS(a.x, a.weights, a.biases, a.in_first))
    check(a, linear(a))


#: Each dtype, and each layout of weights with two of them; then the others.
NARROW, NARROW_TOO = ((1, 4), (1, 4)), ((5, 7), (3,))


@pytest.mark.parametrize("chosen", [NARROW, pytest.param(NARROW_TOO, marks=pytest.mark.slow)], ids=["", "more"])
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_vectors(isa: str, chosen: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    if ISAS[isa].lanes > cpu_build.isa().lanes:
        pytest.skip(f"this machine has {cpu_build.isa().name} only")
    of_shapes, of_in_first = chosen
    problems = [problem(*SHAPES[i]) for i in of_shapes] + [in_first(problem(*IN_FIRST[i])) for i in of_in_first]
    for a in problems:
        types, code = source(problem_of(a), ISAS[isa])
        out = empty_output(a.x, a.weights, a.biases, a.in_first)
        cpu_build.load(types, code)(*a.tensors, out, *sizes_given(a))
        check(a, out)


@pytest.mark.parametrize("turned", [False, True])
def test_nan_and_infinity_stay(turned: bool) -> None:
    a = problem(torch.bfloat16, 2, 65, 8, False)
    a.x[0, 0, 5], a.weights[0][3, 7], a.weights[0][4] = torch.nan, torch.inf, 0.0
    a = in_first(a) if turned else a
    out = ops.LINEAR_ROWS(a.x, a.weights, a.biases, a.in_first).view(1, 2, 8)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isinf().tolist() == [n == 3 for n in range(8)] and out[0, 1, 4] == 0


def test_opcheck() -> None:
    for a in problem(torch.float32, 2, 32, 8, True), in_first(problem(torch.float32, 2, 32, 8, True)):
        args = (a.x, a.weights, a.biases, a.in_first)
        torch.library.opcheck(ops.LINEAR_ROWS, args, test_utils=("test_schema", "test_faketensor"))


class Around(nn.Module):
    """A decode step of two layers between linear layers of several kinds, three of which take one input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.plain, self.biased = nn.Linear(16, 24, bias=False, dtype=dtype), nn.Linear(16, 16, dtype=dtype)
        self.last = nn.Linear(16, 8, dtype=dtype)
        self.across = nn.Parameter(torch.randn(16, 32, dtype=dtype))

    def forward(self, x: Tensor, between: str, *step: Any) -> Any:
        x = x * 2
        same = x.mul_(0.5)
        y = self.plain(x)
        if between == "write":
            x += 1
        if between == "view":
            x.view(-1)[0] = 3
        if between == "activation":
            nn.functional.relu(x, inplace=True)
        if between == "result of an op in place":
            same.add_(1)
        z = self.biased(x)
        out = two_layers(*step)
        bias = self.last.bias * z[0, 0, :8] if between == "bias" else self.last.bias
        t = nn.functional.linear(z if between == "other" else x, self.last.weight, bias)
        turned = nn.functional.linear(z, self.across.t()), z @ self.last.weight.T
        return out, y, z, t, turned, nn.functional.linear(z, self.across[:, ::2])  # this is no block of memory


def run(rows: int, options: dict[str, Any] | None = None, between: str = "") -> tuple[Any, dict[str, int], Rewrites]:
    """What a step returns, the counters, and the graphs that Inductor would get."""
    torch._dynamo.reset()
    counters.clear()
    module, x = Around(), torch.randn(1, rows, 16, generator=seeded(2))
    seen = Rewrites(**(options or {}))
    step = (*fresh(1), quantized_layers(), torch.arange(1))
    with torch.no_grad():
        out = torch.compile(module, backend=seen, dynamic=False)(x, between, *step)
    return out[1:], dict(counters["xquant"]), seen


@pytest.mark.skipif(not is_faster_here(), reason="no kernel for this processor")
@pytest.mark.parametrize(("rows", "replaced"), [(1, 5), (8, 5), (9, 0)])
def test_which_layers_are_replaced(rows: int, replaced: int) -> None:
    out, counted, _ = run(rows)
    assert counted["linear_rows"] == replaced
    torch.testing.assert_close(out, run(rows, {"disable": ["linear_rows"]})[0])


#: What stands between three layers of one input, and how many layers each call then has; two more follow.
TOGETHER = {"": [3, 1, 1], "bias": [2, 1, 1, 1], "other": [2, 2, 1]}
TOGETHER |= {change: [1, 2, 1, 1] for change in ("write", "view", "activation", "result of an op in place")}


@pytest.mark.skipif(not is_faster_here(), reason="no kernel for this processor")
@pytest.mark.parametrize("between", TOGETHER)
def test_layers_of_one_input_are_one_call(between: str) -> None:
    out, _, seen = run(1, between=between)
    calls = [node for node in seen.made[0].graph.nodes if node.target is ops.LINEAR_ROWS]
    assert [len(node.args[1]) for node in calls] == TOGETHER[between]
    off = run(1, {"disable": ["linear_rows"]}, between)[0]
    torch.testing.assert_close(out, off)


def test_it_may_be_off() -> None:
    assert "linear_rows" not in run(1, {"disable": ["linear_rows"]})[1]


def test_only_where_it_was_measured() -> None:
    assert set(FASTER) <= set(ISAS) and "portable" not in FASTER

"""Products with weights [in, out], as GPT-2 has them: which of them the row kernel gets, and what a model gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import fresh, tiny
from numeric import seeded
from rewrites import Rewrites, count, quantized_layers, two_layers
from stepping import relative_error, run_steps
from torch import Tensor, nn
from torch._dynamo.utils import counters

from xquant_fx import XQuantCache, ops
from xquant_fx.kernels.linear_rows.cpu_call import is_faster_here

ROWS_KERNEL = pytest.mark.skipif(not is_faster_here(), reason="no kernel for this processor")


class Products(nn.Module):
    """Products of rows with a matrix [in, out], and what only looks like one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.randn(24))
        self.whole = nn.Parameter(torch.ones(16, 24, dtype=torch.int64), requires_grad=False)

    def forward(self, x: Tensor, what: str, *step: Any) -> Any:
        w, b = self.weight, self.bias
        y = {
            "addmm": lambda: torch.addmm(b, x, w),
            "by names": lambda: torch.addmm(input=b, mat1=x, mat2=w, beta=1),
            "method": lambda: b.addmm(x, w),
            "mm": lambda: x.mm(w),
            "matmul": lambda: x[None] @ w,
            "one row": lambda: torch.matmul(x[0], w),
            "Conv1D's": lambda: torch.addmm(b, x[None].view(-1, 16), w).view(1, -1, 24),
            "beta": lambda: torch.addmm(b, x, w, beta=2),
            "alpha": lambda: torch.addmm(b, x, w, alpha=0.5),
            "a bias for each row": lambda: torch.addmm(b.expand(x.shape[0], 24), x, w),
            "a bias for all": lambda: torch.addmm(b[:1], x, w),
            "computed": lambda: x @ (w * 2),
            "not in sequence": lambda: x @ w[:, ::2],
            "a batch": lambda: x[None] @ w[None],
            "a vector": lambda: x @ w[:, :1].reshape(16),
            "ints": lambda: x.long() @ self.whole,
        }[what]()
        return two_layers(*step), y


def product(what: str, rows: int = 2, disable: tuple[str, ...] = ()) -> tuple[Tensor, int]:
    """What is computed, and how many calls of the kernel there are."""
    torch._dynamo.reset()
    seen = Rewrites(disable=list(disable))
    step = (*fresh(1), quantized_layers(), torch.arange(1))
    with torch.no_grad():
        compiled = torch.compile(Products(), backend=seen, dynamic=False)
        out = compiled(torch.randn(rows, 16, generator=seeded(2)), what, *step)[1]
    return out, count(seen.made[0], ops.LINEAR_ROWS)


@ROWS_KERNEL
@pytest.mark.parametrize("what", ["addmm", "by names", "method", "mm", "matmul", "one row", "Conv1D's"])
def test_products_that_are_replaced(what: str) -> None:
    out, calls = product(what)
    assert calls == 1
    torch.testing.assert_close(out, product(what, disable=("linear_rows",))[0])


LEFT = ["beta", "alpha", "a bias for each row", "a bias for all", "computed", "not in sequence", "a batch", "a vector"]


@pytest.mark.parametrize("what", [*LEFT, "ints"])
def test_products_that_are_not(what: str) -> None:
    assert product(what)[1] == 0


@pytest.mark.parametrize("what", ["addmm", "matmul"])
def test_products_of_more_rows(what: str) -> None:
    assert product(what, rows=9)[1] == 0


@ROWS_KERNEL
def test_a_step_of_gpt2() -> None:
    """Four products in each of two layers, and the head."""
    model, seen, ids = tiny("gpt2"), Rewrites(), torch.arange(3, 23)[None]
    step = torch.compile(model.forward, backend=seen, dynamic=False)
    eager, fused = (
        run_steps([(model.forward, 14)] + [(call, 1)] * 6, ids, XQuantCache(model.config, 48))
        for call in (model.forward, step)
    )
    assert [count(graph, ops.LINEAR_ROWS) for graph in seen.made] == [9]
    assert relative_error(fused, eager) < 1e-5


@ROWS_KERNEL
@pytest.mark.slow
def test_equal_layers_of_gpt2_are_compiled_once() -> None:
    """A product of torch's in Inductor's wrapper would keep the layers, and the step's calls, apart."""
    torch._dynamo.reset()
    counters.clear()
    model, ids = tiny("gpt2", n_layer=5), torch.arange(3, 19)[None]
    step = torch.compile(model.forward, backend="xquant", dynamic=False)
    run_steps([(model.forward, 14), (step, 1), (step, 1)], ids, XQuantCache(model.config, 48))
    found = counters["xquant"]
    assert (found["linear_rows"], found["layers_not_compiled_again"], found["one_call"]) == (21, 3, 1)

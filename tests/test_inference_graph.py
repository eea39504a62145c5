"""A model whose ``forward`` is decorated with ``torch.inference_mode()``, as Meta's Llama is: torch alone raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import interpreted
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import explain
from xquant_fx.cache.kv_tensor import QuantizedKV


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.turns = nn.Linear(16, 16), torch.randn(64, 16)
        self.keys, self.values = (torch.zeros(1, 2, 64, 16) for _ in range(2))

    @torch.inference_mode()
    def forward(self, x: Tensor, p: int) -> Tensor:
        end = p + x.shape[2]
        x = self.linear(x) + self.turns[p:end]  # a view, which torch takes for one of inference mode
        self.keys[:, :, p:end], self.values[:, :, p:end] = x, 2 * x
        mask = torch.ones(x.shape[2], end, dtype=torch.bool).tril(p)
        return sdpa(x, self.keys[:, :, :end], self.values[:, :, :end], attn_mask=mask)


def steps(step: Callable[..., Tensor]) -> list[Tensor]:
    out, p = [], 0
    for n in (20, 1, 1, 1):
        out.append(step(torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(p)), p))
        p += n
    return out


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["inductor's", pytest.param("op by op", marks=pytest.mark.slow)])
def test_it_is_quantized(backend: str, mode: Any) -> None:
    fast, plain = Decoder(), Decoder()
    made: Any = interpreted(preset="full") if backend == "op by op" else "xquant"
    options = {} if backend == "op by op" else {"options": {"preset": "full"}}
    with mode():
        step = torch.compile(fast, backend=made, **options)
        for _ in range(2):
            for got, want in zip(steps(step), steps(plain), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                assert got.is_inference()
        assert isinstance(fast.keys, QuantizedKV) and isinstance(fast.values, QuantizedKV)
        assert explain(Decoder(), torch.randn(1, 2, 1, 16), 0, options={"preset": "full"}).sites[0].rewritten


def test_a_graph_without_a_cache() -> None:
    @torch.inference_mode()
    def run(x: Tensor, y: Tensor) -> Tensor:
        return (x[1:] * y).sum(0)

    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    got = torch.compile(run, backend="xquant")(x, y)
    torch.testing.assert_close(got, run(x, y))
    assert got.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

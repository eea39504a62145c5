"""What a program does to growing keys and values that leaves their numbers as they are: ``detach``, say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import interpreted
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig, explain, memory_report
from xquant_fx.cache.growing import GrowingKV

FULL = XQuantConfig.preset("full")
Pasts = tuple[Tensor, ...]
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": torch.detach,
    "contiguous": Tensor.contiguous,
    "clone": torch.clone,
    "cast": Tensor.float,
    "several": lambda x: x.detach().contiguous().clone(),
    "all": lambda x: x[:, 0:],
    "all, from the back": lambda x: x[..., 0:, :],
}


def step(at: int, before: Any, behind: Any, keep: int = 0) -> Callable[..., Any]:
    def run(x: Tensor, pasts: Pasts) -> Any:
        k, v = (behind(torch.cat((before(past), x), at)) for past in pasts)
        out = sdpa(*((t if at == 2 else t.transpose(1, 2)) for t in (x, k, v)))
        kept = (k[:, :, -keep:], v[:, :, -keep:]) if keep else (k, v)
        return out, tuple(behind(t) for t in kept)

    return run


def as_is(x: Tensor) -> Tensor:
    return x


def steps(run: Callable[..., Any], at: int, lengths: tuple[int, ...] = (3, 1, 1)) -> tuple[list[Tensor], Pasts]:
    torch.manual_seed(0)
    shape, out = [1, 2, 2, 16], []
    shape[at] = 5
    pasts: Pasts = torch.randn(shape), torch.randn(shape)
    with torch.no_grad():
        for length in lengths:
            shape[at] = length
            result, pasts = run(torch.randn(shape), pasts)
            out.append(result)
    return out, pasts


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", COPIES)
def test_what_grows_is_quantized(name: str, at: int) -> None:
    for before, behind in ((COPIES[name], as_is), (as_is, COPIES[name])):
        torch._dynamo.reset()
        run = step(at, before, behind)
        got, pasts = steps(torch.compile(run, backend=interpreted(config=FULL)), at)
        expected, wanted = steps(run, at)
        torch.testing.assert_close(got, expected)
        assert all(isinstance(past, GrowingKV) for past in pasts)
        torch.testing.assert_close([past.dequantize() for past in pasts], [*wanted])


def test_the_last_tokens_are_quantized() -> None:
    few = dict(residual_length=16, k_group_size=8, rollback_tokens=8)
    run, config = step(2, as_is, torch.clone, keep=24), FULL.replace(sliding_windows=True, **few)
    lengths = (30, *(1,) * 6)
    got, pasts = steps(torch.compile(run, backend=interpreted(config=config)), 2, lengths)
    expected, wanted = steps(run, 2, lengths)
    torch.testing.assert_close(got, expected)
    assert all(isinstance(past, GrowingKV) for past in pasts)
    torch.testing.assert_close([past.dequantize() for past in pasts], [*wanted])
    assert explain(run, torch.randn(1, 2, 1, 16), wanted, options={"config": config}).sites[0].rewritten


def returned_twice(x: Tensor, pasts: Pasts) -> Any:
    k, v = (torch.cat((past, x), 2) for past in pasts)
    return sdpa(x, k, v), (k, v), (k.clone(), v.clone())


def test_what_is_returned_twice_is_two_tensors() -> None:
    x = torch.randn(1, 2, 1, 16)
    pasts = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    compiled = torch.compile(returned_twice, backend=interpreted(config=FULL))
    with torch.no_grad():
        for _ in range(2):
            _, pasts, copies = compiled(x, pasts)
            assert all(type(copy) is Tensor for copy in copies)
            torch.testing.assert_close([*copies], [past.dequantize() for past in pasts])
            copies[0].zero_()
            assert pasts[0].dequantize().any()


def last_returned(x: Tensor, past: Tensor) -> Any:
    k = torch.cat((past, x), 2)
    return k, k[:, :, -1:].clone()


def past_returned(x: Tensor, past: Tensor) -> Any:
    old = past.clone()
    return torch.cat((old, x), 2), old[:, :, :1]


@pytest.mark.parametrize("run", [last_returned, past_returned])
def test_copies_of_what_is_not_quantized_are_copies(run: Callable[..., Any]) -> None:
    x, past = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16)
    before = past.clone()
    with torch.no_grad():
        whole, part = torch.compile(run, backend=interpreted(config=FULL))(x, past)
        part.zero_()
    assert torch.equal(whole, torch.cat((before, x), 2)) and torch.equal(past, before)


def written_to(x: Tensor, pasts: Pasts) -> Any:
    k, v = (torch.cat((past, x), 2) for past in pasts)
    kept = k.clone()
    kept[:, :, 0] = 0
    return sdpa(x, k, v), (kept, v.detach())


def past_is_written_to(x: Tensor, pasts: Pasts) -> Any:
    old = pasts[0].clone()
    old[:, :, 0] = 0
    k, v = torch.cat((old, x), 2), torch.cat((pasts[1], x), 2)
    return sdpa(x, k, v), (k, v)


@pytest.mark.parametrize("run", [written_to, past_is_written_to])
def test_copies_that_are_written_to_are_copies(run: Callable[..., Any]) -> None:
    got, pasts = steps(torch.compile(run, backend=interpreted(config=FULL)), 2)
    expected, wanted = steps(run, 2)
    torch.testing.assert_close(got, expected)
    assert type(pasts[0]) is Tensor
    torch.testing.assert_close([*pasts[:1]], [*wanted[:1]])


def casts(x: Tensor, pasts: Pasts) -> Any:
    k, v = (torch.cat((past, x), 2).bfloat16() for past in pasts)
    return sdpa(x.bfloat16(), k, v), (k.float(), v.float())


def test_a_cast_changes_numbers() -> None:
    got, pasts = steps(torch.compile(casts, backend=interpreted(config=FULL)), 2)
    expected, wanted = steps(casts, 2)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close([*pasts], [*wanted], rtol=0, atol=0)


@pytest.mark.parametrize(
    "use", [torch.detach, Tensor.contiguous, Tensor.float, lambda x: x.data, lambda x: x[:, :, :4]]
)
@pytest.mark.parametrize("at", [1, 2])
def test_a_graph_may_return_one_that_grows_by_another_name(use: Callable[[Tensor], Tensor], at: int) -> None:
    """Without a concatenation."""
    _, pasts = steps(torch.compile(step(at, as_is, as_is), backend=interpreted(config=FULL)), at)
    with torch.no_grad():
        got = torch.compile(use, backend=interpreted(config=FULL))(pasts[0])
        torch.testing.assert_close(got + 0, use(pasts[0].dequantize()))


@pytest.mark.parametrize("cast", [lambda w, v: w.to(v), lambda w, v: w.type_as(v)])
@pytest.mark.parametrize("at", [1, 2])
def test_a_tensor_that_lends_its_dtype_is_not_read(at: int, cast: Callable[[Tensor, Tensor], Tensor]) -> None:
    """As in audiocraft: ``w = softmax(...).to(v)``."""

    def run(x: Tensor, pasts: Pasts) -> Any:
        k, v = (torch.cat((past, x), at) for past in pasts)
        q, keys, values = (t if at == 2 else t.transpose(1, 2) for t in (x, k, v))
        return cast(torch.softmax(q @ keys.mT, -1), v) @ values, (k, v)

    got, pasts = steps(torch.compile(run, backend=interpreted(config=FULL)), at)
    expected, wanted = steps(run, at)
    torch.testing.assert_close(got, expected)
    assert all(isinstance(past, GrowingKV) for past in pasts)
    torch.testing.assert_close([past.dequantize() for past in pasts], [*wanted])


def test_a_size_is_no_cache(caplog: pytest.LogCaptureFixture) -> None:
    """Positions are made of it, and a number is returned (a streaming state's offset)."""

    def prompt(x: Tensor) -> Any:
        y = x + torch.cos(torch.arange(x.shape[1])[None, :, None])
        q, k, v = y.reshape(1, x.shape[1], 3, 2, 16).permute(0, 3, 2, 1, 4).unbind(2)
        return sdpa(q, k, v, is_causal=True), k, v, torch.zeros(1) + x.shape[1]

    compiled = torch.compile(prompt, backend=interpreted(config=FULL), dynamic=True)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="xquant_fx"):
        for n in (20, 30):
            x = torch.randn(1, n, 96)
            torch.testing.assert_close(compiled(x), prompt(x))
    assert not caplog.records


class Attention(nn.Module):
    """Keys and values [B, N, H * D] are the outputs of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, cache: dict[nn.Module, Tensor]) -> Tensor:
        q, k, v = (m(x).unflatten(2, (2, -1)).permute(0, 2, 1, 3) for m in (self.query, self.key, self.value))
        return sdpa(q, k, v, is_causal=x.shape[1] > 1).transpose(1, 2).flatten(2)


def test_a_cache_that_hooks_keep() -> None:
    """As in OpenAI's Whisper: a layer's hook keeps its output, detached, and gives all tokens."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(1, 30, 32)

    def decode(step: Callable[..., Tensor]) -> tuple[Tensor, dict[nn.Module, Tensor]]:
        cache: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            cache[module] = torch.cat([cache[module], output], dim=1).detach() if module in cache else output
            return cache[module]

        hooks = [module.register_forward_hook(keep) for module in (model.key, model.value)]
        with torch.no_grad():
            out = torch.cat([step(part, cache) for part in x.split([20, *[1] * 10], 1)], 1)
        for hook in hooks:
            hook.remove()
        return out, cache

    (got, mine), (want, theirs) = decode(torch.compile(model, backend=interpreted(config=FULL))), decode(model)
    torch.testing.assert_close(got, want)
    assert all(isinstance(t, GrowingKV) for t in mine.values()) and memory_report(mine).elements == 2 * x.numel()
    torch.testing.assert_close([t.dequantize() for t in mine.values()], [*theirs.values()])

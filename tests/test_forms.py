"""Any sequence of the forms that scores may take: in order it fuses and agrees with eager, out of order it is left."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from dynamo_graphs import fresh
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rewrites import SHAPE, Rewrites, assign, count, quantized_layers
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from xquant_fx import ops
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.decode_attention.plain_torch import attend
from xquant_fx.passes.forms import ROWS
from xquant_fx.passes.scores import Stage

HEADS, TOKENS = SHAPE[1], SHAPE[2]
SOFTCAP = 3.0
T = torch.arange(TOKENS)


def joined(scores: Tensor) -> Tensor:
    sinks = torch.tensor([0.5, -0.5]).view(1, HEADS, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1)


#: Name of a row to spellings of it. Each takes scores [B, H, q, N (+ 1 after sink logits)].
SPELLINGS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "largest subtracted": [lambda s: s - s.max(-1, keepdim=True).values, lambda s: s - s.amax(-1, keepdim=True)],
    "sink logits": [joined],
    "mask added": [lambda s: s + (T * -0.1), lambda s: (T % 3 - 1.0)[None, None] + s],
    "mask filled": [
        lambda s: s.masked_fill(T == 1, -torch.inf),
        lambda s: torch.where(T[None] != 2, s, -torch.inf),
        lambda s: torch.where((T > 3)[:TOKENS] & (T < 5), -torch.inf, s),
    ],
    "softcap": [lambda s: SOFTCAP * torch.tanh(s / SOFTCAP), lambda s: torch.tanh(s * (1 / SOFTCAP)).mul(SOFTCAP)],
    "scale": [lambda s: s * 0.7, lambda s: s / 1.5, lambda s: 0.5 * s],
    "cast": [lambda s: s.to(torch.float64).float(), lambda s: s.contiguous()],
    "view": [lambda s: s.reshape(-1, *s.shape[2:]).view(s.shape)],
}
STAGES = {row.name: row.stage for row in ROWS}


def test_every_row_is_drawn() -> None:
    assert list(SPELLINGS) == [row.name for row in ROWS]
    assert {row.stage for row in ROWS} == {*Stage, None}


def fuses(names: list[str]) -> bool:
    """The rule: from the product on stages only rise; one softcap, with no scale after it; one of each joined row."""
    stages = [stage for name in names if (stage := STAGES[name]) is not None]
    ordered = stages == sorted(stages)
    once = all(names.count(name) <= 1 for name in ("softcap", "sink logits", "largest subtracted"))
    joins = "sink logits" not in names or "scale" not in names[names.index("sink logits") :]
    capped = "softcap" not in names or "scale" not in names[names.index("softcap") :]
    # Sink logits are joined before the largest is subtracted, or the softmax would not be the same.
    largest = names.index("largest subtracted") if "largest subtracted" in names else len(names)
    return ordered and once and joins and capped and set(names[largest + 1 :]) <= {"cast", "view", "scale"}


class InPlainTorch(Interpreter):
    """Runs a rewritten graph with the op's plain torch form in the place of its kernel."""

    def call_function(self, target, args, kwargs):
        if target is ops.DECODE:
            return attend(DecodeArguments(*args, **kwargs))
        return super().call_function(target, args, kwargs)


def in_plain_torch(seen: Rewrites) -> Callable[..., object]:
    def backend(gm: GraphModule, inputs: list[object]) -> Callable[..., object]:
        done = seen(gm, inputs)
        done.compiled = InPlainTorch(seen.made[-1]).run
        return done

    return backend


def attention(forms: list[Callable[[Tensor], Tensor]], sinks: bool) -> Callable[..., Tensor]:
    def step(q: Tensor, k: Tensor, v: Tensor, layers: list, pos: Tensor) -> Tensor:
        keys, values = layers[0]
        assign(keys, values, k, v, pos)
        scores = q @ keys.transpose(2, 3)
        for form in forms:
            scores = form(scores)
        weights = torch.softmax(scores, -1)
        return (weights[..., :-1] if sinks else weights) @ values

    return step


DRAWN = st.lists(st.sampled_from([(name, i) for name, each in SPELLINGS.items() for i in range(len(each))]), max_size=5)


@settings(max_examples=40, deadline=None)
@given(DRAWN)
@example([("largest subtracted", 0), ("sink logits", 0)])
@example([("sink logits", 0), ("largest subtracted", 1)])
@example([("mask added", 0), ("scale", 0), ("mask filled", 1), ("mask added", 1)])
@example([("scale", 1), ("softcap", 0), ("mask filled", 0), ("sink logits", 0), ("largest subtracted", 0)])
@example([("softcap", 1), ("scale", 2)])
@example([("mask added", 0), ("softcap", 0)])
@example([("largest subtracted", 0), ("scale", 0)])
def test_any_sequence(drawn: list[tuple[str, int]]) -> None:
    check(drawn)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(DRAWN)
def test_any_of_many_sequences(drawn: list[tuple[str, int]]) -> None:
    check(drawn)


def check(drawn: list[tuple[str, int]]) -> None:
    """A step with these forms, compiled and eager."""
    names = [name for name, _ in drawn]
    after = names[names.index("sink logits") + 1 :] if "sink logits" in names else []
    assume(not {"sink logits", "mask added", "mask filled"} & set(after))  # too narrow: torch itself refuses
    torch._dynamo.reset()
    step = attention([SPELLINGS[name][i] for name, i in drawn], "sink logits" in names)
    torch.manual_seed(0)
    ours, (args, pos), seen = quantized_layers(), (fresh(6), torch.arange(6)), Rewrites()
    theirs = copy.deepcopy(ours)
    with torch.no_grad():
        got = torch.compile(step, backend=in_plain_torch(seen), dynamic=False)(*args, ours, pos)
        torch.testing.assert_close(got, step(*args, theirs, pos), rtol=1e-4, atol=1e-5)
    assert count(seen.made[0], ops.DECODE) == int(fuses(names)), names


@pytest.mark.parametrize("names", [["mask added", "softcap"], ["softcap", "scale"], ["sink logits", "scale"]])
def test_out_of_order(names: list[str]) -> None:
    assert not fuses(names) and fuses(names[::-1])

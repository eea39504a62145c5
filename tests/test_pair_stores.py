"""Keys and values of a layer stored by one op. On a CPU, which is told to have a kernel for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewrites import STORES, Rewrites, count, run_both, sdpa, two_layers
from torch._dynamo.utils import counters

from xquant_fx import CacheStateError, XQuantConfig, ops
from xquant_fx.kernels.quantize_store.both_arguments import BOTH, BothArguments

pytest_plugins = ["plain_torch"]
BY_ONE = set(ops.STORE_BOTH.values())
UNPAIRED = "keys and values are stored one by one: "


@pytest.fixture(autouse=True)
def kernel_of_both(monkeypatch: pytest.MonkeyPatch, plain_torch: None) -> list[BothArguments]:
    """What the kernel gets; it stores one side after the other."""
    given: list[BothArguments] = []

    def run(a: BothArguments) -> None:
        given.append(a)
        for side in a.sides:
            side.call(ops.STORE, ops.STORE_BORROWED)

    monkeypatch.setitem(ops.BOTH_KERNELS, "cpu", ops.Kernel(run, lambda x: True))
    counters.clear()
    return given


@pytest.mark.parametrize("borrowed", ["", "k", "v", "k_v"])
def test_one_op_a_layer(borrowed: str, kernel_of_both: list[BothArguments]) -> None:
    config = XQuantConfig(
        k_scheme="per_channel", v_scheme="per_token", k_bits=4, v_bits=2, k_group_size=4, residual_length=4,
        share_keys_from=0 if "k" in borrowed else None, share_values_from=0 if "v" in borrowed else None,
    )  # fmt: skip
    seen = Rewrites()
    mine, theirs = run_both(two_layers, [5, 1, 1, 3], seen, config)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    for made in seen.made:
        found = [node.target for node in made.graph.nodes if node.target in BY_ONE]
        assert found == [ops.STORE_BOTH[""], ops.STORE_BOTH[borrowed]] and count(made, *STORES) == 0
    assert counters["xquant"]["pair_stores"] == 2 * len(seen.made)
    assert kernel_of_both[-1].overload == borrowed


def test_one_op_a_layer_of_rows(kernel_of_both: list[BothArguments]) -> None:
    """Each at positions of its own; it stores what the two ops store."""
    lengths, outs = [5, 2], []
    config = XQuantConfig.preset("xquant").replace(k_group_size=4, residual_length=4, share_values_from=0)

    def step(x: Any, keys: Any, values: Any, pos: Any) -> Any:
        for buffer in (keys, values):
            buffer[torch.arange(2), :, pos] = x[:, :, 0]
        return sdpa(x, keys, values, attn_mask=torch.arange(24) <= pos[:, None, None, None])

    x = torch.randn(2, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    for paired in (True, False):
        seen = Rewrites(config=config, disable=[] if paired else ["pair_stores"])
        torch._dynamo.reset()
        compiled, buffers = torch.compile(step, backend=seen, dynamic=False), [torch.zeros(2, 2, 24, 16) for _ in "kv"]
        for buffer in buffers:
            for row, length in enumerate(lengths):
                buffer[row, :, :length] = x[row, :, :length]
        with torch.no_grad():
            outs.append([compiled(x[:, :, i : i + 1], *buffers, torch.tensor(lengths) + i) for i in range(5)])
        assert all(count(made, *BY_ONE) == paired and count(made, *STORES) == 2 * (not paired) for made in seen.made)
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    assert kernel_of_both[-1].k_length.shape == (2, 2)


def grow(q: Any, k: Any, v: Any, past: Any, keep: int) -> Any:
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return sdpa(q, k, v), (k[:, :, -keep:], v[:, :, -keep:]) if keep else (k, v)


@pytest.mark.parametrize("keep", [0, 39])
def test_one_op_a_layer_that_grows(keep: int, kernel_of_both: list[BothArguments], monkeypatch: Any) -> None:
    """By concatenation, of all tokens or of a window's; it stores what the two ops store."""
    config = XQuantConfig.preset("kivi-4").replace(residual_length=8, k_group_size=8, sliding_windows=True)
    x, outs = torch.randn(1, 2, 65, 16, generator=torch.Generator().manual_seed(0)), []
    for paired in (True, False):
        seen = Rewrites(config=config, disable=[] if paired else ["pair_stores"])
        torch._dynamo.reset()
        step, past, out = torch.compile(grow, backend=seen, dynamic=False), [torch.zeros(1, 2, 0, 16)] * 2, []
        with torch.no_grad():
            for part in x.split([60, 1, 1, 3], 2):
                result, past = step(part, part, part, past, keep)
                out.append(result)
        outs.append([*out, *(t + 0 for t in past)])
        assert all(count(made, *BY_ONE) == paired and count(made, *STORES) == 2 * (not paired) for made in seen.made)
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    assert kernel_of_both


def test_keys_and_values_of_different_steps_are_a_fault(kernel_of_both: list[BothArguments]) -> None:
    """Of a window both are stored at the keys' positions, which must follow the values, too."""
    config = XQuantConfig.preset("kivi-4").replace(residual_length=8, k_group_size=8, sliding_windows=True)
    x = torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(0))
    step, past, pasts = torch.compile(grow, backend=Rewrites(config=config)), [torch.zeros(1, 2, 0, 16)] * 2, []
    with torch.no_grad():
        for part in x.split([60, 1, 1, 1, 7], 2)[:4]:
            past = step(part, part, part, past, 39)[1]
            pasts.append(past)
        with pytest.raises(CacheStateError, match="the first position was past the number of tokens stored"):
            step(part, part, part, [pasts[-1][0], pasts[-3][1]], 39)


def read_between(q: Any, k: Any, v: Any, layers: Any, pos: Any) -> Any:
    """A layer's keys are read dequantized before its values come."""
    for keys, values in layers:
        keys[:, :, pos] = k
        v = v + keys[:, :, :1]
        values[:, :, pos] = v
        q = sdpa(q, keys, values)
    return q


def two_positions(q: Any, k: Any, v: Any, layers: Any, pos: Any) -> Any:
    for keys, values in layers:
        keys[:, :, pos] = k
        values[:, :, pos + 0] = v
        q = sdpa(q, keys, values)
    return q


@pytest.mark.parametrize(
    ("step", "tokens", "reason"),
    [
        (read_between, 1, "what one of them stores is read before the other"),
        (two_positions, 1, "positions are computed for each"),
        (two_layers, 12, "more than 8 tokens, or an unknown number"),
    ],
)
def test_what_is_stored_one_by_one(step: Any, tokens: int, reason: str) -> None:
    seen = Rewrites()
    mine, theirs = run_both(step, [tokens], seen)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert count(seen.made[0], *STORES) == 4 and count(seen.made[0], *BY_ONE) == 0
    assert counters["xquant"]["pair_stores"] == 0 and counters["xquant"][UNPAIRED + reason] == 2


def test_the_pass_may_be_off_and_is_for_devices_with_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_kernel, options in ((True, dict(disable=["pair_stores"])), (False, {})):
        if not has_kernel:
            monkeypatch.delitem(ops.BOTH_KERNELS, "cpu")
        run_both(two_layers, [1], seen := Rewrites(**options))
        assert count(seen.made[0], *STORES) == 4 and not any(UNPAIRED in name for name in counters["xquant"])


@pytest.mark.parametrize("name", BOTH)
def test_the_schema_says_what_is_written(name: str) -> None:
    written = {a.name for a in ops.STORE_BOTH[name]._schema.arguments if a.is_write}
    ours = {"codes", "scale", "zero", "ring", "sink", "order", "center", "norm", "length"}
    of_sides = {f"{side}_{each}" for side in "kv" for each in ours} - {f"{side}_codes" for side in name.split("_")}
    assert written == of_sides | {"fault"}


def test_without_a_kernel_sides_are_stored_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not take them says why; plain torch stores the same."""
    monkeypatch.setitem(ops.BOTH_KERNELS, "cpu", ops.BOTH_KERNELS["cpu"]._replace(why_not=lambda a: "too warm"))
    mine, theirs = run_both(two_layers, [5, 1], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert count(seen.made[-1], *BY_ONE) == 2


def test_the_op_is_in_front_of_the_attention() -> None:
    run_both(two_layers, [1], seen := Rewrites())
    targets = [node.target for node in seen.made[0].graph.nodes if node.target in BY_ONE | {ops.DECODE}]
    assert targets == [ops.STORE_BOTH[""], ops.DECODE, ops.STORE_BOTH["k_v"], ops.DECODE]

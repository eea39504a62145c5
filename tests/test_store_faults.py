"""Positions that do not follow what is stored: fault codes of the raw ops, errors of ``KVState``."""

from __future__ import annotations

import math

import pytest
import torch
from bad_positions import BAD, STORED
from states import layers_of
from store_reference import Case
from store_runs import ThroughOps, ThroughState, append
from torch import Tensor

from xquant_fx import CacheStateError
from xquant_fx.cache.state import TENSOR_NAMES, KVState
from xquant_fx.kernels.faults import FAULTS, Fault

SIDES = pytest.mark.parametrize("side", ["key", "value"])


def filled(case: Case, stored: int = STORED) -> ThroughState:
    layers = ThroughState(case)
    for layer in (0, 1):
        layers.step(layer, 0, case.tokens(stored, layer))
    return layers


def everything(states: list[KVState]) -> list[Tensor]:
    tensors = [state.tensor(name) for state in states for name in TENSOR_NAMES]
    return [t.clone() for t in tensors if t is not None]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Equal, NaN included."""
    return all(torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) for a, b in zip(before, after, strict=True))


@SIDES
@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("what", BAD)
def test_raw_ops_leave_a_fault_code(side: str, bits: int, what: str) -> None:
    """And index nothing out of bounds, whatever the residual length: that would end a CUDA context."""
    stored, positions, fault = BAD[what]
    for residual in (4, 16):
        case = Case(side=side, bits=bits, residual=residual)
        for state in filled(case, stored).states:
            append(state, case.tokens(len(positions), 5), torch.tensor(positions))
            if bits == 16 and fault == Fault.ROLLED_BACK_TOO_FAR:  # rolls back any number of tokens
                assert state.tensor("fault").tolist() == [0]
                continue
            assert state.tensor("fault").tolist() == [fault]
            with pytest.raises(CacheStateError, match=r"contents are no longer right.*reset"):
                state.group.faults.check()
            state.reset()
            state.group.faults.check()


@SIDES
@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("stored, new", [(60, 1), (60, 9), (20, 1), (9, 8), (60, 60), (20, 9), (8, 1)])
def test_a_cache_starts_over_after_reset_or_where_it_cannot_be_a_rotating_buffer(
    side: str, bits: int, stored: int, new: int
) -> None:
    """A rotating buffer's position goes back to 0, too, and what it holds is still meant to be seen."""
    case = Case(side=side, bits=bits)
    state = filled(case, stored).states[0]
    again = case.tokens(new, 5), torch.arange(new)
    if (stored, new) in ((60, 1), (60, 9), (20, 1), (9, 8)):
        with pytest.raises(CacheStateError, match="position 0 starts a sequence anew only after reset"):
            state.store(*again)
        state.reset()
    append(state, *again)
    assert state.tensor("fault").tolist() == [0] and state.length == new


@SIDES
@pytest.mark.parametrize(
    "positions", [[20], [20, 21, 22], list(range(20, 60)), [12], list(range(19, 30)), list(range(9))]
)
def test_raw_ops_leave_no_fault_code_for_steps_that_follow(side: str, positions: list[int]) -> None:
    case = Case(side=side)
    layers = ThroughOps(case)
    layers.step(0, 0, case.tokens(STORED, 0))
    layers.step(0, positions[0], case.tokens(len(positions), 1))  # asserts that the code is 0
    assert layers.states[0].length == positions[-1] + 1


@SIDES
@pytest.mark.parametrize(
    ("bits", "what"),
    [(bits, what) for bits in (2, 16) for what in BAD if bits == 2 or BAD[what].fault != Fault.ROLLED_BACK_TOO_FAR],
)
def test_a_state_refuses_them_and_changes_nothing(side: str, bits: int, what: str) -> None:
    stored, positions, fault = BAD[what]
    case = Case(side=side, bits=bits)
    states = filled(case, stored).states
    before = everything(states)
    for state in states:
        with pytest.raises(CacheStateError) as caught:
            state.store(case.tokens(len(positions), 5), torch.tensor(positions))
        for word in (FAULTS[fault], f"layer {state.spec.layer} {side}s", str(positions[0]), str(state.length)):
            assert word in str(caught.value)
    assert same(before, everything(states))


@SIDES
def test_the_upper_layer_waits_for_the_lower_one(side: str) -> None:
    case = Case(side=side)
    lower, upper = filled(case).states
    before = everything([lower, upper])
    with pytest.raises(CacheStateError, match=r"layer 1 .*layer 0 lends its codes and must be written first"):
        upper.store(case.tokens(2, 5), torch.tensor([20, 21]))
    assert same(before, everything([lower, upper]))
    lower.store(case.tokens(2, 5), torch.tensor([20, 21]))
    upper.store(case.tokens(2, 5), torch.tensor([20, 21]))


@SIDES
def test_at_most_8_tokens_roll_back_or_all(side: str) -> None:
    case = Case(side=side)
    states = filled(case).states
    before = everything(states)
    for state in states:
        with pytest.raises(CacheStateError, match=f"layer {state.spec.layer}.*8 tokens.*asked for 9 of 20"):
            state.truncate(11)
    assert same(before, everything(states))
    for state in states:
        state.truncate(12)
        assert state.length == 12
    states = filled(case).states
    for state in states:
        state.truncate(0)
        state.store(case.tokens(3, 5), torch.arange(3))
        assert torch.equal(state.load(3), case.tokens(3, 5))


def test_16_bit_storage_rolls_back_any_number() -> None:
    state = filled(Case(bits=16)).states[0]
    state.truncate(2)
    state.store(Case().tokens(1, 5), torch.tensor([2]))
    assert state.length == 3


@SIDES
def test_reset_forgets_everything_but_the_padding(side: str) -> None:
    case = Case(side=side, padding=(0, 3), sinks=1)
    states = filled(case).states
    for state in states:
        state.reset()
        assert not any(t.any() for t in state.owned.values())
        assert not state.load(case.max_len).any()
    assert states[0].group.start.tolist() == [0, 3]


@SIDES
def test_reorder_selects_rows_of_everything(side: str) -> None:
    case = Case(side=side, batch=3, sinks=2)
    states = filled(case).states
    before = []
    for state in states:
        state.group.drop()
        before.append(state.load(STORED))
    index = torch.tensor([2, 0, 0])
    for state, dense in zip(states, before, strict=True):
        state.reorder(index)
        assert torch.equal(state.load(STORED), dense[index])


def test_a_fresh_state_is_all_zeros_and_reads_as_zeros() -> None:
    for bits in (1, 16):
        case = Case(bits=bits, padding=(2,))
        state = layers_of(case.config, case.shape, case.dtype, start=case.start)[0][case.side == "value"]
        assert state.length == 0 and not state.load(case.max_len).any()
        assert state.group.start.tolist() == [2, 0]
        for tensor in state.owned.values():
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)
        assert not state.load(case.max_len).any()


@pytest.mark.parametrize("side", ["key", "value"])
def test_rollbacks_count_from_the_furthest_token(side: str) -> None:
    """Twice eight tokens back are sixteen, by truncating and by position, eagerly and in the raw op."""
    for how in ("truncate", "position"):
        case = Case(side=side, bits=2, residual=8)
        state = filled(case, 40).states[0]
        state.truncate(32)
        with pytest.raises(CacheStateError, match="rolled back"):
            if how == "truncate":
                state.truncate(24)
            else:
                state.store(case.tokens(1, 7), torch.tensor([25]))
        append(state, case.tokens(1, 7), torch.tensor([25]))
        assert state.tensor("fault").item() == Fault.ROLLED_BACK_TOO_FAR


def test_every_fault_has_a_sentence() -> None:
    assert set(FAULTS) == set(Fault) and len(set(FAULTS.values())) == len(Fault)

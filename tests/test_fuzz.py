"""Decoders drawn at random, beside eager code (``tests/fuzz``): a short run, and what longer ones found."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from fuzz.campaign import PLAIN, Campaign, script, smaller
from fuzz.case import Case
from fuzz.comparison import Outcome, program_of, run
from hypothesis import strategies as st

SECONDS = 20
#: A case of the plainest choices.
USUAL = Case(**{field.name: PLAIN.get(field.name) for field in dataclasses.fields(Case) if field.name != "events"},
             events=(9, 1, 1, 1))  # fmt: skip


def case(**choices) -> Case:
    """The plainest case with these choices."""
    return dataclasses.replace(USUAL, **choices)


def test_a_short_run() -> None:
    """The first cases of the first seed: what does not fit into the time is left for `make fuzz`."""
    end, said = time.monotonic() + SECONDS, []
    campaign = Campaign(None, 0, said.append)
    campaign.run(lambda: time.monotonic() > end or campaign.counts["cases"] >= 40)
    assert not campaign.failures, "\n".join(said)
    assert campaign.counts["right"] and campaign.counts["quantized"] and campaign.counts["fused"]


@pytest.mark.parametrize("bits", [16, 4])
def test_a_wrong_program_is_found(bits, monkeypatch) -> None:
    """The plainest case is right, and not if attention is scaled by another number."""
    from xquant_fx.passes import fuse_decode

    assert run(case(bits=bits)) == Outcome("right", "", 2, 2, int(bits == 4), (), 2)
    build = fuse_decode.build_mask
    monkeypatch.setattr(fuse_decode, "build_mask", lambda *a: None if a[1] else build(*a))
    found = run(case(bits=bits))
    assert found.kind == ("wrong" if bits == 4 else "right") and (bits == 16 or "the same contents" in found.detail)

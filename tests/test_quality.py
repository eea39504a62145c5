"""The measures of quality, on cases worked out by hand, and teacher forcing through generate()."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import StaticCache

from xquant_fx.reports.quality import Agreement, agreement, kl_divergence, teacher_forced_logits, top1_agreement


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], Agreement(None, 1.0)),
        ([1, 2, 3, 4], [1, 9, 3, 9], Agreement(1, 0.5)),
        ([1, 2, 3, 4], [1, 2], Agreement(2, 0.5)),
        ([1, 2], [1, 2, 3, 4], Agreement(2, 0.5)),
        ([1, 2], [9, 2, 3, 4], Agreement(0, 0.25)),
        ([], [], Agreement(None, 1.0)),
        ([], [1], Agreement(0, 0.0)),
    ],
)
def test_agreement(a, b, expected):
    assert agreement(torch.tensor(a), torch.tensor(b)) == expected


def test_agreement_wants_one_dimension():
    with pytest.raises(ValueError, match=r"one dimension, got \(1, 2\)"):
        agreement(torch.zeros(1, 2), torch.zeros(2))


def test_top1_agreement():
    a = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 5.0], [0.0, 5.0]])
    b = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 0.1], [1.0, 0.0]])
    assert top1_agreement(a, b) == 0.5


def test_kl_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    logits = (p.double().log() + 7, q.double().log() - 3)  # the same distributions, other constants
    assert kl_divergence(*logits) == pytest.approx(expected, rel=1e-12)
    same_and_other = torch.stack([logits[0], logits[1]])
    assert kl_divergence(torch.stack([logits[0]] * 2), same_and_other) == pytest.approx(expected / 2)


def test_kl_divergence_of_equal_logits_is_zero():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 20
    assert kl_divergence(logits, logits) == 0.0
    assert kl_divergence(logits, logits + 2.5) == pytest.approx(0.0, abs=1e-6)


def test_kl_divergence_with_impossible_tokens():
    impossible = torch.tensor([0.0, -torch.inf])
    assert kl_divergence(impossible, torch.zeros(2)) == pytest.approx(math.log(2))
    assert kl_divergence(torch.zeros(2), impossible) == math.inf


def test_kl_divergence_keeps_nan():
    assert math.isnan(kl_divergence(torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [math.nan, 0.0]])))


@pytest.mark.parametrize("measure", [top1_agreement, kl_divergence])
def test_logits_must_have_one_shape(measure):
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(1, 3\)"):
        measure(torch.zeros(2, 3), torch.zeros(1, 3))


def test_teacher_forced_logits_are_those_of_one_pass(tiny_llama):
    model = tiny_llama(layers=2)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    cache = StaticCache(model.config, max_cache_len=24)
    got = teacher_forced_logits(model, ids, 10, past_key_values=cache)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, 9:-1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

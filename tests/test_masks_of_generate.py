"""Prompts whose masks are as wide as a cache of a fixed length, which ``generate()`` makes before it calls a model:
attention gets the prompt's keys alone, in models, too, that make others of them first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import OLD_BLOOM, tiny
from test_later_prompts import Run, graphs
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from torch import Tensor
from transformers import StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.compiler.untraced import _cut_masks

PROMPT, ROOM = 20, 48
FULL = XQuantConfig.preset("full")


def padded(model: Any) -> dict[str, Tensor]:
    """Two prompts, the second one 6 tokens shorter."""
    ids = torch.arange(3, 3 + 2 * PROMPT).view(2, PROMPT) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return dict(input_ids=ids, attention_mask=mask)


def logits_of(model: Any, **given: Any) -> Tensor:
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.stack(model.generate(**padded(model), **options, **given).logits)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param("bloom", "eager", marks=OLD_BLOOM),  # scores and biases by baddbmm
        ("deepseek_v3", "eager"),  # keys of latents, by linear layers
        ("deepseek_v3", "sdpa"),
        ("llama", "eager"),
    ],
)
def test_static_caches_of_generate(name: str, attention: str) -> None:
    model = tiny(name, attention)
    expected = logits_of(model)
    run = Run(model, preset="full")
    model.forward = run.call
    for _ in range(2):
        torch.testing.assert_close(logits_of(model, cache_implementation="static"), expected, rtol=1e-4, atol=1e-5)
    assert graphs() > 0  # of steps


@OLD_BLOOM
def test_biases_as_wide_as_an_xquant_cache() -> None:
    model = tiny("bloom", "eager")
    expected = logits_of(model)
    found = logits_of(model, past_key_values=XQuantCache(model.config, ROOM, FULL))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_masks_as_wide_as_a_cache_are_cut() -> None:
    wide, other, short = torch.ones(1, 1, PROMPT, ROOM), torch.ones(1, ROOM + 1), torch.ones(2, PROMPT)
    for mask in (wide, torch.ones(1, ROOM)):
        kwargs: dict[str, Any] = dict(attention_mask=mask, encoder_attention_mask=mask, input_ids=mask)
        _cut_masks(kwargs, {ROOM}, PROMPT)
        assert kwargs["attention_mask"].shape == (*mask.shape[:-1], PROMPT)
        assert kwargs["encoder_attention_mask"] is kwargs["input_ids"] is mask
    by_kind = dict(full_attention=wide, sliding_attention=other, none=None)
    kwargs = dict(attention_mask=by_kind)
    _cut_masks(kwargs, {ROOM, 8}, PROMPT)
    assert kwargs["attention_mask"]["full_attention"].shape[-1] == PROMPT and by_kind["full_attention"] is wide
    assert kwargs["attention_mask"]["sliding_attention"] is other and kwargs["attention_mask"]["none"] is None
    for kept, widths in ((other, {ROOM}), (short, {ROOM, PROMPT}), (wide, set()), (torch.ones(ROOM), {ROOM})):
        _cut_masks(kwargs := dict(attention_mask=kept), widths, PROMPT)
        assert kwargs["attention_mask"] is kept
    _cut_masks(kwargs := {}, {ROOM}, PROMPT)
    assert not kwargs


def test_a_static_cache_that_is_given() -> None:
    """Its prompt's mask is the program's own, in four dimensions."""
    model = tiny("deepseek_v3", "sdpa")
    run, ids = Run(model, preset="full"), padded(model)["input_ids"]
    mask = torch.ones(PROMPT, ROOM, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        expected = model(ids).logits
        found = run(ids, StaticCache(model.config, max_cache_len=ROOM), attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

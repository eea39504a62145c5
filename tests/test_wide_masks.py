"""4D masks that the caller brings, as wide as the cache: a first prompt takes them, as it does of a ``StaticCache``."""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import tiny
from stepping import interpreted, logits_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, StaticCache

from xquant_fx import XQuantCache, XQuantConfig

CONFIG = XQuantConfig.preset("xquant").replace(k_group_size=8, residual_length=8)
MODEL = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
WIDTH, PROMPT, TOKENS = 64, 20, 23
X = torch.randn(2, TOKENS, 128, generator=torch.Generator().manual_seed(0))


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def spelt_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25 + added, -1) @ v


def attentions(attend):
    """Two layers of attention, 4 heads over 2, that take the mask as it is given."""

    def step(x: Tensor, mask: Tensor, cache) -> Tensor:
        heads = x.unflatten(2, (8, 16)).transpose(1, 2)
        for layer in range(2):
            keys, values = (t.repeat_interleave(2, 1) for t in cache.update(heads[:, 4:6], heads[:, 6:], layer))
            heads = torch.cat([attend(heads[:, :4], keys, values, mask), heads[:, 4:].flip(3)], 1)
        return heads

    return step


def masks(kind: str) -> Tensor:
    """[2, 1, tokens, WIDTH]: what each sees."""
    at = torch.arange(WIDTH)
    seen = (at <= at[:TOKENS, None]).expand(2, 1, TOKENS, WIDTH).clone()
    if kind == "padding":
        seen[1, :, :, :5] = False
    elif kind == "hidden columns":
        seen[:, :, 4:, :4] = False
    return seen | torch.eye(TOKENS, WIDTH, dtype=torch.bool)  # a row that sees nothing is NaN


@torch.no_grad()
def run(step, cache, mask: Tensor, narrow: bool = False) -> Tensor:
    """A prompt, whose mask is as wide as itself if ``narrow``, and single tokens."""
    out = [step(X[:, :PROMPT], mask[:, :, :PROMPT, : PROMPT if narrow else WIDTH], cache)]
    out += [step(X[:, t : t + 1], mask[:, :, t : t + 1], cache) for t in range(PROMPT, TOKENS)]
    return torch.cat(out, 2)


@pytest.mark.parametrize("attend", [pytest.param(sdpa, marks=pytest.mark.slow), spelt_out])
def test_a_first_prompt_and_what_follows(attend) -> None:
    plain = attentions(attend)
    step = torch.compile(plain, backend=interpreted(self_check=False), fullgraph=True, dynamic=False)
    full, cache = (XQuantCache(MODEL, WIDTH, config) for config in (XQuantConfig.preset("full"), CONFIG))
    for mask in map(masks, ("causal", "padding", "hidden columns")):
        exact = run(plain, StaticCache(MODEL, WIDTH), mask)
        torch.testing.assert_close(run(step, full, mask), exact)
        eager = run(plain, XQuantCache(MODEL, WIDTH, CONFIG), mask)
        torch.testing.assert_close(eager[:, :, :PROMPT], exact[:, :, :PROMPT])
        assert (eager[:, :, PROMPT:] - exact[:, :, PROMPT:]).abs().max() > 1e-2, "what follows reads codes"
        torch.testing.assert_close(run(step, cache, mask), eager)
        full.reset()
        cache.reset()
    torch.testing.assert_close(run(step, cache, mask, narrow=True), eager)  # masks as wide as the prompt


def test_of_a_model_of_hugging_face() -> None:
    model, ids = tiny("llama", "eager", max_position_embeddings=WIDTH), torch.arange(40).view(2, 20) + 3
    mask = torch.where(masks("padding")[:, :, :20], 0.0, torch.finfo(torch.float32).min)
    step = torch.compile(model.forward, backend=interpreted(self_check=False), fullgraph=True)
    made = [
        logits_of(each, ids, cache, attention_mask=mask)
        for each, cache in ((step, XQuantCache(model.config, WIDTH)), (model.forward, StaticCache(model.config, WIDTH)))
    ]
    torch.testing.assert_close(*made)

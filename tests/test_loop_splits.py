"""Masks that read something for each block of tokens, in lengths that are no multiple of a block, by Inductor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import relative_error
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from xquant_fx.cache.kv_tensor import QuantizedKV

LENGTH, BLOCK, CHUNK = 300, 128, 16
Buffers = tuple[Tensor, Tensor]


def blocks_of(pos: Tensor) -> Any:
    """As flex attention is given them: the first token's block and those up to the position's."""
    return create_block_mask(lambda b, h, q, kv: kv <= pos[q], 1, 1, 1, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)


def by_blocks(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, blocks: Any) -> Tensor:
    return flex_attention(q, keys, values, block_mask=blocks)


def by_chunks(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, blocks: Any) -> Tensor:
    """A mask written out: the chunk of the position, as far as it is there."""
    tokens = torch.arange(LENGTH)
    seen = (tokens <= pos) & (tokens // CHUNK == pos // CHUNK)
    return scaled_dot_product_attention(q, keys, values, attn_mask=seen[None, None, None])


@pytest.mark.parametrize("attend", [by_blocks, by_chunks])
@torch.no_grad()
def test_the_last_tokens_of_a_mask_by_blocks_are_computed(attend: Any) -> None:
    """Inductor left them to what the memory held: tokens that are not there yet, and NaN."""

    def step(q: Tensor, k: Tensor, v: Tensor, buffers: Buffers, pos: Tensor, blocks: Any) -> Tensor:
        keys, values = buffers
        keys[:, :, pos] = k
        values[:, :, pos] = v
        return attend(q, keys, values, pos, blocks)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="xquant", options={"preset": "full"}, dynamic=False)
    mine: Buffers = (torch.zeros(1, 2, LENGTH, 32), torch.zeros(1, 2, LENGTH, 32))
    theirs = copy.deepcopy(mine)
    for at in range(4):
        args, pos = torch.randn(3, 1, 2, 1, 32).unbind(), torch.tensor([at])
        outs = [f(*args, buffers, pos, blocks_of(pos)) for f, buffers in ((compiled, mine), (step, theirs))]
        assert relative_error(*outs) < 1e-6
    assert isinstance(mine[0], QuantizedKV)

"""Flex attention of a few tokens over quantized buffers: fused under the mask of mask_mod, score_mod and blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from rewrites import Rewrites, count, quantized_layers
from stepping import interpreted, relative_error
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from xquant_fx import XQuantCache, ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:.*return_lse"),
]
pytest_plugins = ["plain_torch"]
B, HEADS, KV, N, D = 2, 4, 2, 48, 8
FLEX = torch.ops.higher_order.flex_attention
DOCUMENTS = torch.arange(2 * N).reshape(2, N) // 20
SEEN = torch.rand(B, HEADS, 3, N, generator=torch.Generator().manual_seed(0)) < 0.7


def causal(pos):
    return lambda b, h, q, kv: kv <= pos[0] + q


def window_and_sinks(pos):
    return lambda b, h, q, kv: ((kv <= pos[q]) & (pos[q] - kv < 9)) | (kv < 2)


def documents(pos):
    return lambda b, h, q, kv: (DOCUMENTS[b, kv] == DOCUMENTS[b, pos[q]]) & (kv <= pos[q])


def by_rows_of_a_table(pos):
    return lambda b, h, q, kv: (DOCUMENTS[b][kv] == DOCUMENTS[b][pos[q]]) & (kv <= pos[q])


def of_each_head(pos):
    return lambda b, h, q, kv: torch.where(h < 2, kv <= pos[q], (kv <= pos[q]) & (kv % 2 == 0) | (kv == 0))


def of_each_pair(pos):
    return lambda b, h, q, kv: (SEEN[b, h, q, kv] | (kv == 0)) & (kv <= pos[q])


MASKS = [causal, window_and_sinks, documents, by_rows_of_a_table, of_each_head, of_each_pair]


def attend(q, k, v, blocks):
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)


def by_score_mod(q, k, v, blocks):
    hide = lambda score, b, h, i, j: torch.where(blocks.mask_mod(b, h, i, j), score, -float("inf"))  # noqa: E731
    return flex_attention(q, k, v, score_mod=hide, scale=0.3, enable_gqa=True)


def layers_of(tokens: int, count: int = 2):
    """Layers with ``tokens`` tokens, quantized, a copy of them, and the next step's queries, keys and values."""
    layers, generator = quantized_layers(shape=(B, KV, N, D))[:count], torch.Generator().manual_seed(1)
    for keys, values in layers:
        for buffer in (keys, values):
            buffer[:, :, :tokens] = torch.randn(B, KV, tokens, D, generator=generator)
        keys.state.group.drop()
    return layers, copy.deepcopy(layers), lambda heads, n: torch.randn(B, heads, n, D, generator=generator)


def decoder(read):
    def step(q, k, v, layers, pos, blocks):
        for keys, values in layers:
            keys[:, :, pos], values[:, :, pos] = k, v
            q = q + read(q, keys, values, blocks)
        return q

    return step


def check(step, mask=causal, tokens: int = 1, fused: int = 2, layers: int = 2):
    """One step beside the same one run eagerly on a copy, which attends to dequantized keys and values; its graph."""
    expected = fused, layers - fused
    layers, twin, random = layers_of(30, layers)
    made, pos = Rewrites(), torch.arange(30, 30 + tokens)
    blocks = create_block_mask(mask(pos), B, HEADS, tokens, N, device="cpu", BLOCK_SIZE=16)
    args = random(HEADS, tokens), random(KV, tokens), random(KV, tokens)
    with torch.no_grad():
        got = torch.compile(step, backend=made, dynamic=False)(*args, layers, pos, blocks)
        assert relative_error(got, step(*args, twin, pos, blocks)) < 1e-5
    (graph,) = made.made
    assert (count(graph, ops.DECODE), count(graph, FLEX)) == expected
    return graph


# One token and several layers are in the tests below, too.
@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, tokens):
    check(decoder(attend), mask, tokens, 1, 1)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("mask", [pytest.param(causal, marks=pytest.mark.slow), documents])
def test_a_score_mod_that_hides(mask):
    check(decoder(by_score_mod), mask, 3, 1, 1)


@pytest.mark.usefixtures("plain_torch")
def test_layers_share_a_mask():
    graph = check(decoder(attend), window_and_sinks)
    assert len({node.kwargs["mask"] for node in graph.graph.nodes if node.target is ops.DECODE}) == 1


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    "write", [pytest.param(lambda seen: seen.add_(5), marks=pytest.mark.slow), lambda seen: seen[:1].mul_(2)]
)
def test_layers_do_not_share_a_mask_whose_table_changes(write):
    def step(q, k, v, layers, pos, blocks):
        limit = torch.full((1,), 10)
        for keys, values in layers:
            keys[:, :, pos], values[:, :, pos] = k, v
            hide = lambda s, b, h, i, j: torch.where(j <= limit[0], s, -float("inf"))  # noqa: E731
            q = q + flex_attention(q, keys, values, score_mod=hide, enable_gqa=True)
            write(limit)
        return q

    check(step)


def test_no_mask_and_heads_of_their_own():
    def step(q, k, v, layers, pos, blocks):
        for keys, values in layers:
            keys[:, :, pos], values[:, :, pos] = k, v
            q = q[:, :KV] + flex_attention(q[:, :KV], keys, values)
        return q

    check(step, fused=1, layers=1)


def test_a_block_mask_of_the_whole_text_is_cut_for_each_step():
    """As gpt-fast does."""
    whole = create_block_mask(lambda b, h, q, kv: kv <= q, None, None, N, N, device="cpu", BLOCK_SIZE=16)

    def step(q, k, v, layers, pos, blocks):
        blocks = whole[:, :, pos // 16]
        blocks.mask_mod, blocks.seq_lengths = (lambda b, h, i, j: j <= i + pos[0]), (1, N)
        for keys, values in layers:
            keys[:, :, pos], values[:, :, pos] = k, v
            q = q + flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)
        return q

    check(step, fused=1, layers=1)


def test_what_blocks_list_counts():
    """Blocks that are not listed hide, full ones show, whatever the mask_mod says: as flex attention's kernels do."""
    layers, twin, random = layers_of(40)
    counts, listed = torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([[[[1, 0, 2]]]], dtype=torch.int32)
    full = torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([[[[0, 1, 2]]]], dtype=torch.int32)
    even = lambda b, h, i, j: j % 2 == 0  # noqa: E731
    blocks = BlockMask.from_kv_blocks(counts, listed, *full, BLOCK_SIZE=16, mask_mod=even, seq_lengths=(1, N))

    def step(q, k, v, layers, pos, blocks):
        for keys, values in layers:
            keys[:, :, pos], values[:, :, pos] = k, v
            q = q + flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)
        return q

    args, pos, made = (random(HEADS, 1), random(KV, 1), random(KV, 1)), torch.tensor([40]), Rewrites()
    token = torch.arange(N)
    mask = (token < 16) | (token < 32) & (token % 2 == 0)
    with torch.no_grad():
        got = torch.compile(step, backend=made, dynamic=False)(*args, layers, pos, blocks)
        want = args[0]
        for keys, values in twin:
            keys[:, :, pos], values[:, :, pos] = args[1:]
            sdpa = torch.nn.functional.scaled_dot_product_attention
            want = want + sdpa(want, keys.dense(), values.dense(), mask[None], enable_gqa=True)
    assert count(made.made[0], ops.DECODE) == 2 and relative_error(got, want) < 1e-5


def capped(q, k, v, blocks):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: 5 * torch.tanh(s / 5), enable_gqa=True)


def biased(q, k, v, blocks):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s - 0.1 * (i - j), enable_gqa=True)


def by_scores(q, k, v, blocks):
    hide = lambda s, b, h, i, j: torch.where(s > -1, s, -float("inf"))  # noqa: E731
    return flex_attention(q, k, v, score_mod=hide, enable_gqa=True)


def hiding(seen):
    return lambda s, b, h, i, j: torch.where(seen(b, h, i, j), s, -float("inf"))


def not_elementwise(q, k, v, blocks):
    hide = hiding(lambda b, h, i, j: j <= DOCUMENTS.cumsum(1)[0, 30] + i)
    return flex_attention(q, k, v, score_mod=hide, enable_gqa=True)


def a_row_is_summed(q, k, v, blocks):
    return flex_attention(q, k, v, score_mod=hiding(lambda b, h, i, j: j <= DOCUMENTS[b].sum()), enable_gqa=True)


def reads_logsumexp(q, k, v, blocks):
    out, lse = flex_attention(q, k, v, enable_gqa=True, return_lse=True)
    return out + lse[..., None]


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (capped, "its score_mod is no torch.where(seen, score, -inf)"),
        pytest.param(biased, "its score_mod is no torch.where(seen, score, -inf)", marks=pytest.mark.slow),
        (by_scores, "its score_mod is no torch.where(seen, score, -inf)"),
        (not_elementwise, "its mask_mod has a cumsum, which is not known to work element by element"),
        pytest.param(
            a_row_is_summed,
            "its mask_mod has a sum, which is not known to work element by element",
            marks=pytest.mark.slow,
        ),
        (reads_logsumexp, "its logsumexp or its largest scores are read"),
    ],
)
def test_others_stay_flex_attention(read, why, caplog):
    with caplog.at_level("INFO", logger="xquant_fx"):
        check(decoder(read), fused=0, layers=1)
    assert f"reads dequantized keys and values: flex_attention stays: {why}" in caplog.text


def test_a_long_step_stays_flex_attention(caplog):
    with caplog.at_level("INFO", logger="xquant_fx"):
        check(decoder(attend), tokens=9, fused=0, layers=1)
    assert "flex_attention stays: the step has 9 tokens, more than 8" in caplog.text


@pytest.mark.parametrize("turned", [False, True])
def test_the_output_lies_as_flex_attention_makes_it(turned):
    """What is viewed behind it stays a view, in steps of several tokens too."""

    def step(q, k, v, layers, pos, blocks):
        (keys, values), (others, more) = layers
        for buffer, x in ((keys, k), (values, v), (others, k), (more, v)):
            buffer[:, :, pos] = x
        q = q.transpose(1, 2).contiguous().transpose(1, 2) if turned else q
        out = attend(q, keys, values, blocks) + attend(q, others, more, blocks)
        return out.transpose(1, 2).view(B, -1, HEADS * D) if turned else out.view(B, HEADS, -1)

    check(step, tokens=3)


def test_ordinary_buffers_at_16_bits():
    step, caches = decoder(attend), [[tuple(torch.zeros(2, B, KV, N, D)) for _ in range(2)] for _ in range(2)]
    compiled = torch.compile(step, backend=interpreted(preset="full"), dynamic=False)
    with torch.no_grad():
        for p in range(3):
            args, pos = (torch.randn(B, HEADS, 1, D), *torch.randn(2, B, KV, 1, D)), torch.tensor([p])
            blocks = create_block_mask(causal(pos), B, HEADS, 1, N, device="cpu", BLOCK_SIZE=16)
            outs = [f(*args, cache, pos, blocks) for f, cache in zip((compiled, step), caches, strict=True)]
            assert relative_error(*outs) < 1e-6


@pytest.mark.usefixtures("plain_torch")
def test_a_step_after_chunks():
    """Dynamo leaves numbers of tokens open by then, and does not know that queries are as many as keys."""
    graphs, step, at = [], decoder(attend), 0
    compiled = torch.compile(step, backend=interpreted(graphs, k_bits=8, v_bits=8))
    mine, theirs = ([[torch.zeros(B, KV, N, D) for _ in range(2)]] for _ in range(2))
    with torch.no_grad():
        for tokens in (1, 9, 11, 3):
            pos = torch.arange(at, at + tokens)
            blocks = create_block_mask(causal(pos), B, HEADS, tokens, N, device="cpu", BLOCK_SIZE=16)
            args = torch.randn(B, HEADS, tokens, D), *torch.randn(2, B, KV, tokens, D)
            outs = [f(*args, cache, pos, blocks) for f, cache in ((compiled, mine), (step, theirs))]
            assert relative_error(*outs) < 1e-4
            at += tokens
    assert count(graphs[-1], ops.DECODE) == 1


@torch.no_grad()
def test_masks_of_transformers_count_tokens_once(tiny_llama):
    """They read how many tokens there are when a step has added its own: of an ``XQuantCache`` it is a copy."""
    model, plain = tiny_llama(layers=2, attn_implementation="flex_attention"), tiny_llama(layers=2)
    ids = torch.arange(3, 31)[None]
    cache = XQuantCache(model.config, 64)  # its residual window holds them all
    plain(ids[:, :20], past_key_values=cache)
    step = torch.compile(model.forward, backend=interpreted(self_check=False), dynamic=False)
    parts = ids[:, 20:].split([1, 7], 1)
    got = torch.cat([step(part, past_key_values=cache).logits for part in parts], 1)
    expected = plain(ids).logits[:, 20:]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_number_of_tokens_that_was_asked_for_stays(tiny_llama):
    model, ids = tiny_llama(layers=1), torch.arange(3, 40)[None]
    cache = XQuantCache(model.config, 64)
    assert cache.get_seq_length() == 0
    model(ids, past_key_values=cache)
    held = cache.get_seq_length()
    cache.crop(-5)
    assert held == 37 and cache.get_seq_length() == 32

"""Attentions that are found to read a KV cache that can be quantized."""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import (
    OLD_BLOOM,
    SHAPE,
    FastModel,
    buffers,
    decode_sites,
    fresh,
    graphs_of,
    roles,
    sites_in,
    sites_of,
    tiny,
)
from torch.nn.attention.flex_attention import flex_attention
from transformers import StaticCache

from xquant_fx.passes.products import query_tokens

sdpa = torch.nn.functional.scaled_dot_product_attention
B, H, N, D = SHAPE
MASK = torch.zeros(1, 1, 1, N)


@pytest.mark.parametrize(
    "name, attention, path",
    [
        ("llama", "sdpa", "getitem expand reshape"),
        pytest.param("llama", "eager", "getitem expand reshape transpose", marks=pytest.mark.slow),  # gemma2's
        ("gpt2", "sdpa", ""),
        pytest.param("gpt2", "eager", "transpose", marks=pytest.mark.slow),  # falcon's
        pytest.param("falcon", "sdpa", "", marks=pytest.mark.slow),  # gpt2's
        ("falcon", "eager", "transpose"),  # divides the scores in place
        pytest.param("phi", "sdpa", "getitem expand reshape", marks=pytest.mark.slow),  # llama's
        ("codegen", "eager", "to transpose"),
        pytest.param("bloom", "eager", "reshape transpose", marks=OLD_BLOOM),  # baddbmm with the position bias
        ("gemma2", "eager", "getitem expand reshape transpose"),  # caps the scores with tanh
        ("gpt_oss", "eager", "getitem expand reshape transpose"),  # appends sinks to the scores
    ],
)
def test_static_cache_of_hugging_face(name, attention, path):
    model = tiny(name, attention)
    sites = decode_sites(model, StaticCache(config=model.config, max_cache_len=32))
    assert [site.buffer_name.split(".", 1)[1] for site in sites] == ["layers[0].keys", "layers[1].keys"]
    for site in sites:
        assert (site.reason, site.has_cache, site.allocated_here) == ("", True, False)
        assert roles(site) == ("keys", "values")
        assert (site.key_write.kind, site.value_write.kind) == ("index_copy_", "index_copy_")
        assert site.key_write.buffer is site.key.root and site.value_write.buffer is site.value.root
        assert " ".join(site.key.path) == path
        fused = site.attention.kind == "scaled_dot_product_attention"
        assert fused == (attention == "sdpa")


def test_gpt_fast_buffers_of_modules():
    sites = sites_of(FastModel(), torch.arange(3, 8)[None], torch.arange(5))
    assert [site.reason for site in sites] == ["", ""]
    assert ["'0'" in site.buffer_name for site in sites] == [True, False]
    assert [roles(site) for site in sites] == [("_buffers['k_cache']", "_buffers['v_cache']")] * 2
    assert {write.kind for s in sites for write in (s.key_write, s.value_write)} == {"indexed assignment"}
    assert sites[0].key.path == ("repeat_interleave",)


def index_copy_keywords(b, pos, x):
    b.index_copy_(dim=-2, index=pos, source=x)


def positions(b, pos, x):
    b[:, :, pos] = x


def ellipsis(b, pos, x):
    b[..., pos, :] = x


def whole_batch(b, pos, x):
    b[:B, 0:H, pos, :D] = x


def narrow_positions(b, pos, x):
    b[:, :, pos.to(torch.int32)] = x


def span(b, pos, x):
    b[:, :, 3:4] = x


def from_the_front(b, pos, x):
    b[:, :, :1] = x


def from_the_end(b, pos, x):
    b[:, :, -2:-1] = x


WRITES = [index_copy_keywords, positions, ellipsis, whole_batch, narrow_positions, span, from_the_front, from_the_end]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_ways_to_append(write):
    def step(q, k, v, keys, values, pos):
        write(keys, pos, k)
        write(values, pos, v)
        return sdpa(q, keys, values)

    (site,) = sites_of(step, *fresh(), *buffers(), torch.tensor([3]))
    assert site.reason == ""
    assert site.key_write.kind == ("index_copy_" if write is index_copy_keywords else "indexed assignment")
    assert site.key_write.x.name == "l_k_" and site.value_write.x.name == "l_v_"
    bounds = {span: slice(3, 4), from_the_front: slice(0, 1), from_the_end: slice(N - 2, N - 1)}
    if write in bounds:
        assert site.key_write.positions == bounds[write]


def grouped(q, k, v):
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    return sdpa(torch.cat([q, q], 1), k, v)


def by_keyword(q, k, v):
    return sdpa(query=q, key=k[:, :, :8], value=v[:, :, :8], scale=1.0)


def functions(q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) / D**0.5 + MASK
    return torch.matmul(torch.nn.functional.dropout(torch.softmax(scores, dim=-1), 0.1, training=False), v)


def operators_in_place(q, k, v):
    scores = q @ k.mT
    scores *= D**-0.5
    scores.add_(MASK).clamp_(min=-100)
    return scores.softmax(-1).to(q.dtype) @ v


def einsum(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(MASK < 0, -1e9)
    return torch.einsum("bhqk,bhkd->bqhd", torch.nn.functional.softmax(scores.float(), -1), v)


def einsum_keys_first(q, k, v):
    scores = torch.where(MASK < 0, -1e9, torch.einsum("bhkd,bhqd->bhqk", k, q))
    return torch.einsum("bhkd,bhqk->bqhd", v, scores.softmax(-1))


def products_of_three_dimensions(q, k, v):
    q, k, v = (t.reshape(B * H, -1, D) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(B * H, 1, N), q, k.transpose(1, 2), beta=1.0, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v)


def softcap(q, k, v):
    return torch.softmax(torch.tanh(q @ k.transpose(-1, -2) / 30) * 30, dim=-1) @ v


def sinks(q, k, v):
    scores = torch.cat([q @ k.transpose(-1, -2), torch.zeros(B, H, 1, 1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


READS = [grouped, by_keyword, functions, operators_in_place, einsum, einsum_keys_first, products_of_three_dimensions]


@pytest.mark.parametrize("read", [*READS, softcap, sinks, flex_attention], ids=lambda read: read.__name__)
def test_ways_to_attend(read):
    def step(q, k, v, keys, values, pos):
        keys[:, :, pos] = k
        values[:, :, pos] = v
        return read(q, keys, values)

    (site,) = sites_of(step, *fresh(), *buffers(), torch.tensor([3]))
    assert site.reason == ""
    assert (site.key.root.name, site.value.root.name) == ("l_keys_", "l_values_")


def test_buffer_that_two_attentions_read():
    def step(q, k, v, keys, values, pos):
        keys.index_copy_(2, pos, k)
        values.index_copy_(2, pos, v)
        return sdpa(q, keys, values) + sdpa(q + 1, keys, values)

    sites = sites_of(step, *fresh(), *buffers(), torch.tensor([3]))
    assert [site.reason for site in sites] == ["", ""]
    assert sites[0].key.root is sites[1].key.root


@torch.no_grad()
def test_a_list_of_numbers_that_is_written_to_is_no_cache():
    """It has no tokens, whatever it is joined to."""

    def step(counts, pos, x):
        counts[pos] = 1.0
        return torch.cat([counts, x]).sum() + x

    torch._dynamo.reset()
    given = torch.tensor([0.0, 3.0]), torch.tensor([1]), torch.ones(2)
    expected = step(given[0].clone(), *given[1:])
    torch.testing.assert_close(torch.compile(step, backend="xquant")(*given), expected)


def test_detection_changes_nothing():
    ((gm, _),) = graphs_of(FastModel(), torch.arange(3, 8)[None], torch.arange(5))
    before = (str(gm.graph), [dict(node.meta) for node in gm.graph.nodes])
    assert [site.reason for site in sites_in(gm)] == ["", ""]
    assert (str(gm.graph), [dict(node.meta) for node in gm.graph.nodes]) == before


@pytest.mark.parametrize(
    "scores, query, tokens",
    [
        (lambda q, k: q @ k.transpose(2, 3), (1, 2, 3, 8), 3),
        (lambda q, k: torch.einsum("bqhd,bhkd->bhqk", q, k), (1, 3, 2, 8), 3),
        (lambda q, k: torch.einsum("bqhgd,bhkd->bhgqk", q, k), (1, 3, 2, 4, 8), 3),
        (lambda q, k: torch.einsum("bhd,bhkd->bhk", q, k), (1, 2, 8), 1),
    ],
    ids=["matmul", "einsum", "grouped queries", "one token"],
)
def test_query_tokens(scores, query, tokens):
    def step(q, k_buffer, v_buffer):
        weights = scores(q, k_buffer).softmax(-1)
        return torch.einsum("bh...k,bhkd->bh...d", weights, v_buffer)

    (site,) = sites_of(step, torch.randn(query), *buffers())
    assert query_tokens(site.attention) == tokens

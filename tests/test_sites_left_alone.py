"""Attentions whose KV cache is left alone, or that have none: each with its reason."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.utils.checkpoint
from dynamo_graphs import SHAPE, buffers, decode_sites, fresh, graphs_of, sites_of, tiny
from stepping import interpreted
from transformers import DynamicCache, StaticCache

import xquant_fx.warn_once as warn_once
from xquant_fx import XQuantCache
from xquant_fx.passes.find_attention import find_attention

sdpa = torch.nn.functional.scaled_dot_product_attention
B, H, N, D = SHAPE


@pytest.mark.slow  # test_growing_windows.py steps over such caches
def test_sliding_window_that_grows():
    model = tiny("gemma3_text")
    for prompt in (5, 0):  # a decode step, and a cold prefill
        cache = DynamicCache(config=model.config)
        ids = torch.arange(3, 9)[None]
        if prompt:
            with torch.no_grad():
                model(ids[:, :prompt], past_key_values=cache)
        torch._dynamo.reset()
        window, full = sites_of(model.forward, ids, past_key_values=cache)
        assert (window.reason, full.reason) == ("", "") and window.has_cache
        assert (window.key_write.window, full.key_write.window) == (12, 0)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_full_sliding_window(attention):
    model = tiny("gemma3_text", attention)
    window, full = decode_sites(model, StaticCache(config=model.config, max_cache_len=32))
    assert (window.reason, full.reason) == ("", "") and window.has_cache
    assert window.key_write.kind == "sliding window" and window.key_write.slide.is_full


@pytest.mark.slow  # test_static_windows.py compiles such prompts
def test_sliding_window_that_the_prompt_overflows():
    model = tiny("gemma3_text")
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    window, full = sites_of(model.forward, torch.arange(3, 17)[None], past_key_values=cache)
    assert (window.reason, full.reason) == ("", "") and window.has_cache
    assert window.key_write.slide.is_prompt and not window.form


def test_sliding_window_that_is_not_yet_full():
    model = tiny("gemma3_text")
    window, full = decode_sites(model, StaticCache(config=model.config, max_cache_len=32), prompt=5)
    assert (window.reason, full.reason) == ("", "")
    torch._dynamo.reset()
    window, full = decode_sites(model, XQuantCache(model.config, 32), prompt=5)
    assert window.reason == "keys: an ordinary buffer beside quantized ones (a sliding window?)"
    assert full.reason == ""


def test_cold_static_cache_is_deferred():
    model = tiny("gemma3_text")
    ids = torch.arange(3, 17)[None]
    window, full = sites_of(model.forward, ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    assert full.allocated_here and full.has_cache and full.key_write.kind == "index_copy_"
    assert full.reason == "keys: the buffer is allocated inside this graph; it is taken over at the next step"
    assert window.has_cache and window.allocated_here and window.reason == full.reason


@pytest.mark.slow  # test_hybrids.py steps over such a cache
def test_states_of_linear_attention_are_no_kv_cache():
    model = tiny("qwen3_next")
    (site,) = decode_sites(model, StaticCache(config=model.config, max_cache_len=32))
    assert site.reason == "" and "layers[1].keys" in site.buffer_name


# Hand-written steps


def appended(keys, values, k, v, pos):
    keys[:, :, pos] = k
    values[:, :, pos] = v


def other_reader(q, k, v, keys, values, pos):
    appended(keys, values, k, v, pos)
    return sdpa(q, keys, values), keys.sum()


def other_reader_of_the_operand(q, k, v, keys, values, pos):
    appended(keys, values, k, v, pos)
    keys = keys.repeat_interleave(2, dim=1)
    return sdpa(torch.cat([q, q], 1), keys, values.repeat_interleave(2, dim=1)), keys.amax()


def returned(q, k, v, keys, values, pos):
    appended(keys, values, k, v, pos)
    return sdpa(q, keys, values), values.transpose(1, 2)


def written_twice(q, k, v, keys, values, pos):
    appended(keys, values, k, v, pos)
    values[:, :, pos + 1] = v
    return sdpa(q, keys, values)


def changed_otherwise(q, k, v, keys, values, pos):
    appended(keys, values, k, v, pos)
    values[:, 0] *= 2
    return sdpa(q, keys, values)


def rolled(q, k, v, keys, values, pos):
    for buffer, x in ((keys, k), (values, v)):
        new = buffer.roll(-1, dims=2)
        new[:, :, -2:-1] = x
        buffer.copy_(new)
    return sdpa(q, keys, values)


def read_before(q, k, v, keys, values, pos):
    out = sdpa(q, keys, values)
    appended(keys, values, k, v, pos)
    return out


def view_before(q, k, v, keys, values, pos):
    seen = values[:, :, :8]
    appended(keys, values, k, v, pos)
    return sdpa(q, keys[:, :, :8], seen)


def written_to_itself(q, k, v, keys, values, pos):
    keys[:, :, pos] = k
    values[:, :, pos] = values[:, :, pos - 1]
    return sdpa(q, keys, values)


def one_buffer(q, k, v, keys, values, pos):
    keys[:, :, pos] = k
    return sdpa(q, keys, keys)


def one_buffer_in_products(q, k, v, keys, values, pos):
    keys[:, :, pos] = k
    return torch.softmax(q @ keys.mT, -1) @ keys


def cross(q, k, v, keys, values, pos):
    return sdpa(q, keys, values)


def computed_and_returned(q, k, v, keys, values, pos):
    appended(keys, values, k, v, pos)
    latent = keys * 2
    return sdpa(q, latent, values), latent[:, :, -1]


def computed_into_another_buffer(q, k, v, keys, values, pos):
    appended(keys, values, k, v, pos)
    latent = keys * 2
    values[:, 1].copy_(latent[:, 0])
    return sdpa(q, latent, values)


def other_dimension(q, k, v, keys, values, pos):
    keys.index_copy_(1, pos % H, k.expand(SHAPE)[:, :1])
    values.index_copy_(1, pos % H, v.expand(SHAPE)[:, :1])
    return sdpa(q, keys, values)


def mask_of_positions(q, k, v, keys, values, pos):
    appended(keys, values, k, v, torch.arange(N) == pos)
    return sdpa(q, keys, values)


def whole_buffer(q, k, v, keys, values, pos):
    appended(keys, values, k, v, slice(None))
    return sdpa(q, keys, values)


def ring_buffer(q, k, v, keys, values, pos):
    appended(keys, values, k, v, (pos + 1) % N)
    return sdpa(q, keys, values)


@pytest.mark.parametrize(
    "step, has_cache, reason",
    [
        (other_reader, True, "keys: the buffer is also read by sum, which is no attention"),
        (other_reader_of_the_operand, True, "keys: the buffer is also read by amax, which is no attention"),
        (returned, True, "values: the buffer is an output of this graph"),
        (written_twice, True, "values: the buffer is written 2 times in this graph, not once"),
        (changed_otherwise, True, "values: the buffer is also written by imul, which is no append along dimension 2"),
        (rolled, True, "keys: the buffer is also written by copy_, which is no append (a sliding window?)"),
        (read_before, True, "keys: the buffer is read by scaled_dot_product_attention before it is written"),
        (view_before, True, "values: the buffer is read by getitem before it is written"),
        (written_to_itself, True, "values: the buffer is read by getitem before it is written"),
        (one_buffer, True, "keys and values are read from one buffer"),
        (one_buffer_in_products, True, "keys and values are read from one buffer"),
        (ring_buffer, True, "keys: positions are taken modulo a number (a ring buffer?)"),
        (cross, False, "keys: the buffer is read and not written in this graph (cross attention, or a graph break?)"),
        (computed_and_returned, True, "keys: the buffer is also read by mul, which is no attention"),
        (computed_into_another_buffer, True, "keys: the buffer is also read by mul, which is no attention"),
        (other_dimension, True, "keys: the buffer is also written by index_copy_, which is no append along"),
        (mask_of_positions, True, "keys: the buffer is also written by setitem, which is no append along dimension 2"),
        (whole_buffer, True, "keys: the buffer is also written by setitem, which is no append along dimension 2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_buffers_left_alone(step, has_cache, reason):
    (site,) = sites_of(step, *fresh(), *buffers(), torch.tensor([3]))
    assert site.reason.startswith(reason)
    assert site.has_cache == has_cache and not site.allocated_here


def test_rows_that_a_step_does_not_have():
    """Meta's Llama makes its cache for the largest batch, and writes to ``cache[:batch, begin:end]``."""

    def step(q, k, v, keys, values):
        keys[:1, :, 3:4], values[:1, :, 3:4] = k, v
        return sdpa(q, keys[:1], values[:1])

    (site,) = sites_of(step, *fresh(), *(torch.zeros(2, H, N, D) for _ in range(2)))
    assert site.reason.startswith("keys: the buffer is also written by setitem, into some of its 2 rows: make it for")


def reordered(q, k, v, keys, values, pos):
    for buffer in (keys, values):
        buffer.copy_(buffer.flip(0))
    appended(keys, values, k, v, pos)
    return sdpa(q, keys, values)


def checkpointed(q, k, v, keys, values, pos):
    def inside(q, k, v, keys, values, pos):
        appended(keys, values, k, v, pos)
        return sdpa(q, keys, values)

    return torch.utils.checkpoint.checkpoint(inside, q, k, v, keys, values, pos, use_reentrant=False)


@pytest.mark.parametrize(
    "step, reason",
    [
        (reordered, "keys: the buffer is also written by copy_, which is no append along dimension 2"),
        (checkpointed, "written to inside tag_activation_checkpoint, a graph of its own"),
    ],
)
def test_rows_that_change_places_and_inner_graphs_are_told_of(step, reason, caplog):
    """Neither is a short window, of which nothing is said."""
    warn_once.forget()
    with torch.no_grad():
        torch.compile(step, backend=interpreted())(*fresh(), *buffers(), torch.tensor([3]))
    assert f"stays in full precision: {reason}" in caplog.text


@pytest.mark.parametrize("kind", ["rank 3", "int", "float8", "float64", "gradient"])
def test_inputs_that_are_no_buffers(kind):
    def step(q, k, v, keys, values, pos):
        keys[..., pos, :] = k.to(keys.dtype)
        values[..., pos, :] = v.to(values.dtype)
        return sdpa(q, keys.to(q.dtype), values.to(q.dtype))

    q, k, v = fresh()
    types = {"int": torch.int32, "float8": torch.float8_e5m2, "float64": torch.float64}
    keys, values = buffers(dtype=types.get(kind, torch.float32))
    if kind == "rank 3":
        q, k, v, keys, values = (t[0] for t in (q, k, v, keys, values))
    if kind == "gradient":
        keys.requires_grad_()
    (site,) = sites_of(step, q, k, v, keys, values, torch.tensor([3]))
    expected = "come from a parameter" if kind == "gradient" else "that is no [B, H, N, D] buffer of 16 or 32 bit"
    assert expected in site.reason
    assert site.has_cache  # so that strict raises


def test_tuples_that_grow():
    def step(q, k, v, past):  # nanoGPT's style
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return sdpa(q, k, v), (k, v)

    (site,) = sites_of(step, *fresh(), (torch.randn(SHAPE), torch.randn(SHAPE)))
    assert site.reason == "" and site.key_write.kind == "concatenation" and site.buffer_name == "L['past'][0]"


def read_elsewhere(q, k, v, past):
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return sdpa(q, k, v) + k.sum(), (k, v)


def changed(q, k, v, past):
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    k[:, :, 0] = 0
    return sdpa(q, k, v), (k, v)


def both_roles(q, k, v, past):
    k = torch.cat((past[0], k), dim=2)
    return sdpa(q, k, k), (k, torch.cat((past[1], v), dim=2))


def cut(q, k, v, past):
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return sdpa(q, k, v), (k[:, :, 1:], v[:, :, 1:])


def in_front(q, k, v, past):
    k, v = torch.cat((k * 2, past[0]), dim=2), torch.cat((v * 2, past[1]), dim=2)
    return sdpa(q, k, v), (k, v)


def more_behind(q, k, v, past):
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return sdpa(q, torch.cat((k, k * 2), dim=2), torch.cat((v, v * 2), dim=2)), (k, v)


def along_heads(q, k, v, past):
    k, v = torch.cat((past[0], k.expand(-1, H, N, -1)), dim=1), torch.cat((past[1], v.expand(-1, H, N, -1)), dim=1)
    return sdpa(torch.cat((q, q), 1), k, v), (k, v)


def tokens_before_heads(q, k, v, past):
    k, v = (torch.cat((old.transpose(1, 2), new.transpose(1, 2)), dim=1) for old, new in zip(past, (k, v), strict=True))
    return sdpa(q, k.transpose(1, 2), v.transpose(1, 2)), (k, v)


def stacked(q, k, v, past):
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return sdpa(q, k, v), torch.stack((k, v))


def made_anew(q, k, v, past):
    at = torch.arange(1)
    k, v = past[0].index_copy(2, at, k), torch.where(torch.arange(past[1].shape[2])[:, None] == at, v, past[1])
    return sdpa(q, k, v), (k, v)


def prefix_in_one(q, k, v, past):
    out = sdpa(q, torch.cat((k * 3, past[0], k * 2), dim=2), torch.cat((v * 3, past[1], v * 2), dim=2))
    return out, (torch.cat((past[0], k * 2), dim=2), torch.cat((past[1], v * 2), dim=2))


def new_alone(q, k, v, past):
    return sdpa(q, torch.cat((past[0], k * 2), dim=2), torch.cat((past[1], v * 2), dim=2)), (k * 2, v * 2)


def scores_apart(q, k, v, past):
    weights = torch.softmax(torch.cat((q @ past[0].mT, q @ k.mT), -1), -1)
    out = weights[..., :N] @ past[1] + weights[..., N:] @ v
    return out, (torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2))


def inputs_in_front(q, k, v, past):
    k, v = torch.cat((k, past[0]), dim=2), torch.cat((v, past[1]), dim=2)
    return sdpa(q, k, v), (k, v)


def decayed(q, k, v, past):
    k, v = torch.cat((past[0] * 0.9, k * 2), dim=2), torch.cat((past[1] * 0.9, v * 2), dim=2)
    return sdpa(q, k, v), (k, v)


def flipped(q, k, v, past):
    k, v = torch.cat((past[0], k * 2), dim=2).flip(2), torch.cat((past[1], v * 2), dim=2).flip(2)
    return sdpa(q, k, v), (k, v)


def padded(q, k, v, past):
    k, v = (
        torch.nn.functional.pad(old, (0, 0, 0, 1)).index_copy(2, torch.tensor([N]), x)
        for old, x in zip(past, (k, v), strict=True)
    )
    return sdpa(q, k, v), (k, v)


def in_a_new_buffer(q, k, v, past):
    keys, values = k.new_empty(B, H, N + 1, D), v.new_empty(B, H, N + 1, D)
    for buffer, old, x in ((keys, past[0], k * 2), (values, past[1], v * 2)):
        buffer[:, :, :N], buffer[:, :, N:] = old, x
    return sdpa(q, keys, values), (keys, values)


def heads_in_the_batch(q, k, v, past):
    """As fairseq has it."""
    q, k, v = (t.reshape(B * H, -1, D) for t in (q, k, v))
    k, v = torch.cat((past[0].view(B * H, -1, D), k), dim=1), torch.cat((past[1].view(B * H, -1, D), v), dim=1)
    return torch.softmax(q @ k.mT, -1) @ v, (k.view(B, H, -1, D), v.view(B, H, -1, D))


@pytest.mark.parametrize(
    "step, reason",
    [
        (prefix_in_one, "attention reads the cache with more put among it (a prefix?)"),
        (new_alone, "attention reads the cache with more put among it (a prefix?)"),
        (scores_apart, "attention reads the cache with more put among it (a prefix?)"),
        (inputs_in_front, "keys: new tokens are put before the old ones"),
        (decayed, "attention reads the cache with more put among it (a prefix?)"),
        (flipped, "keys are a new tensor that flip makes of the old one"),
        (padded, "keys are a new tensor that index_copy makes of the old one"),
        (in_a_new_buffer, "keys are a new tensor that new_empty makes of the old one"),
        (heads_in_the_batch, "grow by concatenation along dimension 1 of 3: tokens must be dimension 2"),
        (made_anew, "keys are a new tensor that index_copy makes of the old one"),
        (read_elsewhere, "also read by sum, which is no attention"),
        (changed, "also written by setitem, which is no append"),
        (both_roles, "keys and values are read from one buffer"),
        (cut, "what is returned is not the concatenation itself"),
        (in_front, "grow by concatenation and what is returned is not"),
        (more_behind, "attention reads the cache with more put behind it"),
        (along_heads, "grow by concatenation along dimension 1 of 4: tokens must be dimension 2"),
        (tokens_before_heads, "grow by concatenation along dimension 1 of 4: tokens must be dimension 2"),
        (stacked, "what is returned is not the concatenation itself"),
    ],
)
def test_concatenations_that_are_left_alone(step, reason):
    (site,) = sites_of(step, *fresh(), (torch.randn(SHAPE), torch.randn(SHAPE)))
    assert reason in site.reason and site.stays_ordinary


@pytest.mark.parametrize("head", [slice(None), 0])
def test_a_cache_that_eager_code_stores_what_is_returned_in(head):
    """As executorch has it, also head by head: attention to what was stored and new tokens, which are returned."""

    def step(q, k, v, keys, values):
        k, v = k[:, head] * 2, v[:, head] * 2
        joined = torch.cat((keys, k), -2), torch.cat((values, v), -2)
        return torch.softmax(q[:, head] @ joined[0].mT, -1) @ joined[1], k, v

    (site,) = sites_of(step, *fresh(), *(torch.randn(SHAPE)[:, head].clone() for _ in range(2)))
    assert site.stays_ordinary and site.buffer_name == "L['keys']"


def test_a_prefix_before_what_grows_is_no_reason():
    def step(q, k, v, prefix, past):
        k, v = torch.cat((past[0], k * 2), dim=2), torch.cat((past[1], v * 2), dim=2)
        return sdpa(q, torch.cat((prefix, k), dim=2), torch.cat((prefix, v), dim=2)), (k, v)

    (site,) = sites_of(step, *fresh(), torch.randn(SHAPE), (torch.randn(SHAPE), torch.randn(SHAPE)))
    assert site.reason == "" and site.buffer_name == "L['past'][0]"


@pytest.mark.parametrize("dim", [1, 2])
def test_a_layer_that_is_spelt_out_beside_one_that_is_not(dim):
    def turned(x):
        return x.transpose(1, 2) if dim == 1 else x

    def step(q, k, v, past, others):
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        x, (a, b) = sdpa(q, k, v), (torch.cat((old, turned(q)), dim) for old in others)
        return torch.sigmoid(x @ turned(a).mT) @ turned(b), (k, v), (a, b)

    past, others = ([torch.randn(SHAPE) for _ in range(2)] for _ in range(2))
    quantized, *left = sites_of(step, *fresh(), past, [turned(old).contiguous() for old in others])
    assert quantized.reason == "" and {site.buffer_name for site in left} == {"L['others'][0]", "L['others'][1]"}
    assert all(site.stays_ordinary and "no attention that is recognised" in site.reason for site in left)


def test_new_keys_that_are_returned_are_no_cache():
    def step(q, k, v):  # inputs behind a graph break
        k = k * 0.5 + torch.cat((-k[..., D // 2 :], k[..., : D // 2]), -1) * 0.5
        return sdpa(q, k, v), k, v

    def unrolled(q, k, v):
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (k, v))
        return sdpa(q, k, v)

    assert [site.has_cache for site in sites_of(step, *fresh(4)) + sites_of(unrolled, *fresh(4))] == [False, False]


def test_a_table_that_a_step_fills_is_no_cache_beside_those_that_grow():
    def step(q, k, v, past):
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        table = torch.zeros(B, H, q.shape[2] + 1, D)
        table[:, :, 1:] = q
        return sdpa(table, k, v), (k, v)

    (site,) = sites_of(step, *fresh(), (torch.randn(SHAPE), torch.randn(SHAPE)))
    assert site.reason == ""


def test_keys_of_an_indexer_that_grow_are_no_cache():
    """As DeepSeek V3.2 has them, one a layer: the tokens with the largest scores are attended to."""

    def step(q, k, v, past, indexed):
        k, v, returned = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2), []
        for keys in indexed:
            returned.append(torch.cat((keys, q[:, 0]), dim=1))
            chosen = (q[:, 0] @ returned[-1].mT).topk(3, dim=-1).indices
            hidden = torch.ones(B, q.shape[2], k.shape[2], dtype=torch.bool).scatter(-1, chosen, False)
            q = sdpa(q, k, v, attn_mask=~hidden[:, None])
        return q, (k, v), returned

    past, indexed = (torch.randn(SHAPE), torch.randn(SHAPE)), [torch.randn(B, SHAPE[2], D) for _ in range(2)]
    assert {site.reason for site in sites_of(step, *fresh(), past, indexed)} == {""}


def longer(past, k, v, read):
    kv = torch.cat([past, torch.stack([k, v])], 3)
    return *read(kv), kv


def longer_views(past, k, v, read):
    kv = torch.cat([past.transpose(0, 1), torch.stack([k, v])], 3)
    return *read(kv), kv.transpose(0, 1)


def longer_parts(past, k, v, read):
    parts = [torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True)]
    return *parts, torch.cat([part[None] for part in parts])


def longer_layers(past, k, v, read):
    parts = [torch.cat([old, new], 2) for old, new in zip(past[0], (k, v), strict=True)]
    return *parts, torch.stack([torch.stack(parts)] * 2)


def longer_at_once(past, k, v, read):
    kv = torch.cat([past[0], torch.stack([k, v])], 3)
    return *read(kv), torch.cat([past, torch.stack([k, v]).expand(2, -1, -1, -1, -1, -1)], 4)


@pytest.mark.parametrize("read", [list, lambda kv: kv.unbind(0), lambda kv: (kv.select(0, 0), kv[1])])
@pytest.mark.parametrize("grow", [longer, longer_views, longer_parts, longer_layers, longer_at_once])
def test_stacks_that_grow_are_told_of(grow, read):
    q, k, v = fresh()
    past = torch.stack([torch.randn(SHAPE) for _ in range(2)], int(grow is longer_views))
    past = torch.stack([past, past]) if grow in (longer_layers, longer_at_once) else past

    def step(q, k, v, past):
        keys, values, kv = grow(past, k, v, read)
        return sdpa(q, keys, values), kv

    (site,) = sites_of(step, q, k, v, past)
    assert site.stays_ordinary and "grow by concatenation" in site.reason and site.buffer_name == "L['past']"


def test_concatenation_that_is_no_cache():
    def joint(q, text, image):  # two modalities attended to together; nothing is kept
        k = torch.cat([text * 2, image * 2], dim=2)
        return sdpa(q, k, k * 3)

    (site,) = sites_of(joint, *fresh(4))
    assert not site.has_cache and "no KV cache is read here" in site.reason


@pytest.mark.parametrize("along, is_cache", [(-1, False), (1, True)])
def test_the_state_of_a_convolution_is_no_cache(along, is_cache):
    """Attention to what was computed from it (over layers, say); a rolled window of tokens is one that is missed."""

    def step(q, state, new):
        longer = torch.cat([state, new], along)
        state.copy_(longer[:, :, -D:] if along == -1 else longer[:, -D:])
        k = longer.narrow(along, 1, D)[:, None] * 2
        return sdpa(q, k, k * 3)

    (site,) = sites_of(step, torch.randn(1, 1, 1, D), torch.randn(1, D, D), torch.randn(1, 1, D).movedim(1, along))
    assert site.has_cache == is_cache


@pytest.mark.parametrize("decay, sites", [(0.5, 0), (0.0, 2)])
def test_a_recurrent_state_is_no_cache(decay, sites):
    """A head of it is computed from what it was; parts that do not depend on it may be a cache's new tokens."""

    def step(state, new):
        for head in range(2):
            part = state[:, head]
            part.copy_((part * decay if decay else 0) + new[:, head])
        return state.sum(-1)

    assert len(sites_of(step, torch.randn(1, 2, D, D), torch.randn(1, 2, D, D))) == sites


def test_attention_without_a_cache():
    def layers(x, w):
        for _ in range(2):
            q, k, v = (x @ w).chunk(3, dim=-1)
            x = x + sdpa(q, k, v)
        return x

    sites = sites_of(layers, torch.randn(B, H, 4, D), torch.randn(D, 3 * D))
    assert [site.has_cache for site in sites] == [False, False]
    assert all(site.reason.endswith("no KV cache is read here") for site in sites)


def test_new_tokens_attended_to_in_a_later_layer():
    """The second layer's keys depend on the first layer's cache, but only through its attention."""

    def step(q, k, v, keys, values, pos):
        appended(keys, values, k, v, pos)
        x = torch.softmax(q @ keys.mT, -1) @ values
        return sdpa(x, x * 2, x * 3)

    first, second = sites_of(step, *fresh(), *buffers(), torch.tensor([3]))
    assert first.reason == ""
    assert not second.has_cache and "no KV cache is read here" in second.reason


def test_buffers_allocated_in_the_graph():
    def prefill(q, k, v):
        keys, values = torch.zeros(SHAPE), k.new_zeros(SHAPE)
        appended(keys, values, k, v, torch.arange(4))
        return sdpa(q, keys, values), keys, values

    (site,) = sites_of(prefill, *fresh(4))
    assert site.allocated_here and site.has_cache and "taken over at the next step" in site.reason


def router(x, weights, experts):
    chosen = torch.softmax(x @ weights, dim=-1)
    mixed = torch.stack([x @ expert for expert in experts], -1) * chosen[..., None, :]
    return mixed.sum(-1) @ experts[0]


def sampling(x, weights, experts):
    return torch.multinomial(torch.softmax(x @ weights, dim=-1), 1)


def scaled_hidden(x, weights, experts):
    return (x * torch.softmax(x @ weights, dim=-1)[:, :1]) @ experts[0]


@pytest.mark.parametrize("function", [router, sampling, scaled_hidden], ids=lambda f: f.__name__)
def test_softmax_that_is_no_attention(function):
    ((gm, _),) = graphs_of(function, torch.randn(4, D), torch.randn(D, 3), torch.randn(3, D, D))
    assert find_attention(gm.graph) == []


# Ragged batches: each row of the batch is written at a position of its own. What is quantized: test_ragged.py.

ROWS = 2


def ragged_index_put(q, k, v, keys, values, pos):
    at = (torch.arange(ROWS)[:, None, None], torch.arange(H)[None, :, None], pos[:, None, None])
    keys.index_put_(at, k)
    values.index_put_(at, v)
    return keys, values


def ragged_where(q, k, v, keys, values, pos):
    here = (torch.arange(N) == pos[:, None])[:, None, :, None]
    keys.copy_(torch.where(here, k, keys))
    values.copy_(torch.where(here, v, values))
    return keys, values


def ragged_rows(q, k, v, keys, values, pos):
    """Row by row, but for the last: rows may end."""
    for row in range(ROWS - 1):
        keys[row].index_copy_(1, pos[row : row + 1], k[row])
        values[row].index_copy_(1, pos[row : row + 1], v[row])
    return keys, values


def ragged_concatenation(q, k, v, keys, values, pos):
    """Rows that have ended keep what they had: what is appended is chosen by row."""
    new = [torch.where((pos > 3)[:, None, None, None], x, torch.zeros_like(x)) for x in (k, v)]
    return torch.cat([keys[:, :, :4], new[0]], 2), torch.cat([values[:, :, :4], new[1]], 2)


@pytest.mark.parametrize(
    "write", [ragged_index_put, ragged_where, ragged_rows, ragged_concatenation],
    ids=lambda write: write.__name__,
)  # fmt: skip
def test_ragged_batches_are_right_and_left_alone(write):
    def step(q, k, v, keys, values, pos):
        seen = (torch.arange(N) <= pos[:, None])[:, None, None]
        keys, values = write(q, k, v, keys, values, pos)
        return sdpa(q, keys, values, attn_mask=seen[..., : keys.shape[2]])

    torch.manual_seed(0)
    mine, theirs = ([torch.zeros(ROWS, H, N, D) for _ in range(2)] for _ in range(2))
    compiled = torch.compile(step, backend=interpreted(k_bits=1, v_bits=1, residual_length=1, k_group_size=1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left alone is warned of
        for t in range(6):
            x = [torch.randn(ROWS, H, 1, D) for _ in range(3)]
            pos = torch.tensor([t, 2 * t])
            assert torch.equal(compiled(*x, *mine, pos), step(*x, *theirs, pos))
    (site,) = sites_of(step, *x, *mine, pos)
    assert site.reason and type(mine[0]) is torch.Tensor

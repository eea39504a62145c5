"""Which attentions become one ``decode_attention``, which must not, and that the numbers stay."""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import tiny
from rewrites import CONFIG, SHAPE, Rewrites, assign, count, run_both, sdpa

from xquant_fx import XQuantCache, explain, ops
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.passes.trace import fake

HEADS, COUNT, DIM = SHAPE[1], SHAPE[2], SHAPE[3]
SCALE = DIM**-0.5


def mask_of(pos, dtype=torch.bool):
    seen = torch.arange(COUNT) <= pos[:, None]
    return seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)


def grouped(q):
    return torch.cat([q, 2 * q], 2).reshape(1, 2 * HEADS, *q.shape[2:])  # two query heads a KV head


def repeat_kv(x):
    return x[:, :, None].expand(1, HEADS, 2, COUNT, DIM).reshape(1, 2 * HEADS, COUNT, DIM)


def softmax_of(scores, values):
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values


FUSED = {
    "sdpa": lambda q, k, v, pos: sdpa(q, k, v),
    "bool mask": lambda q, k, v, pos: sdpa(q, k, v, attn_mask=mask_of(pos)),
    "float mask and scale": lambda q, k, v, pos: sdpa(q, k, v, mask_of(pos, torch.float32)[None], scale=0.3),
    "enable_gqa": lambda q, k, v, pos: sdpa(grouped(q), k, v, mask_of(pos)[None, None], enable_gqa=True)[:, ::2],
    "repeat_kv": lambda q, k, v, pos: sdpa(grouped(q), repeat_kv(k), repeat_kv(v), mask_of(pos))[:, ::2],
    "repeat_interleave": lambda q, k, v, pos: sdpa(
        grouped(q), k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1), mask_of(pos)
    )[:, 1::2],
    "matmul": lambda q, k, v, pos: softmax_of(torch.matmul(q, k.transpose(2, 3)) * SCALE, v),
    "matmul, mask": lambda q, k, v, pos: softmax_of(q @ k.mT / 3.0 + mask_of(pos, torch.float32), v),
    "softcap": lambda q, k, v, pos: softmax_of(
        torch.tanh((q @ k.transpose(-1, -2)) * SCALE / 5.0) * 5.0 + mask_of(pos, torch.float32), v
    ),
    "a softcap below zero": lambda q, k, v, pos: softmax_of(torch.tanh((q @ k.mT) / -5.0) * -5.0, v),
    "a mask expanded over heads": lambda q, k, v, pos: sdpa(
        q, k, v, mask_of(pos)[None, None].expand(1, HEADS, q.shape[2], COUNT)
    ),
    "dropout that is off": lambda q, k, v, pos: torch.nn.functional.dropout(
        torch.softmax(q @ k.mT, -1), p=0.5, training=False
    )
    @ v,
    "sinks": lambda q, k, v, pos: (
        torch.softmax(
            torch.cat([q @ k.mT * SCALE, torch.ones(HEADS).view(1, -1, 1, 1).expand(1, HEADS, q.shape[2], 1)], -1), -1
        )[..., :-1]
        @ v
    ),
}

ALONE = {  # and the word that the reason must have
    "is_causal": (lambda q, k, v, pos: sdpa(q, k, v, is_causal=True), "is_causal"),
    "heads in another order": (
        lambda q, k, v, pos: sdpa(grouped(q), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))[:, ::2], "keys",
    ),
    "values that are the keys": (lambda q, k, v, pos: sdpa(q, k, k), "values from stored keys"),
    "keys that are the values": (lambda q, k, v, pos: sdpa(q, v, v), "keys are read from stored values"),
    "keys and values exchanged": (lambda q, k, v, pos: softmax_of(q @ v.mT, k), "keys are read from stored values"),
    "keys times queries": (lambda q, k, v, pos: softmax_of((k @ q.mT).mT, v), ""),
    "values turned": (lambda q, k, v, pos: sdpa(q, k, v.flip(3)), ""),
    "a part of the keys": (lambda q, k, v, pos: sdpa(q, k[:, :, :24], v[:, :, :24], mask_of(pos)[:, :24]), "keys"),
    "weights that are returned": (lambda q, k, v, pos: (w := torch.softmax(q @ k.mT, -1)) @ v + w.sum(), "weights"),
    "scores that are returned": (lambda q, k, v, pos: torch.softmax(s := q @ k.mT, -1) @ v + s.sum(), "scores"),
    "softmax over queries": (lambda q, k, v, pos: torch.softmax(q @ k.mT, -2) @ v, "dimension"),
    "two masks": (
        lambda q, k, v, pos: softmax_of(q @ k.mT + mask_of(pos, torch.float32) + mask_of(pos, torch.float32), v), "add",
    ),
    "a mask before the scale": (lambda q, k, v, pos: softmax_of((q @ k.mT + mask_of(pos).float()) * SCALE, v), "add"),
    "a clamp": (lambda q, k, v, pos: softmax_of((q @ k.mT).clamp(-1, 1), v), "clamp"),
    "a sum with alpha": (
        lambda q, k, v, pos: softmax_of(torch.add(q @ k.mT, mask_of(pos, torch.float32), alpha=0.5), v), "add",
    ),
    "a quotient rounded": (lambda q, k, v, pos: softmax_of(torch.div(q @ k.mT, 3.0, rounding_mode="floor"), v), "div"),
    "a cap of rounded quotients": (
        lambda q, k, v, pos: softmax_of(torch.tanh(torch.div(q @ k.mT, 5.0, rounding_mode="floor")) * 5.0, v), "tanh",
    ),
    "a bool that is added": (lambda q, k, v, pos: softmax_of(q @ k.mT + mask_of(pos), v), "add"),
    "scores cut to integers": (lambda q, k, v, pos: softmax_of((q @ k.mT * 3.0).to(torch.int32), v), "to"),
    "keys cut to integers": (lambda q, k, v, pos: sdpa(q, k.to(torch.int32).to(q.dtype), v), "keys"),
    "values in 8 bits": (lambda q, k, v, pos: sdpa(q, k, v.to(torch.float8_e4m3fn).to(q.dtype)), "values"),
    "the bits of values": (lambda q, k, v, pos: sdpa(q, k, v.view(torch.int32).to(q.dtype)), "values"),
    "another cap than it divides by": (lambda q, k, v, pos: softmax_of(torch.tanh(q @ k.mT / 5.0) * 4.0, v), "tanh"),
}  # fmt: skip


def step_of(attend):
    def step(q, k, v, layers, pos):
        for keys, values in layers:
            assign(keys, values, k, v, pos)
            q = attend(q, keys, values, pos)
        return q

    return step


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    mine, theirs = run_both(step_of(FUSED[name]), [5, 1, 12, 1], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for made in seen.made:
        assert (count(made, ops.DECODE), count(made, ops.LOAD)) == (2, 0)
        masks = [DecodeArguments.of(node).mask for node in made.graph.nodes if node.target is ops.DECODE]
        assert all(mask is None or fake(mask).shape[1] == 1 for mask in masks)  # broadcast, never made larger


@pytest.mark.parametrize("name", ALONE)
def test_left_to_torch(name, caplog):
    attend, word = ALONE[name]
    with caplog.at_level("INFO", logger="xquant_fx"):
        mine, theirs = run_both(step_of(attend), [5, 1, 12], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert all(count(made, ops.DECODE) == 0 for made in seen.made)
    if word:
        said = [r.getMessage() for r in caplog.records if "dequantized" in r.getMessage()]
        assert said and all(word in message.split(": ", 1)[1] for message in said), said


@pytest.mark.parametrize(
    ("name", "attention", "layers"),
    [("llama", "sdpa", 2), ("llama", "eager", 2), ("gpt2", "eager", 2), ("falcon", "sdpa", 2), ("gemma2", "eager", 1),
     ("gpt_oss", "eager", 2), ("codegen", "eager", 0), ("deepseek_v3", "sdpa", 0)],
)  # fmt: skip
def test_models_and_what_explain_says_of_them(name, attention, layers):
    model, seen = tiny(name, attention), Rewrites()
    cache, ids = XQuantCache(model.config, 32, CONFIG), torch.arange(3, 25)[None]
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        sites = explain(model, ids[:, 9:10], past_key_values=cache).sites
        torch._dynamo.reset()
        torch.compile(model.forward, backend=seen, dynamic=False)(ids[:, 9:10], past_key_values=cache)
    assert sum(count(made, ops.DECODE) for made in seen.made) == layers
    assert sum(site.rewritten and not site.dequantized for site in sites) == layers


def test_a_store_between_keys_and_values_is_not_crossed():
    """The scores are of the keys as they were before the same positions were written again."""

    def step(q, k, v, layers, pos):
        keys, values = layers[0]
        assign(keys, values, k, v, pos)
        weights = torch.softmax(q @ keys.mT, -1)
        assign(keys, values, k * 2, v * 2, pos)
        return weights @ values

    mine, theirs = run_both(step, [3, 1], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert all(count(made, ops.DECODE) == 0 for made in seen.made)

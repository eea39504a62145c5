"""Which attentions become one ``decode_attention``, which must not, and that the numbers stay."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from dynamo_graphs import OLD_BLOOM, tiny
from rewrites import ALONE as UNSHARED
from rewrites import CONFIG, SHAPE, Rewrites, assign, count, quantized_layers, run_both, sdpa

from xquant_fx import XQuantCache, explain, ops
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.passes.trace import fake

pytest_plugins = ["plain_torch"]
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


def weighed(scores, values, logit):
    return softmax_of(scores, values) * logit.sigmoid().unsqueeze(-1).to(values.dtype)


ONES = torch.ones(1, HEADS, 1)
LEAST = torch.finfo(torch.float32).min
BIAS = -(2.0 ** -torch.arange(1, HEADS + 1))[None, :, None, None] * torch.arange(COUNT)  # ALiBi


def bmm_attention(scores, values, pos):
    """The rest of an attention from scores [B * H, q, N], as Bloom has it."""
    scores = scores.view(1, HEADS, -1, COUNT) + mask_of(pos, torch.float32)[None, None]
    weights = torch.softmax(scores, -1).view(HEADS, -1, COUNT)
    return torch.bmm(weights, values.flatten(0, 1)).view(1, HEADS, -1, DIM)


FUSED = {
    "sdpa": lambda q, k, v, pos: sdpa(q, k, v),
    "the first tokens": lambda q, k, v, pos: sdpa(q, k[:, :, :24], v[:, :, :24], mask_of(pos)[:, :24]),
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
    "dropout that is off": lambda q, k, v, pos: (
        torch.nn.functional.dropout(torch.softmax(q @ k.mT, -1), p=0.5, training=False) @ v
    ),
    "sinks": lambda q, k, v, pos: (
        torch.softmax(
            torch.cat([q @ k.mT * SCALE, torch.ones(HEADS).view(1, -1, 1, 1).expand(1, HEADS, q.shape[2], 1)], -1), -1
        )[..., :-1]
        @ v
    ),
    "sinks that join behind the softmax": lambda q, k, v, pos: weighed(
        s := q @ k.mT * SCALE, v, (torch.logsumexp(s, -1) - ONES).float()
    ),
    "two masks": lambda q, k, v, pos: softmax_of(q @ k.mT + mask_of(pos, torch.float32) + BIAS, v),
    "a mask before the scale": lambda q, k, v, pos: softmax_of((q @ k.mT + mask_of(pos).float()) * SCALE, v),
    "masked_fill": lambda q, k, v, pos: softmax_of((q @ k.mT * SCALE).masked_fill(~mask_of(pos), -torch.inf), v),
    "masked_fill with the least number": lambda q, k, v, pos: softmax_of(
        (q @ k.mT * SCALE).masked_fill(~mask_of(pos)[None], torch.finfo(torch.float32).min), v
    ),
    "where": lambda q, k, v, pos: softmax_of(torch.where(mask_of(pos), q @ k.mT, -torch.inf), v),
    "where, the other way round": lambda q, k, v, pos: softmax_of(torch.where(~mask_of(pos), -1e9, q @ k.mT), v),
    "where, a tensor filled in": lambda q, k, v, pos: softmax_of(
        torch.where(mask_of(pos), q @ k.mT, torch.full([], -1e9)), v
    ),
    "where, a tensor made of a number filled in": lambda q, k, v, pos: softmax_of(
        torch.where(mask_of(pos), q @ k.mT, torch.tensor(-1e9)), v
    ),
    "a bias and a fill": lambda q, k, v, pos: softmax_of(
        (q @ k.mT / torch.full([], 3.0) + BIAS).masked_fill(~mask_of(pos), -1e9), v
    ),
    "a fill and a mask of least numbers, on rows of nothing else": lambda q, k, v, pos: softmax_of(
        (q @ k.mT).masked_fill(~mask_of(pos), -1e9) + torch.where(pos > pos[0], 0.0, LEAST)[:, None].expand(-1, COUNT),
        v,
    ),
    "a fill and a mask of least numbers that add up": lambda q, k, v, pos: softmax_of(
        (q @ k.mT).masked_fill(torch.arange(COUNT) < COUNT - 2, LEAST) + mask_of(pos, torch.float32).clamp(min=LEAST),
        v,
    ),
    "softcap, then two fills": lambda q, k, v, pos: softmax_of(
        (torch.tanh(q @ k.mT / 5.0) * 5.0)
        .masked_fill(~mask_of(pos), -torch.inf)
        .masked_fill(torch.arange(COUNT) == 1, -torch.inf),
        v,
    ),
    "baddbmm, ALiBi and a mask": lambda q, k, v, pos: bmm_attention(
        torch.baddbmm(BIAS.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=SCALE), v, pos
    ),
    "bmm": lambda q, k, v, pos: bmm_attention(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), v, pos),
    "einsum": lambda q, k, v, pos: torch.einsum(
        "bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE, -1), v
    ),
    "einsum, the keys first": lambda q, k, v, pos: torch.einsum(
        "...kd,...qk->...qd", v, torch.softmax(torch.einsum("...kd,...qd->...qk", k, q), -1)
    ),
    "einsum, tokens before heads": lambda q, k, v, pos: torch.einsum(
        "bhqk,bhkd->bqhd", torch.softmax(torch.einsum("bqhd,bhkd->bhqk", q.transpose(1, 2), k), -1), v
    ).transpose(1, 2),
    "einsum, grouped queries": lambda q, k, v, pos: torch.einsum(
        "bhgqk,bhkd->bhgqd",
        torch.softmax(
            torch.einsum("bhgqd,bhkd->bhgqk", grouped(q).unflatten(1, (HEADS, 2)), k) + mask_of(pos, torch.float32), -1
        ),
        v,
    ).flatten(1, 2)[:, ::2],
    "grouped queries by broadcasting": lambda q, k, v, pos: (
        torch.softmax(grouped(q).unflatten(1, (HEADS, 2)) @ k[:, :, None].mT, -1) @ v[:, :, None]
    ).flatten(1, 2)[:, 1::2],
    "the largest subtracted": lambda q, k, v, pos: softmax_of(
        (s := q @ k.mT + BIAS) - s.max(dim=-1, keepdim=True).values, v
    ),
    "heads in another order": lambda q, k, v, pos: sdpa(
        grouped(q), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask_of(pos)
    )[:, ::2],
}

#: (attention, calls of the op for one layer, heads of their masks)
PARTS = {
    "heads repeated in front": (
        lambda q, k, v, pos: (
            torch.softmax(grouped(q).unflatten(1, (2, HEADS)) @ k.mT[:, None], -1) @ v[:, None]
        ).flatten(1, 2)[:, 1:3], 1, 1,
    ),
    "heads in another order, a bias each, and sinks": (
        lambda q, k, v, pos: (
            torch.softmax(torch.cat([
                grouped(q) @ k.repeat(1, 2, 1, 1).mT + torch.cat([BIAS, BIAS / 3], 1),
                torch.arange(4.0).view(1, -1, 1, 1).expand(1, 2 * HEADS, q.shape[2], 1),
            ], -1), -1)[..., :-1] @ v.repeat(1, 2, 1, 1)
        )[:, 1:3], 1, 2 * HEADS,
    ),
    "halves of the values": (
        lambda q, k, v, pos: sum(sdpa(q, k, half.repeat(1, 2, 1, 1), mask_of(pos)) for half in v.chunk(2, 1)), 4, 1,
    ),
    "a half of the values, a bias each, and sinks": (
        lambda q, k, v, pos: (
            torch.softmax(torch.cat([
                grouped(q) @ repeat_kv(k).mT + torch.cat([BIAS, BIAS / 3], 1),
                torch.arange(4.0).view(1, -1, 1, 1).expand(1, 2 * HEADS, q.shape[2], 1),
            ], -1), -1)[..., :-1] @ v[:, 1:].expand(1, 2 * HEADS, COUNT, DIM)
        )[:, 1:3], 2, 2,
    ),
    "other heads of keys than of values": (
        lambda q, k, v, pos: sdpa(q, k[:, :1], v.narrow(1, 1, 1), enable_gqa=True), 1, 1,
    ),
}  # fmt: skip

ALONE = {  # and the word that the reason must have
    "is_causal": (lambda q, k, v, pos: sdpa(q, k, v, is_causal=True), "is_causal"),
    "heads turned round": (lambda q, k, v, pos: sdpa(q, k, v.flip(1)), "values"),
    "heads chosen": (lambda q, k, v, pos: sdpa(q, k[:, [1, 0]], v), "keys"),
    "a head without its dimension": (lambda q, k, v, pos: sdpa(q, k, v[:, 1].unsqueeze(1).expand(v.shape)), "values"),
    "halves of the channels": (lambda q, k, v, pos: torch.cat([sdpa(q, k, x) for x in v.chunk(2, 3)], -1), "values"),
    "tokens repeated": (lambda q, k, v, pos: sdpa(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)), "keys"),
    "values that are the keys": (lambda q, k, v, pos: sdpa(q, k, k), "values from stored keys"),
    "keys that are the values": (lambda q, k, v, pos: sdpa(q, v, v), "keys are read from stored values"),
    "keys and values exchanged": (lambda q, k, v, pos: softmax_of(q @ v.mT, k), "keys are read from stored values"),
    "keys times queries": (lambda q, k, v, pos: softmax_of((k @ q.mT).mT, v), ""),
    "more queries than new tokens": (
        lambda q, k, v, pos: sdpa(torch.cat([q, q], 2), k, v)[:, :, : q.shape[2]], "another length than the step",
    ),
    "values turned": (lambda q, k, v, pos: sdpa(q, k, v.flip(3)), ""),
    "a part of the keys": (lambda q, k, v, pos: sdpa(q, k[:, :, 1:24], v[:, :, 1:24], mask_of(pos)[:, 1:24]), "keys"),
    "keys and values of different tokens": (lambda q, k, v, pos: sdpa(q, k[:, :, :24], v[:, :, 1:25]), ""),
    "weights that are returned": (lambda q, k, v, pos: (w := torch.softmax(q @ k.mT, -1)) @ v + w.sum(), "weights"),
    "scores that are returned": (lambda q, k, v, pos: torch.softmax(s := q @ k.mT, -1) @ v + s.sum(), "scores"),
    "softmax over queries": (lambda q, k, v, pos: torch.softmax(q @ k.mT, -2) @ v, "dimension"),
    "a mask within the softcap": (
        lambda q, k, v, pos: softmax_of(torch.tanh((q @ k.mT + mask_of(pos, torch.float32)) / 5.0) * 5.0, v), "add",
    ),
    "a scale outside of the softcap": (
        lambda q, k, v, pos: softmax_of(torch.tanh(q @ k.mT / 5.0) * 5.0 * SCALE, v), "tanh",
    ),
    "a mask on the joined scores": (
        lambda q, k, v, pos: torch.softmax(
            torch.cat([q @ k.mT, torch.ones(1, HEADS, 1, 1).expand(1, HEADS, q.shape[2], 1)], -1) * SCALE, -1
        )[..., :-1] @ v, "joined",
    ),
    "zeros filled in": (lambda q, k, v, pos: softmax_of((q @ k.mT).masked_fill(~mask_of(pos), 0.0), v), "fills"),
    "small numbers filled in": (
        lambda q, k, v, pos: softmax_of((q @ k.mT).masked_fill(~mask_of(pos), -5.0), v), "fills",
    ),
    "two numbers filled in": (
        lambda q, k, v, pos: softmax_of(
            (q @ k.mT).masked_fill(~mask_of(pos), -1e9).masked_fill(torch.arange(COUNT) == 1, -1e4), v
        ), "different numbers",
    ),
    "other scores where the mask is false": (
        lambda q, k, v, pos: softmax_of(torch.where(mask_of(pos), q @ k.mT, (2 * q) @ k.mT), v), "where",
    ),
    "scores added to themselves": (lambda q, k, v, pos: softmax_of((s := q @ k.mT) + s.tanh(), v), "scores"),
    "another key's letter": (
        lambda q, k, v, pos: softmax_of(torch.einsum("bhqd,bgkd->bhqk", q, k), v), "not multiplied along the channels",
    ),
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
    "a query that is changed afterwards": (
        lambda q, k, v, pos: (r := q * 1.0, s := r @ k.mT, r.mul_(2.0), softmax_of(s, v))[-1], "mul_ changes in place",
    ),
    "a query that an activation changes": (
        lambda q, k, v, pos: (
            r := q * 1.0, s := r @ k.mT, torch.nn.functional.relu(r, inplace=True), softmax_of(s, v))[-1],
        "relu changes in place",
    ),
    "a query that is changed by the method behind an operator": (
        lambda q, k, v, pos: (r := q * 1.0, s := r @ k.mT, r.__imul__(2.0), softmax_of(s, v))[-1],
        "__imul__ changes in place",
    ),
    "a query that is changed inside of vmap": (
        lambda q, k, v, pos: (
            r := q * 1.0, s := r @ k.mT, torch.vmap(lambda x: x.mul_(2.0))(r), softmax_of(s, v))[-1],
        "mul_ changes in place",
    ),
    "a mask that is changed afterwards": (
        lambda q, k, v, pos: (
            m := mask_of(pos, torch.float32), s := q @ k.mT + m, m[:, 2:].fill_(-3.0), softmax_of(s, v))[-1],
        "fill_ changes in place",
    ),
    "a mask that becomes the scores": (
        lambda q, k, v, pos: (
            m := BIAS.repeat(1, 1, q.shape[2], 1), o := softmax_of(m.add_(q @ k.mT), v), o + m.sum())[-1],
        "not the scores",
    ),
    "scores written to another tensor": (
        lambda q, k, v, pos: (
            m := q.new_zeros(*q.shape[:3], COUNT), o := softmax_of(torch.matmul(q, k.mT, out=m), v), o + m.sum())[-1],
        "not the scores",
    ),
    "an output written to another tensor": (
        lambda q, k, v, pos: (m := q * 0.0, o := torch.matmul(torch.softmax(q @ k.mT, -1), v, out=m), o + m)[-1],
        "not the scores",
    ),
    "keys copied, then changed": (
        lambda q, k, v, pos: (t := k.mT.clone(), t.mul_(2.0), softmax_of(q @ t, v))[-1],
        "keys or values that were read",
    ),
    "values copied, then one head changed": (
        lambda q, k, v, pos: (t := v.clone(), t.select(1, 0).mul_(2.0), softmax_of(q @ k.mT, t))[-1],
        "keys or values that were read",
    ),
    "a number that is changed": (
        lambda q, k, v, pos: (f := torch.full([], 2.5), f.mul_(3.0), softmax_of(q @ k.mT * f, v))[-1],
        "mul_ changes in place",
    ),
    "a number cut to an integer": (
        lambda q, k, v, pos: softmax_of(q @ k.mT * torch.full([], 2.5, dtype=torch.int64), v), "mul lies between",
    ),
    "baddbmm with the values": (
        lambda q, k, v, pos: torch.baddbmm(
            q.flatten(0, 1), torch.softmax(q @ k.mT, -1).flatten(0, 1), v.flatten(0, 1)).view(q.shape),
        "baddbmm adds to the output",
    ),
    "a mask with more rows than there are queries": (
        lambda q, k, v, pos: (
            torch.softmax(q[:, :, :1] @ k.mT + BIAS.mT[0, 0, :5] * q.new_ones(COUNT), -1) @ v)[:, :, :1] + q * 0.0, "",
    ),
    "the largest of another row and head": (
        lambda q, k, v, pos: softmax_of(
            (s := q @ k.mT) - s.max(-1, keepdim=True).values.transpose(1, 2), v)[:, :, :1] + q * 0.0
        if q.shape[2] == 1 else q * 1.0, "",
    ),
    "a sink for each query behind the softmax": (
        lambda q, k, v, pos: weighed(s := q @ k.mT, v, torch.logsumexp(s, -1) - pos / 9.0), "scores are used",
    ),
    "another sum than of the scores behind the softmax": (
        lambda q, k, v, pos: weighed((s := q @ k.mT) * 2.0, v, torch.logsumexp(s, -1) - ONES), "scores are used",
    ),
    "sinks behind the softmax, and their share": (
        lambda q, k, v, pos: weighed(s := q @ k.mT, v, x := torch.logsumexp(s, -1) - ONES) + x[..., None],
        "scores are used",
    ),
    "a sum over queries behind the softmax": (
        lambda q, k, v, pos: weighed(s := q @ k.mT, v, torch.logsumexp(s, -2)[:, :, :1] - ONES), "scores are used",
    ),
    "the rest behind the softmax": (
        lambda q, k, v, pos: weighed(s := q @ k.mT, v, ONES - torch.logsumexp(s, -1)), "scores are used",
    ),
    "another cap than it divides by": (lambda q, k, v, pos: softmax_of(torch.tanh(q @ k.mT / 5.0) * 4.0, v), "tanh"),
}  # fmt: skip


#: Forms whose mask differs by head.
BIASED = ("two masks", "a bias and a fill", "baddbmm, ALiBi and a mask", "the largest subtracted")


def step_of(attend, number=2):
    def step(q, k, v, layers, pos):
        for keys, values in layers[:number]:
            assign(keys, values, k, v, pos)
            q = attend(q, keys, values, pos)
        return q

    return step


def together(forms):
    """A step whose layers each have a form of their own: compiling many steps takes longer than one of many layers."""

    def step(q, k, v, layers, pos):
        out = []
        for attend, (keys, values) in zip(forms, layers, strict=True):
            assign(keys, values, k, v, pos)
            out.append(attend(q, keys, values, pos))
        return out

    return step


def in_groups(names, size=6):
    names = list(names)
    return [pytest.param(names[i : i + size], id=names[i]) for i in range(0, len(names), size)]


#: Forms whose results the CPU kernel computes in the fast tests: by what it is given, not by how that is written.
COMPILED = {
    "softcap, then two fills": [1] * 9, "two masks": [5] * 2, "sinks": [12] * 2, "einsum, grouped queries": [1] * 9,
}  # fmt: skip


def check_fused(names, step, sizes, number=2):
    mine, theirs = run_both(step, sizes, seen := Rewrites(), number=number)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for made in seen.made:
        assert (count(made, ops.DECODE), count(made, ops.LOAD)) == (len(names), 0), names
        masks = [DecodeArguments.of(node).mask for node in made.graph.nodes if node.target is ops.DECODE]
        for name, mask in zip(names, masks, strict=True):
            heads = HEADS if name in BIASED else 1  # masks are broadcast, never made larger
            assert mask is None or fake(mask).shape[1] == heads, name


@pytest.mark.parametrize("names", in_groups(FUSED))
def test_fused(names, plain_torch):
    check_fused(names, together([FUSED[name] for name in names]), [1, 12, 1], len(names))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_fused_alone(name, plain_torch):
    check_fused([name] * 2, step_of(FUSED[name]), [1, 12, 1])


@pytest.mark.parametrize("name", COMPILED)
def test_fused_for_the_kernel(name):
    check_fused([name] * 2, step_of(FUSED[name]), COMPILED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_fused_for_the_kernel_at_any_number_of_tokens(name):
    check_fused([name] * 2, step_of(FUSED[name]), [5, 1, 12, 1])


@pytest.mark.parametrize("name", PARTS)
def test_fused_in_parts(name, plain_torch):
    attend, calls, heads = PARTS[name]
    mine, theirs = run_both(step_of(attend), [1, 12], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for made in seen.made:
        assert (count(made, ops.DECODE), count(made, ops.LOAD)) == (2 * calls, 0)
        masks = [DecodeArguments.of(node).mask for node in made.graph.nodes if node.target is ops.DECODE]
        assert all(mask is None or fake(mask).shape[1] == heads for mask in masks)


def test_a_kernel_reads_a_part_of_the_heads():
    mine, theirs = run_both(step_of(PARTS["halves of the values"][0]), [1] * 9, Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


#: Those that change what others of the same step read, or that are told of twice.
SINGLE = [
    *(name for name, (_, word) in ALONE.items() if "changes in place" in word or "were read" in word),
    *(name for name, (_, word) in ALONE.items() if word == "not the scores"), "halves of the channels",
]  # fmt: skip
TOLD, UNTOLD = ([n for n in ALONE if n not in SINGLE and bool(ALONE[n][1]) == told] for told in (True, False))


@pytest.mark.parametrize("names", [*in_groups(TOLD), *in_groups(UNTOLD)])
def test_left_to_torch(names, caplog):
    step, seen = together([ALONE[name][0] for name in names]), Rewrites()
    with caplog.at_level("INFO", logger="xquant_fx"):
        mine, theirs = run_both(step, [1, 12], seen, UNSHARED, number=len(names))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert all(count(made, ops.DECODE) == 0 for made in seen.made), names
    told = re.findall(r"attention (\d+) \(.*\) reads dequantized keys and values: (.*)", caplog.text)
    if names[0] in TOLD:
        assert {int(number) for number, _ in told} == set(range(len(names))), told
        for number, reason in told:
            name = names[int(number)]
            assert ALONE[name][1] in reason, name


@pytest.mark.parametrize(
    "name", [name if name in SINGLE else pytest.param(name, marks=pytest.mark.slow) for name in ALONE]
)
def test_left_to_torch_alone(name, caplog):
    attend, word = ALONE[name]
    with caplog.at_level("INFO", logger="xquant_fx"):
        mine, theirs = run_both(step_of(attend, 1), [1, 12], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert all(count(made, ops.DECODE) == 0 for made in seen.made)
    if word:
        said = [r.getMessage() for r in caplog.records if "dequantized" in r.getMessage()]
        assert said and all(word in message.split(": ", 1)[1] for message in said), said


@pytest.mark.parametrize(
    ("name", "attention", "layers"),
    [
        pytest.param("llama", "sdpa", 2, marks=pytest.mark.slow),
        ("llama", "eager", 2),
        pytest.param("gpt2", "eager", 2, marks=pytest.mark.slow),
        pytest.param("falcon", "sdpa", 2, marks=pytest.mark.slow),
        ("gemma2", "eager", 2),
        ("gpt_oss", "eager", 2),
        pytest.param("codegen", "eager", 2, marks=pytest.mark.slow),
        pytest.param("bloom", "eager", 2, marks=OLD_BLOOM),
        ("deepseek_v3", "sdpa", 2),
    ],
)
def test_models_and_what_explain_says_of_them(name, attention, layers, plain_torch):
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


def test_one_token_at_several_positions():
    def step(q, k, v, layers, pos):
        keys, values = layers[0]
        assign(keys, values, k[:, :, :1], v[:, :, :1], pos)
        return sdpa(q, keys, values)

    mine, theirs = run_both(step, [3, 1, 5], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert all(count(made, ops.DECODE) == 1 for made in seen.made)


def test_one_query_for_all_sequences():
    """It is broadcast over the batch of the cache, which the op does not do."""

    def step(q, k, v, layers, pos):
        keys, values = layers[0]
        assign(keys, values, k, v, pos)
        return softmax_of(q @ keys.mT, values)

    shape, seen = (3, *SHAPE[1:]), Rewrites()
    ours = quantized_layers(shape=shape)
    theirs, x = copy.deepcopy(ours), torch.randn(3, HEADS, 4, DIM)
    args = x[:1], x, x * 2
    with torch.no_grad():
        got = torch.compile(step, backend=seen, dynamic=False)(*args, ours, torch.arange(4))
        torch.testing.assert_close(got, step(*args, theirs, torch.arange(4)), rtol=1e-5, atol=1e-5)
    assert count(seen.made[0], ops.DECODE) == 0


def test_alibi_and_mask_of_falcon(attended_by):
    """(scores + ALiBi) * scale + mask, with a mask as wide as the cache."""
    model, seen = tiny("falcon", "eager", alibi=True), Rewrites()
    ours, ids = XQuantCache(model.config, 32, CONFIG), torch.arange(3, 25)[None]
    seen_tokens = (torch.arange(32) < 10)[None].long()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=ours, attention_mask=torch.ones(1, 9, dtype=torch.long))
        theirs = copy.deepcopy(ours)
        step = torch.compile(model.forward, backend=seen, dynamic=False)
        got = step(ids[:, 9:10], past_key_values=ours, attention_mask=seen_tokens).logits
        wanted = model(ids[:, 9:10], past_key_values=theirs, attention_mask=seen_tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert count(seen.made[0], ops.DECODE) == 2

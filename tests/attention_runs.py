"""Decode steps on caches filled by the real store path, by the Triton kernels and by the reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from attention_digits import lost_scores, lost_values
from attention_reference import Stored, attention, limit_of
from numeric import seeded
from states import layers_of
from store_runs import poison
from torch import Tensor

from xquant_fx import XQuantConfig, ops
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.decode_attention import cpu_source
from xquant_fx.kernels.decode_attention.arguments import OF_KEYS, OF_SIDE, DecodeArguments, of_sides
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.rows import SHARED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """One decode step. ``mask`` is a name of ``make_mask``."""

    past: int = 150
    query: int = 1
    max_len: int = 200
    batch: int = 1
    kv_heads: int = 1
    group: int = 4
    dim: int = 64
    v_dim: int | None = None
    dtype: str = "float16"
    k_scheme: str = "per_channel"
    v_scheme: str = "per_token"
    k_bits: float = 2
    v_bits: int = 1
    k_group: int = 32
    v_group: int | None = None
    residual: int = 32
    v_residual: int | None = None
    """Of values, where it differs."""
    sinks: int = 0
    start: tuple[int, ...] = ()
    mask: str = "causal"
    extra: bool = False
    softcap: float = 0.0
    window: int = 0
    scale: float | None = None
    scale_dtype: str | None = None
    loud: float = 1.0
    quiet: float = 1.0
    quiet_values: float = 1.0
    """What keys and values are multiplied by."""
    norms: bool = False
    """Whether ranked keys are divided by token norms; tokens differ in loudness then."""
    spoil: str = ""
    peak: float = 0.0
    """By how much the logit of token 0 exceeds the others', which are about equal; 0: nothing of the kind."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def stored_state(s: Setup, side: str, start: Tensor) -> tuple[KVState, Tensor | None]:
    """One side of one layer after ``past`` tokens and the step; what was never written is NaN or junk.

    Of a chunk too long for the ring, its own tokens besides, and the ring is as it was before them.
    """
    dim = s.dim if side == "key" else s.v_dim or s.dim
    config = XQuantConfig(
        k_scheme=s.k_scheme, v_scheme=s.v_scheme,
        k_bits=s.k_bits, v_bits=s.v_bits, share_values_from=None, k_group_size=s.k_group, v_group_size=s.v_group,
        residual_length=s.residual, v_residual_length=s.v_residual, sink_tokens=s.sinks, k_token_norms=s.norms,
        scale_dtype=None if s.scale_dtype is None else getattr(torch, s.scale_dtype),
    )  # fmt: skip
    shape = (s.batch, s.kv_heads, s.max_len, dim)
    state = layers_of(config, shape, s.torch_dtype, start=start)[0][side == "value"]
    poison(state)
    channel = torch.randn(dim, generator=seeded(5)) * s.loud
    noise = torch.randn(s.batch, s.kv_heads, s.past + s.query, dim, generator=seeded(7 + (side == "key")))
    x = noise * (0.2 + channel.abs()) + channel
    x = x * (torch.arange(x.shape[2]) % 5 / 4 + 0.5)[:, None] if s.norms and side == "key" else x
    x = x * (s.quiet if side == "key" else s.quiet_values)
    if s.peak and side == "key":
        x = noise * 0.02
        x[:, :, 0, 0] = 1.0
    x = x.to(s.torch_dtype)
    for pos in torch.arange(s.past).split(ops.LONG_CHUNK - 1):  # longer ones have a kernel, which would be compiled
        if s.past:
            state.store(x[:, :, pos], pos)
    ring, new = state.owned["ring"].clone(), x[:, :, s.past :]
    state.store(new, torch.arange(s.past, s.past + s.query))
    if s.query <= STEP_TOKENS:
        return state, None
    state.owned["ring"] = ring
    return state, state.as_stored(new)


def make_mask(s: Setup) -> Tensor | None:
    """None, or a mask of the kind that ``s.mask`` names."""
    t, position = torch.arange(s.max_len), s.past + torch.arange(s.query)
    causal = (t <= position[:, None])[None, None]
    start = torch.tensor([*s.start, *[0] * s.batch][: s.batch])
    padded = causal & (t >= start[:, None])[:, None, None]
    if s.mask == "none":
        return None
    if s.mask == "causal":
        return causal
    if s.mask == "padded":
        return padded
    if s.mask == "expanded":
        return padded.expand(s.batch, s.kv_heads * s.group, s.query, s.max_len)
    if s.mask == "row":  # tokens behind the length are seen, too
        return torch.rand(1, 1, 1, s.max_len, generator=seeded(3)) < 0.7
    if s.mask == "heads":
        return torch.rand(1, s.kv_heads * s.group, s.query, s.max_len, generator=seeded(3)) < 0.7
    if s.mask == "empty":  # query 0 of every head sees nothing
        return padded & (torch.arange(s.query)[:, None] > 0)
    if s.mask == "alibi":
        slope = -(2.0 ** -torch.arange(1, s.kv_heads * s.group + 1))[:, None, None]
        return (slope * (position[:, None] - t).abs()).masked_fill(~padded, -torch.inf).to(s.torch_dtype)
    if s.mask == "least":  # what programs write for "not seen", a row of nothing else included
        least = torch.finfo(s.torch_dtype).min
        return torch.where(padded & (torch.arange(s.query)[:, None] > 0), 0.0, least).to(s.torch_dtype)
    if s.mask == "bias":
        return torch.randn(s.batch, 1, 1, s.max_len, generator=seeded(3))
    raise ValueError(s.mask)


def inputs(s: Setup) -> dict[str, Any]:
    """Arguments of the step: ``q``, ``key`` and ``value`` (KVState), ``start``, ``mask``, ``sink_logits``."""
    start = torch.tensor([*s.start, *[0] * s.batch][: s.batch])
    q = torch.randn(s.batch, s.query, s.kv_heads * s.group, s.dim, generator=seeded(1))
    if s.peak:
        q = torch.zeros_like(q)
        q[..., 0] = s.peak / (s.scale or s.dim**-0.5)
    made = {side: stored_state(s, side, start) for side in ("key", "value")}
    states, new = ({side: pair[i] for side, pair in made.items()} for i in (0, 1))
    if s.spoil:
        side, name = s.spoil.split(".")
        stored = states[side].owned[name][0, -1]
        stored.view(-1)[0] = 0xFF if stored.dtype == torch.uint8 else math.nan
    return dict(
        **states, new=new, q=q.to(s.torch_dtype).transpose(1, 2), start=start, mask=make_mask(s),
        sink_logits=torch.randn(s.kv_heads * s.group, generator=seeded(2)) if s.extra else None,
    )  # fmt: skip


def arguments(s: Setup, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``decode_attention`` by name."""
    tensors = of_sides(given["key"].tensor, given["value"].tensor)
    past = torch.tensor([s.past], device=given["q"].device)
    key, value = given["key"].spec, given["value"].spec
    return dict(
        q=given["q"],
        **tensors,
        start=given["start"],
        past=past,
        mask=given["mask"],
        sink_logits=given["sink_logits"],
        new_tokens=s.query,
        max_len=s.max_len,
        k_scheme=s.k_scheme,
        k_bits=s.k_bits,
        k_group=key.group_size,
        k_residual=key.residual_length,
        v_scheme=s.v_scheme,
        v_bits=s.v_bits,
        v_group=value.group_size,
        v_residual=value.residual_length,
        scale=s.scale or s.dim**-0.5,
        softcap=s.softcap,
        window=s.window,
        k_new=given["new"]["key"],
        v_new=given["new"]["value"],
    )


def reference(
    s: Setup, given: dict[str, Any], dtype: torch.dtype, rounded: torch.dtype | None, digits: bool = False
) -> Tensor:
    """The step by ``attention_reference``; ``digits``: rounded as the C++ kernel rounds, too."""
    key, value = (
        Stored(
            scheme=given[side].spec.scheme, bits=given[side].spec.bits, group=given[side].spec.group_size,
            residual=given[side].spec.residual_length, new=given["new"][side],
            **{name: given[side].tensor(name) for name in (*OF_SIDE, *OF_KEYS)},
        )
        for side in ("key", "value")
    )  # fmt: skip
    more: dict[str, Any] = {}
    if digits and (n := limit_of(key, s.past)) and cpu_source.digits(s.torch_dtype, s.k_bits) == 1:
        more["more_scores"] = lost_scores(given["q"], key, n, s.max_len).to(dtype)
    if digits and (m := limit_of(value, s.past)) and cpu_source.digits(s.torch_dtype, s.v_bits) == 1:
        t, first = torch.arange(s.max_len), given["start"][:, None, None, None]
        outside = (t < first) | (t >= first + s.sinks)
        more["more_values"] = lambda p: lost_values(p * outside, value, m).to(dtype)
    return attention(
        given["q"],
        key,
        value,
        given["start"],
        s.past,
        given["mask"],
        given["sink_logits"],
        s.query,
        s.max_len,
        s.scale or s.dim**-0.5,
        s.softcap,
        s.window,
        dtype,
        rounded,
        **more,
    )


def errors(s: Setup, out: Tensor, given: dict[str, Any], digits: bool = False) -> dict[str, Any]:
    """Largest error of ``out`` and of the fp32 reference against the truth, and what else tests ask for.

    ``digits``: the reference rounds as the C++ kernel does.
    """
    truth = reference(s, given, torch.float64, None)
    usual = reference(s, given, torch.float32, s.torch_dtype, digits).to(s.torch_dtype)
    assert out.shape == truth.shape and out.dtype == s.torch_dtype
    same_nan, nans = torch.equal(out.isnan(), truth.isnan()), int(truth.isnan().sum())
    out, usual, truth = (t.double().nan_to_num(0.0) for t in (out, usual, truth))
    empty = (truth == 0).all(-1)
    return {
        "error": (out - truth).abs().max().item(),
        "usual": (usual - truth).abs().max().item(),
        "largest": truth.abs().max().item(),
        "same_nan": same_nan,
        "nans": nans,
        "zeros_are_zero": bool((out[empty] == 0).all()),
    }


def interpret(hip: bool = False, **kwargs: Any) -> dict[str, Any]:
    """Errors of the Triton kernels, in the interpreter, of ``Setup(**kwargs)``, and which ran; ``hip``: as on AMD's."""
    from xquant_fx.kernels.decode_attention.triton_launch import launch

    kwargs["start"] = tuple(kwargs.get("start", ()))
    setup = Setup(**kwargs)
    given = inputs(setup)
    ran: list[str] = []

    def wrap(kernel: Any) -> Any:
        ran.append(kernel.fn.__name__)
        return kernel

    out = launch(DecodeArguments(**arguments(setup, given)), wrap=wrap, interpret=True, hip=hip)
    return {**errors(setup, out, given), "kernels": ran}


def interpret_rows(pasts: list[int], **kwargs: Any) -> list[dict[str, Any]]:
    """The same of a batch whose rows hold ``pasts`` tokens before the step: the errors of each row."""
    from xquant_fx.kernels.decode_attention.triton_launch import launch

    starts = kwargs.pop("start", [0] * len(pasts))
    setups = [Setup(**kwargs, past=past, start=(start,)) for past, start in zip(pasts, starts, strict=True)]
    given = [inputs(s) for s in setups]
    rows = [DecodeArguments(**arguments(s, each)) for s, each in zip(setups, given, strict=True)]
    whole = {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors if name not in SHARED}
    # Positions of a step [B, q], of which the first of each row is the number of tokens before it.
    pos = whole["past"][:, None] + torch.arange(setups[0].query)
    ran: list[str] = []

    def wrap(kernel: Any) -> Any:
        ran.append(kernel.fn.__name__)
        return kernel

    out = launch(rows[0].replace(**{**whole, "past": pos[:, 0]}), wrap=wrap, interpret=True, hip=False)
    each = zip(setups, out.split(1), given, strict=True)
    return [{**errors(s, of_row, of_given), "kernels": ran} for s, of_row, of_given in each]

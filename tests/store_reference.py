"""What the stored tensors of one layer and side must hold and what a step must see: float64, from the semantics.

It keeps every token in full precision and works out from them, for any number of past tokens, what
is quantized and what attention sees, so that a rollback is nothing special. Stored codes and scales
are first checked against float64 (codes may differ only at a rounding tie, scales by the rounding
of their dtype and of fp32) and then taken over, so that the values built on them can be held to the
rounding of the last operation. Allowances are derived, with u = 2**-24; see tests/numeric.py.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from numeric import U, storage_slack
from torch import Tensor

from xquant_fx import XQuantConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of a pair of layers, keys or values."""

    side: str = "key"
    bits: float = 2
    ranked: bool = False
    """Ranked keys or rotated values, which ``Reference`` does not know and pairs do not share."""
    folded: bool = False
    """Of rotated values: whether they come rotated."""
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 1
    max_len: int = 60
    dim: int = 16
    residual: int = 8
    group: int = 4
    eta: float = 0.0
    fit: str = "least_squares"
    shared: bool = True
    sinks: int = 0
    rollback: int = 8
    padding: tuple[int, ...] = ()
    scale_dtype: torch.dtype | None = None
    scale: float = 1.0
    norms: bool = False
    """Whether ranked keys are divided by token norms; tokens differ in loudness then."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.max_len, self.dim

    @property
    def config(self) -> XQuantConfig:
        share = 0 if self.shared and not self.ranked else None
        schemes = dict(k_scheme="per_channel", v_scheme="per_token", k_bits=1, v_bits=1)
        if self.ranked:  # of the other side, which nobody looks at
            schemes |= dict(k_scheme="per_channel_ranked", v_scheme="per_token_rotated")
        if self.side == "key":
            schemes |= dict(k_scheme="per_channel_ranked" if self.ranked else "per_channel", k_bits=self.bits)
            schemes |= dict(k_token_norms=self.norms)
        else:
            own = "per_token_folded" if self.folded else "per_token_rotated"
            schemes |= dict(v_scheme=own if self.ranked else "per_token", v_bits=self.bits)
        groups = dict(k_group_size=self.group) if self.side == "key" else dict(k_group_size=1, v_group_size=self.group)
        return XQuantConfig(
            share_keys_from=share, share_values_from=share, shared_fit=self.fit,
            residual_length=self.residual, eta_1bit=self.eta, eta_2bit=self.eta, sink_tokens=self.sinks,
            rollback_tokens=self.rollback, scale_dtype=self.scale_dtype, **schemes, **groups,
        )  # fmt: skip

    @property
    def start(self) -> Tensor:
        return torch.tensor([*self.padding, *[0] * self.batch][: self.batch])

    def tokens(self, count: int, seed: int) -> Tensor:
        """Random tokens with an offset and a spread a channel, as keys have."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.heads, count, self.dim, generator=generator)
        channel = torch.arange(self.dim) % 5 + 1
        x = x * (torch.arange(count) % 7 + 1)[:, None] if self.norms else x
        return ((x * channel + channel - 2) * self.scale).to(self.dtype)


class Reference:
    """One side of one layer; ``lower`` is the reference whose codes it borrows."""

    def __init__(self, case: Case, lower: Reference | None = None) -> None:
        self.case, self.lower = case, lower
        self.tokens = torch.zeros(case.batch, case.heads, 0, case.dim, dtype=torch.float64)
        self.codes = self.values = self.allowed = self.tokens

    def limit(self, past: int) -> int:
        """Tokens that are quantized when ``past`` are stored."""
        r = self.case.residual
        if self.case.bits == 16:
            return 0
        return r * math.floor(past / r) if self.case.side == "key" else max(0, past - r)

    def write(self, past: int, x: Tensor) -> None:
        """Tokens from ``past`` on are ``x``; any that were there are forgotten."""
        self.tokens = torch.cat([self.tokens[:, :, :past], x.double()], 2)

    def seen(self, past: int, new: int, count: int) -> tuple[Tensor, Tensor]:
        """(expected, most it may be off) [B, H, count, D] in a step of ``new`` tokens after ``past``."""
        expected = torch.zeros(*self.tokens.shape[:2], count, self.case.dim, dtype=torch.float64)
        allowed = torch.zeros_like(expected)
        here = min(past + new, count)
        expected[:, :, :here] = self.tokens[:, :, :here]
        old = min(self.limit(past), count)
        t = torch.arange(old)[None, None, :, None] - self.case.start[:, None, None, None]
        sink = (t >= 0) & (t < self.case.sinks)
        expected[:, :, :old] = torch.where(sink, expected[:, :, :old], self.values[:, :, :old])
        allowed[:, :, :old] = torch.where(sink, 0.0, self.allowed[:, :, :old])
        return expected, allowed

    def check_stored(self, stored: dict[str, Tensor]) -> None:
        """Check the stored codes and scales of all that is quantized by now, and take them over."""
        limit = self.limit(self.tokens.shape[2])
        if not limit:
            return
        case, n = self.case, 2**self.case.bits - 1
        key = case.side == "key"
        split, axis = ((2, (-1, case.group)), 3) if key else ((3, (-1, case.group)), 4)
        x = self.tokens[:, :, :limit].unflatten(*split)
        if key:
            scale, zero = (stored[k].double()[:, :, : limit // case.group, None] for k in ("scale", "zero"))
            counts = torch.arange(limit)[None] >= (case.start + case.sinks)[:, None]
            valid = counts.reshape(case.batch, 1, -1, case.group, 1).expand(x.shape)
        else:
            scale, zero = (stored[k].double()[..., :limit].transpose(2, 3)[..., None] for k in ("scale", "zero"))
            valid = torch.ones(x.shape, dtype=torch.bool)
        codes = self.read_codes(stored["codes"], limit).unflatten(*split)
        some = valid.any(axis, keepdim=True)
        low = torch.where(some, torch.where(valid, x, math.inf).amin(axis, keepdim=True), 0.0)
        high = torch.where(some, torch.where(valid, x, -math.inf).amax(axis, keepdim=True), 0.0)
        step = (high - low) / n
        if self.lower is None:
            exact = torch.where(step > 0, (x - low) / torch.where(step > 0, step, 1.0), 0.0)
            wrong = valid & ((codes - exact).abs() > 0.5 + 8 * U * n)
            assert not wrong.any(), f"codes {codes[wrong]} for {exact[wrong]}"
        if self.lower is not None and case.fit == "least_squares":
            self._check_fit(x, codes, valid, axis, scale, zero)
        else:
            eta = case.eta if case.bits <= 2 else 0.0
            largest = torch.maximum(low.abs(), high.abs())
            self._near(scale, (1 - 2 * eta) * step, 4 * U * step)
            self._near(zero, low + eta * n * step, 4 * U * (largest + n * step))
        self.codes = codes.flatten(split[0], split[0] + 1)
        values = codes * scale + zero
        allowed = 2 * U * (codes * scale.abs() + zero.abs())
        allowed = allowed + storage_slack(values.abs() + allowed, case.dtype) * (case.dtype != torch.float32)
        self.values, self.allowed = (t.flatten(split[0], split[0] + 1) for t in (values, allowed))

    def read_codes(self, words: Tensor, limit: int) -> Tensor:
        """[B, H, limit, D]; 3 bits: the upper two of all codes, then the lowest of all."""
        if self.case.bits != 3:
            return self.read_plane(words, limit, self.case.bits)
        first = math.ceil(self.case.dim / 16) if self.case.side == "key" else words.shape[2] * 2 // 3
        high, low = words[:, :, :first], words[:, :, first:]
        return 2 * self.read_plane(high, limit, 2) + self.read_plane(low, limit, 1)

    def read_plane(self, words: Tensor, limit: int, bits: int) -> Tensor:
        """[B, H, limit, D]: field r of a word is in byte r % 4, at bit ``bits * (r // 4)`` of it."""
        key = self.case.side == "key"
        r = torch.arange(self.case.dim if key else limit)
        words = words.long().transpose(2, 3) if key else words.long()
        at = 8 * (r % (32 // bits) % 4) + bits * (r % (32 // bits) // 4)
        if key:
            words, at = words[:, :, :limit, r // (32 // bits)], at[None]
        else:
            words, at = words[:, :, r // (32 // bits)], at[:, None]
        return ((words >> at) & (2**bits - 1)).double()

    def _check_fit(self, x: Tensor, codes: Tensor, valid: Tensor, axis: int, scale: Tensor, zero: Tensor) -> None:
        """cov / var; an fp32 sum of m numbers is off by up to m u of the largest, and so are both means."""
        count = valid.sum(axis, keepdim=True).clamp(min=1)
        mean_x, mean_c = (torch.where(valid, t, 0.0).sum(axis, keepdim=True) / count for t in (x, codes))
        dev_x, dev_c = torch.where(valid, x - mean_x, 0.0), torch.where(valid, codes - mean_c, 0.0)
        var, cov = ((dev_c * dev).sum(axis, keepdim=True) for dev in (dev_c, dev_x))
        fitted = torch.where(var > 1e-9, cov / var.clamp(min=1e-9), 0.0)
        largest = torch.where(valid, x, 0.0).abs().amax(axis, keepdim=True)
        off = 4 * (x.shape[axis] + 4) * U * largest
        off_scale = torch.where(var > 1e-9, off * (count / var.clamp(min=1e-9)).sqrt(), 0.0)
        self._near(scale, fitted, off_scale)
        self._near(zero, mean_x - fitted * mean_c, off + off_scale * mean_c)

    def _near(self, stored: Tensor, exact: Tensor, off: Tensor) -> None:
        wrong = ~(
            (stored - exact).abs() <= off + storage_slack(exact.abs() + off, self.case.scale_dtype or torch.float16)
        )
        assert not wrong.any(), f"{stored[wrong]} for {exact.expand(stored.shape)[wrong]}"

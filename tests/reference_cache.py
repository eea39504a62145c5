"""An independent KV cache to compare with: section by section what the semantics say, in float64-ready torch.

It shares no code with the product. It keeps every key and value it was ever given, and next to them
the codes and scales of those that count as quantized, and it rebuilds what attention sees for every
step. Where a value sits on a rounding tie (within ``TIE`` of one), the code may be taken over from
the product, so that one tie does not hide what comes after it; the number of such codes is counted.
"""

from __future__ import annotations

import math

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

TIE = 1e-3


class Side:
    """Keys or values of one layer: all tokens, and codes, scales, zeros of the quantized ones."""

    def __init__(self, axis: str, bits: int, config, lower: Side | None, start: torch.Tensor | None):
        self.axis, self.bits, self.config, self.lower, self.start = axis, bits, config, lower, start
        self.tokens = None
        self.done = 0
        self.codes: list[torch.Tensor] = []
        self.dense: list[torch.Tensor] = []
        self.adopt = None
        self.ties = self.total = 0

    @property
    def length(self) -> int:
        return 0 if self.tokens is None else self.tokens.shape[2]

    def limit(self, length: int) -> int:
        r = self.config.given_residual(self.axis)
        return length // r * r if self.axis == "key" else max(0, length - r)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What attention sees in a step that brings ``x``; the step's flush comes after."""
        past = x[:, :, :0] if self.tokens is None else self.tokens
        if self.bits < 16 and self.done:
            past = torch.cat([*self.dense, past[:, :, self.done :]], 2)
        return torch.cat([past, x], 2)

    def append(self, x: torch.Tensor) -> None:
        self.tokens = x if self.tokens is None else torch.cat([self.tokens, x], 2)
        if self.bits == 16:
            return
        until = self.limit(self.length)
        if until > self.done:
            self._quantize(self.done, until)
            self.done = until

    def _quantize(self, a: int, b: int) -> None:
        x = self.tokens[:, :, a:b].float()
        if self.axis == "key":
            g = self.config.k_group_size
            pieces = [self._group(x[:, :, i : i + g], a + i, 2) for i in range(0, b - a, g)]
            codes, dense = (torch.cat([p[i] for p in pieces], 2) for i in (0, 1))
        else:
            g = self.config.v_group_size or x.shape[3]
            pieces = [self._group(x[..., i : i + g], a, 3, i) for i in range(0, x.shape[3], g)]
            codes, dense = (torch.cat([p[i] for p in pieces], 3) for i in (0, 1))
        self.codes.append(codes)
        self.dense.append(dense.to(self.tokens.dtype))

    def _group(self, x, token, dim, channel=0):
        n = 2**self.bits - 1
        valid = torch.ones_like(x, dtype=torch.bool)
        if self.axis == "key" and self.start is not None:
            valid = (token + torch.arange(x.shape[2])[None] >= self.start[:, None])[:, None, :, None].expand_as(x)
        some = valid.any(dim, keepdim=True)
        low = torch.where(valid, x, torch.tensor(math.inf)).min(dim, keepdim=True).values
        high = torch.where(valid, x, torch.tensor(-math.inf)).max(dim, keepdim=True).values
        low, high = low.where(some, torch.zeros(())), high.where(some, torch.zeros(()))
        step = (high - low) / n
        if self.lower is None:
            codes = self._round(torch.where(step > 0, (x - low) / step, torch.zeros(())), n, token, channel, valid)
        else:
            lent = torch.cat(self.lower.codes, 2)
            codes = lent[:, :, token : token + x.shape[2], channel : channel + x.shape[3]]
        if self.lower is not None and self.config.shared_fit == "least_squares":
            scale, zero = self._fit(x, codes.float(), valid, dim)
        else:
            eta = {1: self.config.eta_1bit, 2: self.config.eta_2bit}.get(self.bits, 0.0)
            scale, zero = (1 - 2 * eta) * step, low + eta * step * n
        scale, zero = (t.to(self.config.scale_dtype or torch.float16).float() for t in (scale, zero))
        return codes, codes * scale + zero

    def _fit(self, x, c, valid, dim):
        w = valid.double()
        count = w.sum(dim, keepdim=True).clamp(min=1)
        x, c = x.double(), c.double()
        mx, mc = (x * w).sum(dim, keepdim=True) / count, (c * w).sum(dim, keepdim=True) / count
        var = ((c - mc) ** 2 * w).sum(dim, keepdim=True)
        cov = ((c - mc) * (x - mx) * w).sum(dim, keepdim=True)
        s = torch.where(var > 0, cov / var, torch.zeros((), dtype=torch.float64))
        return s.float(), (mx - s * mc).float()

    def _round(self, scaled, n, token, channel, valid):
        codes = scaled.round().clamp(0, n)
        if self.adopt is not None:
            theirs = self.adopt(token, token + codes.shape[2], channel, channel + codes.shape[3]).float()
            differ = (theirs != codes) & valid
            self.total += int(valid.sum())
            self.ties += int(differ.sum())
            off = (scaled.frac() - 0.5).abs()[differ]
            assert (off < TIE).all(), f"a code differs that is no rounding tie: off by {off.max()}"
            codes = theirs
        return codes


class ReferenceLayer(CacheLayerMixin):
    """One layer that keeps everything; only for eager runs."""

    is_compileable = False
    is_sliding = False

    def __init__(self, key: Side, value: Side):
        super().__init__()
        self.key, self.value = key, value

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        out = self.key.seen(key_states), self.value.seen(value_states)
        self.pending = key_states, value_states
        return out

    def flush(self):
        self.key.append(self.pending[0])
        self.value.append(self.pending[1])

    def get_mask_sizes(self, query_length):
        return self.key.length + query_length, 0

    def get_seq_length(self):
        return self.key.length

    def get_max_length(self):
        return -1


class ReferenceCache(Cache):
    """Layers numbered in order and paired (2i, 2i + 1); ``flush()`` after every step."""

    def __init__(self, layers: int, config, start: torch.Tensor | None = None):
        made = []
        for i in range(layers):
            sides = []
            for name in ("key", "value"):
                bits = config.k_bits if name == "key" else config.v_bits
                first = config.share_keys_from if name == "key" else config.share_values_from
                first = layers if first is None else math.floor(first * layers) if isinstance(first, float) else first
                bits = bits if isinstance(bits, int) else bits[i]
                lower = getattr(made[i - 1], name) if i % 2 and i >= first and bits < 16 else None
                if lower is not None and lower.bits != bits:
                    lower = None
                sides.append(Side(name, bits, config, lower, start))
            made.append(ReferenceLayer(*sides))
        super().__init__(layers=made)

    def flush(self):
        """Commit the step: quantize what has become due, lower layers first."""
        for layer in self.layers:
            layer.flush()

    def adopt_from(self, cache) -> None:
        """Take codes at rounding ties from the product's ``cache`` (an XQuantCache of the same run)."""
        for mine, theirs in zip(self.layers, cache.quantized_layers, strict=True):
            for side, state in zip((mine.key, mine.value), theirs.states, strict=True):
                side.adopt = codes_reader(state)


def codes_reader(state):
    """A function that reads codes out of the packed words, bit by bit as kernels/packing.py says."""
    bits, is_key = state.spec.bits, state.spec.role == "key"

    def field(words, width, along, across):
        per = 32 // width
        r = along % per
        shift = 8 * (r % 4) + width * (r // 4)
        return (words[:, :, along // per][:, :, :, across] >> shift[:, None]) & (2**width - 1)

    def read(t0, t1, c0, c1):
        words = state.tensor("codes").to(torch.int64) & 0xFFFFFFFF
        tokens, channels = torch.arange(t0, t1), torch.arange(c0, c1)
        along, across = (channels, tokens) if is_key else (tokens, channels)
        if bits == 3:  # the upper two bits of all codes, then the lowest
            first = math.ceil(state.spec.shape[3] / 16) if is_key else words.shape[2] * 2 // 3
            picked = 2 * field(words[:, :, :first], 2, along, across) + field(words[:, :, first:], 1, along, across)
        else:
            picked = field(words, bits, along, across)
        return picked.transpose(2, 3) if is_key else picked

    return read

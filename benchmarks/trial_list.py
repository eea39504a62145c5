"""What quality_trials.py tries: a row of ``TRIALS`` each."""

from __future__ import annotations

import dataclasses
from typing import Any

from trial_codes import gaussian_trellis
from trial_quantizers import (
    Keys,
    Quantizer,
    Seen,
    fixed_widths,
    half_scale,
    over_layer,
    rotated_values,
    trellis_levels,
    uniform_levels,
    uniform_widths,
    vector_levels,
    water_filling,
)

from xquant_fx import XQuantConfig

#: Best step of 3 bits on a unit Gaussian.
STEP_OF_3_BITS = 0.5860


@dataclasses.dataclass(frozen=True)
class Trial:
    """A preset with other keys or values."""

    name: str
    base: str
    """The preset whose windows and sinks it has, and whose row it is compared with."""
    key: Quantizer
    value: Quantizer
    key_bits: float
    """Bits of a code, on average."""
    value_bits: float
    key_constants: int = 16
    """Bits per channel and group of tokens: a scale and a mid point."""
    value_constants: int = 8
    """Bits per token and KV head: a scale."""
    layer_constants: int = 8
    """Bits per token and layer: a norm of the keys."""
    chooses_windows: bool = False
    """Whether each layer and side has a window of its own (trial_windows.py)."""
    key_window: int | None = None
    """In the place of the preset's, in tokens."""
    value_window: int | None = None

    def true_bits(self, config: Any) -> float:
        """Bits per element of all that grows with the text, keys and values averaged."""
        dim, heads = config.head_dim, config.num_key_value_heads
        keys = self.key_bits + self.key_constants / XQuantConfig.preset(self.base).k_group_size
        keys += self.layer_constants / (heads * dim)
        return (keys + self.value_bits + self.value_constants / dim) / 2


def ranked(bits: float) -> Keys:
    """The product's keys."""
    return Keys(fixed_widths(bits))


def value_of(bits: int) -> Quantizer:
    """The product's values."""
    return rotated_values(uniform_levels(bits))


def trellis(bits: int) -> Quantizer:
    """Values by a trellis, which is trained when it is first used."""

    def read(seen: Seen) -> Any:
        return rotated_values(trellis_levels(gaussian_trellis(bits)))(seen)

    return read


def trial(name: str, base: str, **changes: Any) -> Trial:
    """The preset ``base`` with ``changes``: its widths are those of its config."""
    config = XQuantConfig.preset(base)
    assert isinstance(config.k_bits, int | float) and isinstance(config.v_bits, int | float)
    given = dict(key=ranked(config.k_bits), value=value_of(int(config.v_bits)), key_bits=config.k_bits,
                 value_bits=config.v_bits)  # fmt: skip
    return Trial(name, base, **{**given, **changes})


TRIALS = [
    trial("values: vectors of 8", "xquant-1.4", value=rotated_values(vector_levels)),
    trial("values: trellis, 1 bit", "xquant-1.4", value=trellis(1)),
    trial("keys: before RoPE, 1.5 bits", "xquant-1.4", key=Keys(fixed_widths(1.5), before_rope=True)),
    trial("keys: water-filling per head, 1.5 bits", "xquant-1.4", key=Keys(water_filling(1.5))),
    trial("values: vectors of 8 (K 2)", "xquant-1.7", value=rotated_values(vector_levels)),
    trial("values: trellis, 1 bit (K 2)", "xquant-1.7", value=trellis(1)),
    trial("values: trellis, 2 bits", "xquant-2.2", value=trellis(2)),
    trial("values: 3 bits, keys 1.25", "xquant-2.2", key=ranked(1.25), key_bits=1.25,
          value=rotated_values(uniform_levels(3, STEP_OF_3_BITS)), value_bits=3),
    trial("keys: before RoPE", "xquant-2.2", key=Keys(fixed_widths(2), before_rope=True)),
    trial("keys: before RoPE, water-filling per head", "xquant-2.2", key=Keys(water_filling(2), before_rope=True)),
    trial("keys: no token norms", "xquant-2.2", key=Keys(fixed_widths(2), token_norms=False), layer_constants=0),
    trial("keys: rotated, all of 2 bits (OScaR)", "xquant-2.2", key=Keys(uniform_widths(2), rotated=True)),
    trial("keys: all of 2 bits", "xquant-2.2", key=Keys(uniform_widths(2))),
    trial("keys: water-filling per head", "xquant-2.2", key=Keys(water_filling(2))),
    trial("keys: water-filling per layer", "xquant-2.2", key=Keys(over_layer(water_filling(2)))),
    trial("windows: keys 256, values 256", "xquant-2.2", key_window=256, value_window=256),
    trial("windows: keys 128, values 384", "xquant-2.2", key_window=128, value_window=384),
    trial("windows: by layer and side", "xquant-2.2", chooses_windows=True),
    trial("scales: in 16 bits", "xquant-2.2", key=Keys(fixed_widths(2), exact_scales=True), key_constants=32,
          value=rotated_values(uniform_levels(2), half_scale), value_constants=16),
]  # fmt: skip

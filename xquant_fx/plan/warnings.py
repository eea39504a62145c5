"""A word to those who take a preset that ruins real models, as it is the method of a paper or of another project."""

from __future__ import annotations

from typing import Any

from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.presets import MEASURED_KL, TOLERABLE_KL
from xquant_fx.warn_once import warn_once


def warn_of_cost(settings: Any) -> None:
    """Warn once, with the number, if ``settings`` are a preset whose measured cost is above TOLERABLE_KL."""
    for name, kl in MEASURED_KL.items():
        if kl > TOLERABLE_KL and settings == XQuantConfig.preset(name):
            warn_once(
                f"the preset {name!r} costs {kl:.2f} nats per token on SmolLM2-135M (docs/quality.md), which ruins its "
                f"text; the default costs {MEASURED_KL['xquant-2.2']:.2f}. Measure your model: xquant eval",
                key=f"cost of {name}",
            )

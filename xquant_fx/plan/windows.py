"""Which sliding windows of a model are quantized: those that take less memory then, if all of them are alike.

A model makes one mask for all its sliding layers, as wide as what the first of them gives back, so that they are
quantized all or none.
"""

from __future__ import annotations

from collections.abc import Sequence

from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan

#: How many residual windows a window holds at least, if ``sliding_windows`` is "auto": shorter ones still take about
#: half of their memory or more (docs/quality.md).
LEAST_RESIDUALS = 4


def why_not_windows(windows: Sequence[int], others: int, settings: XQuantConfig | Plan) -> str:
    """Why sliding windows of these many tokens stay in full precision, in words; "" if they are quantized.

    Args:
        windows: tokens that each sliding layer holds.
        others: full-attention layers of the same cache.
        settings: those of the cache. A plan says by its number of layers whether it means the windows, too.
    """
    if not windows:
        return ""
    if isinstance(settings, XQuantConfig) and settings.sliding_windows is False:
        return "sliding_windows of the config is False"
    if isinstance(settings, Plan) and len(settings.layers) == others:
        return f"the plan is for {others} layers, those of full attention"
    if len(set(windows)) > 1:
        return f"windows of {sorted(set(windows))} tokens, of which a model makes one mask"
    return why_short(windows[0], full_precision_tokens(settings)) or _why_little(windows[0], settings)


def _why_little(tokens: int, settings: XQuantConfig | Plan) -> str:
    if isinstance(settings, Plan) or settings.sliding_windows is True:
        return ""
    least = LEAST_RESIDUALS * settings.residual_length
    return "" if tokens >= least else f"window of {tokens} tokens is shorter than {LEAST_RESIDUALS} residual windows"


def why_short(tokens: int, held: int) -> str:
    """Why a window of ``tokens`` stays as it is, where a quantized layer keeps ``held`` tokens; "" if it is longer."""
    return f"window of {tokens} tokens is within the residual window, which holds {held}" if tokens <= held else ""


def full_precision_tokens(settings: XQuantConfig | Plan) -> int:
    """Tokens that a quantized layer keeps in full precision, rollbacks included."""
    if isinstance(settings, XQuantConfig):
        return settings.residual_length + settings.rollback_tokens
    return max(entry.residual_length + entry.rollback_tokens for layer in settings.layers for entry in layer)

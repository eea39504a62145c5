"""Which sliding windows of a model are quantized: those that take less memory then, if all of them are alike.

A model makes one mask for all its sliding layers, as wide as what the first of them gives back, so that they are
quantized all or none.
"""

from __future__ import annotations

from collections.abc import Sequence

from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import LayerPlan, Plan, make_plan

#: How many residual windows a window holds at least, if ``sliding_windows`` is "auto": shorter ones still take about
#: half of their memory or more (docs/quality.md).
LEAST_RESIDUALS = 4


def why_not_windows(windows: Sequence[int], others: int, settings: XQuantConfig | Plan) -> str:
    """Why sliding windows of these many tokens stay in full precision, in words; "" if they are quantized.

    Args:
        windows: tokens that each sliding layer holds.
        others: full-attention layers of the same cache.
        settings: those of the cache. Where they name each layer, their number says whether the windows are meant, too.
    """
    if len(set(windows)) > 1:
        several = f"windows of {sorted(set(windows))} tokens, of which a model makes one mask"
        return _why_not_asked(others, settings) or several
    return why_not_window(windows[0], others, settings) if windows else ""


def why_not_window(tokens: int, others: int, settings: XQuantConfig | Plan) -> str:
    """The same for one window of a cache whose masks are each as wide as its own layer."""
    short = why_short(tokens, full_precision_tokens(settings))
    return _why_not_asked(others, settings) or short or _why_little(tokens, settings)


def _why_not_asked(others: int, settings: XQuantConfig | Plan) -> str:
    if isinstance(settings, XQuantConfig) and settings.sliding_windows is False:
        return "sliding_windows of the config is False"
    named = _named_layers(settings)
    return f"the plan is for {others} layers, those of full attention" if named is not None and named == others else ""


def why_short(tokens: int, held: int) -> str:
    """Why what holds ``tokens`` stays as it is, where a quantized layer keeps ``held`` of them; "" if it is longer."""
    return (
        f"window or buffer of {tokens} tokens is within the residual window, which holds {held}"
        if tokens <= held
        else ""
    )


def full_precision_tokens(settings: XQuantConfig | Plan) -> int:
    """Tokens that a quantized layer keeps in full precision of either side, rollbacks included."""
    return max(entry.residual_length + entry.rollback_tokens for layer in _layers(settings) for entry in layer)


def _why_little(tokens: int, settings: XQuantConfig | Plan) -> str:
    if isinstance(settings, Plan) or settings.sliding_windows is True:
        return ""
    both = max(layer.key.residual_length + layer.value.residual_length for layer in _layers(settings))
    few = 2 * tokens < LEAST_RESIDUALS * both
    return f"window or buffer of {tokens} tokens is shorter than {LEAST_RESIDUALS} residual windows" if few else ""


def _named_layers(settings: XQuantConfig | Plan) -> int | None:
    """For how many layers settings are, if they name each."""
    if isinstance(settings, Plan):
        return len(settings.layers)
    return next((len(bits) for bits in (settings.k_bits, settings.v_bits) if isinstance(bits, tuple)), None)


def _layers(settings: XQuantConfig | Plan) -> tuple[LayerPlan, ...]:
    return make_plan(settings, _named_layers(settings) or 1).layers

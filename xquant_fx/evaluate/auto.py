"""``auto_plan``: the widths of each layer's keys and values, chosen on a model for a budget of bits or of quality."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.auto_report import AutoReport
from xquant_fx.evaluate.calibration import Windows, calibration_ids
from xquant_fx.evaluate.models import title
from xquant_fx.evaluate.probe import Probe
from xquant_fx.evaluate.search import Search
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan


def auto_plan(
    model: Any,
    *,
    bits: float | None = None,
    max_kl: float | None = None,
    text: str | Tensor | None = None,
    tokenizer: Any = None,
    config: XQuantConfig | None = None,
    sharing: bool = True,
    verbose: bool = True,
) -> Plan:
    """The plan that :func:`auto_report` finds; its arguments and errors are the same.

    ``verbose`` shows a bar, then prints what was chosen, the KL predicted and the KL measured.
    """
    given: dict[str, Any] = dict(
        bits=bits, max_kl=max_kl, text=text, tokenizer=tokenizer, config=config, sharing=sharing
    )
    report = auto_report(model, **given, progress=verbose)
    if verbose:
        print(report)
    return report.plan


@torch.no_grad()
def auto_report(
    model: Any,
    *,
    bits: float | None = None,
    max_kl: float | None = None,
    text: str | Tensor | None = None,
    tokenizer: Any = None,
    config: XQuantConfig | None = None,
    sharing: bool = True,
    progress: bool = False,
) -> AutoReport:
    """Measure what each group of layers loses at each width, choose widths by it, and measure the choice.

    The same model, text and arguments give the same plan. Layers share codes only where that measures free
    (``sharing.py`` has the rule); one side of single layers may stay in full precision where that pays.

    Args:
        model: a Hugging Face model in eval mode; its full-attention layers are quantized.
        bits: most true bits per element, as reports count them (codes, scales and zero points): the plan of least KL.
        max_kl: largest mean KL in nats on the text: the plan of fewest true bits. Give this or ``bits``.
        text: what to measure on: a text; token ids, int64 [windows, T]; "sampled": what the model writes; None: a
            built-in text, prose and code. A text is read in 8 windows of up to 1,216 tokens.
        tokenizer: for a text; None: the one that lies where the model came from.
        config: all but bits and sharing: schemes, groups, residual window, sinks; default: ``XQuantConfig()``.
        sharing: try whether pairs of layers may share codes. No kernel reads shared codes beside those of the default
            schemes: such layers are read dequantized, more slowly, and the report names them.
        progress: show a bar.

    Raises:
        ArgumentError: not one of ``bits`` and ``max_kl``; no plan meets it (the message says what is the least); or the
            text cannot be read.
        ConfigError: ``config`` leaves nothing to quantize in the windows, or the model has no full attention.
    """
    _check_goal(bits, max_kl)
    if config is not None and not isinstance(config, XQuantConfig):
        raise ArgumentError(f"config must be an XQuantConfig, whose bits are chosen anew, got {type(config).__name__}")
    windows = Windows.for_model(model.config)
    ids = calibration_ids(model, text, tokenizer, windows)
    prompt = ids.shape[1] - min(windows.tokens - windows.prompt, ids.shape[1] // 2)
    probe = Probe(model, ids, prompt, windows.stride, config or XQuantConfig())
    search = Search(probe, sharing, progress)
    choice, measured = search.within(bits) if bits is not None else search.down_to(float(max_kl or 0))
    return search.report(choice, measured, f"{title(model)}: {len(ids)} window(s) of {ids.shape[1]:,} tokens")


def _check_goal(bits: float | None, max_kl: float | None) -> None:
    if (bits is None) == (max_kl is None):
        raise ArgumentError(f"a plan is chosen for bits or for max_kl, one of the two; got {bits!r} and {max_kl!r}")
    for name, value in (("bits", bits), ("max_kl", max_kl)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ArgumentError(f"{name} must be a positive number, got {value!r}")

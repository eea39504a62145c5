"""Measures of quality, under the name they are documented by; see :mod:`xquant_fx.reports.quality`."""

from __future__ import annotations

from xquant_fx.reports.quality import agreement, kl_divergence, teacher_forced_logits, top1_agreement

__all__ = ["agreement", "kl_divergence", "teacher_forced_logits", "top1_agreement"]

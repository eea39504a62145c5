"""xquant_fx: a torch.compile backend that stores the KV cache at 1 to 2 bits (XQuant)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xquant_fx.cache.decode import decode_attention
    from xquant_fx.cache.huggingface import XQuantCache
    from xquant_fx.compiler.entry import xquant_backend
    from xquant_fx.errors import (
        ArgumentError,
        CacheStateError,
        ConfigError,
        NotRewrittenError,
        UnsupportedWriteError,
        XQuantError,
    )
    from xquant_fx.evaluate.anatomy import anatomy_report
    from xquant_fx.evaluate.auto import auto_plan, auto_report
    from xquant_fx.evaluate.needle import needle_report
    from xquant_fx.evaluate.quality import quality_report
    from xquant_fx.evaluate.sweep_report import sweep_report
    from xquant_fx.evaluate.tasks.longbench import longbench_report
    from xquant_fx.evaluate.tasks.report import task_report
    from xquant_fx.plan.config import XQuantConfig
    from xquant_fx.plan.plan import Plan, make_plan
    from xquant_fx.plan.presets import PRESETS
    from xquant_fx.quantizer import quantize
    from xquant_fx.reports.explanation import explain
    from xquant_fx.reports.memory import memory_report

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "ArgumentError",
    "CacheStateError",
    "ConfigError",
    "NotRewrittenError",
    "Plan",
    "UnsupportedWriteError",
    "XQuantCache",
    "XQuantConfig",
    "XQuantError",
    "__version__",
    "anatomy_report",
    "auto_plan",
    "auto_report",
    "decode_attention",
    "explain",
    "longbench_report",
    "make_plan",
    "memory_report",
    "needle_report",
    "quality_report",
    "quantize",
    "sweep_report",
    "task_report",
    "xquant_backend",
]

# Loaded when first asked for: importing xquant_fx imports neither transformers nor Inductor.
_HOMES = {
    "PRESETS": "plan.presets",
    "ArgumentError": "errors",
    "CacheStateError": "errors",
    "ConfigError": "errors",
    "NotRewrittenError": "errors",
    "Plan": "plan.plan",
    "UnsupportedWriteError": "errors",
    "XQuantCache": "cache.huggingface",
    "XQuantConfig": "plan.config",
    "XQuantError": "errors",
    "anatomy_report": "evaluate.anatomy",
    "auto_plan": "evaluate.auto",
    "auto_report": "evaluate.auto",
    "decode_attention": "cache.decode",
    "explain": "reports.explanation",
    "longbench_report": "evaluate.tasks.longbench",
    "make_plan": "plan.plan",
    "memory_report": "reports.memory",
    "needle_report": "evaluate.needle",
    "quality_report": "evaluate.quality",
    "quantize": "quantizer",
    "sweep_report": "evaluate.sweep_report",
    "task_report": "evaluate.tasks.report",
    "xquant_backend": "compiler.entry",
}

if not TYPE_CHECKING:  # or an unknown name would be Any in an editor

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

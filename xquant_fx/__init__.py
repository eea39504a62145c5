"""xquant_fx: a torch.compile backend that stores the KV cache at 1 to 2 bits (XQuant)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: importing xquant_fx imports neither transformers nor Inductor.
_HOMES = {
    "XQuantCache": "cache.huggingface",
    "XQuantConfig": "plan.config",
    "PRESETS": "plan.config",
    "CacheStateError": "errors",
    "ConfigError": "errors",
    "NotRewrittenError": "errors",
    "UnsupportedWriteError": "errors",
    "XQuantError": "errors",
    "decode_attention": "cache.decode",
    "explain": "reports.explanation",
    "memory_report": "reports.memory",
    "quantize": "quantizer",
    "xquant_backend": "compiler.backend",
}
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

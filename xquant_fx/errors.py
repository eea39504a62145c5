"""Exceptions. Every message states the rule, the value seen and, where there is one, the layer."""


class XQuantError(Exception):
    """Base class of all errors raised by xquant_fx."""


class ConfigError(XQuantError, ValueError):
    """A configuration field, preset or backend option breaks a rule."""


class ArgumentError(XQuantError, ValueError):
    """An argument of a function breaks the rule that the message states."""


class CacheStateError(XQuantError, RuntimeError):
    """The quantized KV cache was asked for something that its contents cannot give."""


class UnsupportedWriteError(XQuantError, RuntimeError):
    """Something wrote to a quantized KV buffer in a way that cannot be quantized."""


class PassError(XQuantError, RuntimeError):
    """A pass left a graph that breaks a condition of ``passes/conditions.py``: a fault of this project."""


class NotRewrittenError(XQuantError, RuntimeError):
    """Under ``strict=True``: a KV cache was found and left in full precision."""

"""Call functions of test helpers in a process of their own, where Triton interprets its kernels.

Triton decides at the import of a kernel whether to interpret it, so that cannot be done beside other
tests in one process. The process is started once and answers one call after another.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Interpreter:
    """``call("module:function", **kwargs)``; arguments and results go through JSON."""

    def __init__(self) -> None:
        here = Path(__file__)
        paths = [str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        self.process = subprocess.Popen(
            [sys.executable, str(here)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )

    def call(self, name: str, **kwargs: Any) -> Any:
        self.process.stdin.write(json.dumps([name, kwargs]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{name} ended the interpreter")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def patch_once() -> None:
    """Leave the language as it is where it is Triton's interpreter's already.

    It looks through all of it again for each call of a function in a kernel, a third of its time. Checked on Triton 3.6
    and 3.9.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(fn: Any) -> Any:
        seen = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        own = any(tl.core.is_builtin(module.load) for module in seen)
        return patch(fn) if own or not seen else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not


def leave_out_what_nobody_reads() -> None:
    """No sums in int64 beside those of int32, half of the time: asserts that they agree are off without ``debug``.

    And what numpy calls a type is looked up once. Checked on Triton 3.6 and 3.9.
    """
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    if not options.debug:
        object.__setattr__(options, "sanitize_overflow", False)
    looked_up = interpreter._get_np_dtype
    once = functools.cache(looked_up)
    interpreter._get_np_dtype = lambda of: looked_up(of) if of.scalar.is_ptr() else once(of.scalar)


def serve() -> None:
    """Answer the calls that come in, one a line."""
    import traceback

    patch_once()
    leave_out_what_nobody_reads()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, kwargs = json.loads(line)
        module, function = name.split(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), function)(**kwargs)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()

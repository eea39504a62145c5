"""The C++ kernels that Inductor writes for a graph, in one translation unit instead of one each.

The 15 of a model of 30 layers take the compiler 0.7 s each, 0.5 of them for torch's header, and all together 1.5 s.
So where a graph's kernels are called by one C++ function (``one_call.py``), they stand in its source. They are only
collected when the generated module is loaded. A graph whose wrapper stays has them compiled one by one, as ever.

Private torch APIs: ``AsyncCompile.cpp_pybinding`` and ``wait``, which a generated module calls; how Inductor begins a
C++ kernel. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor.async_compile import AsyncCompile

from xquant_fx.kernels.cpu import build
from xquant_fx.kernels.cpu.at_hand import note

_ENTRY = re.compile(r'extern "C"\s+void\s+kernel\(')
#: What is in the source of a kernel that is not Inductor's.
_OURS = "namespace xq "
_DIRECTIVE = re.compile(r"^\s*#\s*(\w+).*\n?", re.MULTILINE)


@dataclasses.dataclass
class UnitKernel:
    """A kernel that is not compiled yet; a call compiles it alone."""

    types: tuple[str, ...]
    """C++ types of its arguments."""
    code: str
    alone: Callable[..., Any] | None = None
    """The kernel as Inductor compiles it, where that has been done."""

    def __call__(self, *args: Any) -> Any:
        """Run the kernel."""
        if self.alone is None:
            compile_alone({"kernel": self})
        assert self.alone is not None
        return self.alone(*args)


class LaterKernel:
    """A kernel that is being compiled; a call waits for it, where loading its module would make all else wait."""

    def __init__(self, future: Any, types: tuple[str, ...], code: str) -> None:
        self.future, self.types, self.code = future, types, code
        self.made: Callable[..., Any] | None = None

    def loaded(self) -> Callable[..., Any]:
        """The compiled kernel; raises what the compiler says."""
        if self.made is None:
            self.made = build.mended(self.future.result)
            if _OURS in self.code:
                note(self.types, self.code, self.made)
        assert self.made is not None
        return self.made

    def __call__(self, *args: Any) -> Any:
        """Run the kernel."""
        return self.loaded()(*args)


def loaded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function of a kernel that a generated module calls."""
    return kernel.loaded() if isinstance(kernel, LaterKernel) else kernel


class UnitCompile(AsyncCompile):
    """What a generated module compiles by; collects kernels that may share a source."""

    def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
        """The kernel ``source_code``, or what stands for it until it is compiled."""
        if may_be_joined(source_code):
            return UnitKernel(tuple(argtypes), source_code)
        build.isa()  # waits for what is asked in the background already
        made = build.mended(functools.partial(super().cpp_pybinding, argtypes, source_code))
        return LaterKernel(made, tuple(argtypes), source_code) if hasattr(made, "result") else made


def may_be_joined(code: str) -> bool:
    """Whether ``code`` is one function that can stand beside others: no macros, and none of ours.

    Ours depend on formats alone, so that one compiled kernel serves many graphs.
    """
    directives = {match[1] for match in _DIRECTIVE.finditer(code)}
    return _OURS not in code and len(_ENTRY.findall(code)) == 1 and directives <= {"include", "pragma"}


def unit(kernels: Sequence[UnitKernel]) -> str:
    """C++ of all ``kernels``, the first as ``unit_0::kernel`` and so on."""
    includes = {
        match[0].strip(): None for k in kernels for match in _DIRECTIVE.finditer(k.code) if match[1] == "include"
    }
    bodies = (_DIRECTIVE.sub(lambda match: "" if match[1] == "include" else match[0], k.code) for k in kernels)
    # Not inlined: a compiler that puts them into their calls, some hundreds, takes long.
    functions = (_ENTRY.sub("__attribute__((noinline)) void kernel(", body) for body in bodies)
    spaces = (f"namespace unit_{i} {{\n{function}\n}}\n" for i, function in enumerate(functions))
    return "".join([*(f"{include}\n" for include in includes), *spaces])


def compile_alone(module: dict[str, Any]) -> None:
    """Compile the kernels among the values of ``module`` one by one, in parallel, and wait for all."""
    compiler, kernels = AsyncCompile(), [k for k in module.values() if isinstance(k, UnitKernel) and k.alone is None]
    module.update({name: kernel.loaded() for name, kernel in module.items() if isinstance(kernel, LaterKernel)})
    made = {str(i): compiler.cpp_pybinding(list(k.types), k.code) for i, k in enumerate(kernels)}
    compiler.wait(made)
    for i, kernel in enumerate(kernels):
        kernel.alone = made[str(i)]

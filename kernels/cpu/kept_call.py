"""The one C++ call of a graph (``one_call.py``), kept on disk: Python around it, and the libraries that Inductor built.

To load it takes 10 ms and no compiler; without it Inductor is imported, 0.4 s, and asked for the same again.

Private torch APIs: ``_empty_strided_cpu``, ``_reinterpret_tensor``, and through ``build.py`` how Inductor loads a
library. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

log = logging.getLogger(__name__)

#: Files that a folder keeps at most, those of the steps used last: of 50 to 100 KB each, and a model has a handful.
MOST = 256

#: What the Python around a call may name: of the modules that Inductor generates, and of ours.
_GIVEN = ("xquant_kernels", "xquant_one_call")


class KeptCall(NamedTuple):
    """How to make the call without a compiler."""

    lines: list[str]
    """Python that defines ``call``."""
    library: str
    """File of the C++ function."""
    kernels: list[str]
    """Files of the kernels that it calls in other libraries, in the order of their addresses."""
    spared: int = 0
    """Parts of the graph that were like another one, and not compiled: for counters."""


def folder() -> Path:
    """All that are kept, beside what Inductor keeps."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "xquant"


@functools.cache
def machine() -> tuple[Any, ...]:
    """Versions, and what decides which instructions are compiled for."""
    versions = torch.__version__, torch.version.git_version, platform.machine()
    python = sys.implementation.cache_tag, sysconfig.get_config_var("SOABI")  # which tells free-threaded ones apart
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    processor = [kinds.get(name) for name in ("model name", "flags", "Features", "CPU part")]
    return *versions, *python, torch.backends.cpu.get_cpu_capability(), processor if any(processor) else lines


@functools.cache
def for_this_machine() -> str:
    """A line of C++ that changes nothing, for sources: Inductor names a library by its source, and compiles it for all
    that the processor can (``-march=native``), so that another processor would stop at an instruction of it."""
    return f"// For the machine {hashlib.sha256(repr(machine()).encode()).hexdigest()[:16]}\n"


def bound(lines: Sequence[str], function: Any, kernels: Sequence[str], names: dict[str, Any]) -> Callable[..., Any]:
    """The ``call`` that ``lines`` define, around the C++ ``function``; ``names`` are its globals."""
    libraries = [ctypes.CDLL(file) for file in kernels]
    addresses = [ctypes.cast(library.kernel, ctypes.c_void_p).value for library in libraries]
    table = torch.tensor([*addresses, 0], dtype=torch.int64, device="cpu")  # an empty tensor would have no memory
    space = {**names, "xquant_kernels": table, "xquant_libraries": libraries, "xquant_one_call": function}
    exec(compile("\n".join(lines), "<one call>", "exec"), space)
    made: Callable[..., Any] = space["call"]
    return made


def may_be_kept(call: Callable[..., Any]) -> bool:
    """Whether the Python of ``call`` names nothing but what a kept one is given, and what torch has."""
    names = set(call.__code__.co_names) - set(_names()) - set(_GIVEN) - {"clear", "size"}  # methods
    return all(hasattr(torch, name) for name in names)


def keep(kept: KeptCall, file: Path) -> None:
    """Write ``kept`` to ``file``, at once or not at all: other processes may read it. Paths are as seen from there.

    Where nothing can be written, that is told (``counters["xquant"]``, the log), and the call is made all the same.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        seen = kept._replace(library=_seen(kept.library, file), kernels=[_seen(each, file) for each in kept.kernels])
        text = json.dumps(seen._asdict())
        _write_whole(json.dumps({"sha256": _digest(text), "step": text}), file)
        _remove_oldest(file.parent)
    except (OSError, ValueError) as error:
        _tell("kept", error)


def _write_whole(text: str, file: Path) -> None:
    whole = tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False)  # noqa: SIM115 (it is renamed)
    try:
        with whole:
            whole.write(text)
        os.replace(whole.name, file)
    except OSError:
        os.unlink(whole.name)
        raise


def _remove_oldest(folder: Path) -> None:
    """Remove all but the ``MOST`` files used last, and what a process that was killed had begun to write.

    Other processes may do so at the same time. A step that is gone is compiled anew; libraries stay, as Inductor's do.
    """
    used = list[tuple[int, str]]()
    for each in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if each.is_file():
                used.append((each.stat().st_mtime_ns, each.path))
    for _, path in sorted(used)[:-MOST]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def restored(file: Path) -> Callable[..., Any] | None:
    """The call that was kept in ``file``; None if there is none, it was damaged, or a library of it is gone."""
    from torch._dynamo.utils import counters  # imports Dynamo

    def call(kept: KeptCall) -> Callable[..., Any]:
        library, *kernels = (str(file.parent / each) for each in (kept.library, *kept.kernels))
        made = bound(kept.lines, _function_in(library), kernels, _names())
        counters["xquant"]["layers_not_compiled_again"] += kept.spared
        return made

    if (made := _restored(file, call)) is not None:
        counters["xquant"]["steps restored"] += 1
        counters["xquant"]["one_call"] += 1
    return made


def restored_kernel(file: Path) -> Callable[..., Any] | None:
    """The C++ function alone that was kept in ``file``, without Python around it; None as for ``restored``."""
    made = _restored(file, lambda kept: _function_in(str(file.parent / kept.library)))
    if made is None:
        with contextlib.suppress(OSError):
            file.unlink()  # or what is built anew would not be noted
    return made


def _restored(file: Path, make: Callable[[KeptCall], Callable[..., Any]]) -> Callable[..., Any] | None:
    if not file.exists():
        return None
    try:
        made = make(_read(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        _tell("restored", error)
        return None
    with contextlib.suppress(OSError):  # in a folder of somebody else, or just removed by another process
        os.utime(file)  # it was used
    return made


def _read(text: str) -> KeptCall:
    """Raises if ``text`` is not as it was written: with a list of kernels cut short, C++ would call any address."""
    whole = json.loads(text)
    if _digest(whole["step"]) != whole["sha256"]:
        raise ValueError("the file is not what was written")
    return KeptCall(**json.loads(whole["step"]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _function_in(library: str) -> Any:
    if not os.path.exists(library):  # or Inductor would be imported for nothing
        raise FileNotFoundError(library)
    from xquant_fx.kernels.cpu import build  # brings in Inductor's cache of code

    return build.function_in(library)


def _tell(what: str, error: Exception) -> None:
    from torch._dynamo.utils import counters  # imports Dynamo

    log.info("a step was not %s: %s", what, error)
    counters["xquant"][f"steps not {what}: {type(error).__name__}"] += 1


def _seen(library: str, file: Path) -> str:
    return os.path.relpath(library, file.parent)


def _names() -> dict[str, Any]:
    guards: Any = torch._C._dynamo.guards
    return {
        "torch": torch,
        "empty_strided_cpu": guards._empty_strided_cpu,
        "reinterpret_tensor": guards._reinterpret_tensor,
    }

"""Building C++ kernels: a library that a killed compiler has left half is no error for good."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xquant_fx.kernels.cpu import build, one_unit

CODE = '#include <cstdint>\nextern "C" void kernel(int64_t* x) { x[0] += 1; }\n'
TYPES = ("int64_t*",)


def left_half(folder: Path, code: str) -> Callable[[], Any]:
    """Build the library of ``code`` and cut it off, unloaded; what would load it."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        load: Callable[[], Any] = build.OwnKernels.load_pybinding_async(list(TYPES), code, submit_fn=pool.submit)
    (library,) = folder.rglob("*.main.so")
    library.write_bytes(library.read_bytes()[:100])
    return load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("way", ["load", "later"])
def test_a_damaged_library_is_built_again(folder: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    code = f"// {way}\n{CODE}"
    later = left_half(folder, code)
    with pytest.raises(ImportError):
        later()
    future = type("", (), {"result": later})
    kernel = build.load(TYPES, code) if way == "load" else one_unit.LaterKernel(future, TYPES, code)
    x = torch.zeros(1, dtype=torch.int64)
    kernel(x)
    assert x.item() == 1
    assert "is damaged and is built again" in caplog.text


def test_other_errors_are_raised_as_they_are(folder: Path) -> None:
    for error in (ImportError("no file is named"), ImportError("gone", path=str(folder / "gone.so")), OSError("full")):

        def load(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            build.mended(load)
    with pytest.raises(build.CompileError):
        build.load(TYPES, "no C++\n")

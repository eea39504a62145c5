"""Run by .ci/run from another folder, in an environment where only the wheel is installed."""

import importlib.metadata
import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import torch

import xquant_fx
import xquant_fx.kernels
import xquant_fx.passes

home = Path(xquant_fx.__file__).parent
assert home.is_relative_to(sys.prefix), f"xquant_fx was imported from {home}, not from the wheel"
assert not (home / "passes").is_symlink(), "the wheel holds a link"
assert (home / "py.typed").is_file(), "the wheel lacks py.typed"
modules = [m.name for m in pkgutil.walk_packages(xquant_fx.__path__, "xquant_fx.")]
for name in modules:
    try:
        assert Path(import_module(name).__file__).is_relative_to(home), name
    except ModuleNotFoundError as error:
        assert error.name == "lm_eval", name  # of the extra "tasks", which is not in dev

(entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="xquant")
assert entry.load() is xquant_fx.xquant_backend
assert "xquant" in torch._dynamo.list_backends()
assert importlib.metadata.version("xquant-fx") == xquant_fx.__version__
assert any(f.name == "LICENSE" for f in importlib.metadata.files("xquant-fx"))
assert torch.compile(lambda x: x + 1, backend="xquant")(torch.ones(2)).tolist() == [2.0, 2.0]
print(f"wheel {xquant_fx.__version__}: {len(modules)} modules import, the backend is registered and compiles")

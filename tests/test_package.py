"""The package as a package: what the wheel holds, which module imports which, what import costs."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest

import xquant_fx

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

#: The floors of the house, from the ground up: a module imports from its own floor and from those below.
FLOORS = (
    ("errors", "tracing", "tables", "warn_once"),
    ("kernels", "kernels.*"),
    ("plan", "plan.*"),
    ("ops", "quantizer"),
    ("cache", "cache.*"),
    ("passes", "passes.*"),
    ("compiler", "compiler.*"),
    ("reports", "reports.*", "quality"),
    ("evaluate", "evaluate.*", "__main__", ""),
)

#: Module pattern to the patterns of those that may import it, at the top of a file or anywhere else.
MAY_BE_IMPORTED_BY = {
    "cache.huggingface": ["evaluate.*"],
    "reports.explanation": [],
    "reports.quality": ["quality", "evaluate.simulate"],
    "compiler.backend": ["compiler.entry"],
    "compiler.entry": [],
    "passes.pipeline": ["compiler.options", "compiler.quantized_graph", "compiler.self_check"],
    "passes.rewrite": ["passes.pipeline", "passes.rewrite_growth", "passes.rewrite_slides"],
    "passes.rewrite_growth": ["passes.pipeline"],
    "passes.fuse_decode": ["passes.pipeline"],
    "passes.detect": ["compiler.detection"],
    "kernels.lowerings": ["compiler.inductor"],
    "transformers": [
        "cache.huggingface",
        "cache.huggingface_layer",
        "cache.huggingface_layers",
        "cache.huggingface_window",
        "evaluate.models",
        "evaluate.simulate",
    ],
    "matplotlib": ["evaluate.plots"],
    "torch._inductor": [
        "compiler.inductor",
        "compiler.inductor_options",
        "compiler.index_checks",
        "compiler.loop_splits",
        "compiler.tracing_time",
        "compiler.kept_steps",
        "compiler.cache_key",
        "kernels.lowerings",
        "kernels.cpu.at_hand",
        "kernels.cpu.build",
        "kernels.cpu.kept_call",
        "kernels.cpu.one_unit",
    ],
}

#: Module pattern to all that it may import of this package, where that is less than its floor has.
MAY_IMPORT = {
    "errors": [],
    "tables": [],
    "passes.vocabulary": [],
    "passes.records": ["plan.*"],
    "passes.trace": ["passes.records", "passes.vocabulary"],
    "passes.track_axes": ["passes.trace", "passes.vocabulary"],
    "passes.forms": ["passes.records", "passes.scores", "passes.trace", "passes.vocabulary"],
    # Detection knows nothing of rewriting.
    "passes.find_*": [
        "passes.records",
        "cache.allocate",
        "cache.kv_tensor",
        "kernels.rows",
        "passes.trace",
        "passes.vocabulary",
        "passes.products",
        "passes.facts",
        "passes.why_left_alone",
        "passes.inner_graphs",
        "passes.find_*",
    ],
}


def sources() -> dict[str, Path]:
    """Module name without ``xquant_fx.`` to its file; ``""`` is the package itself."""
    found = {}
    for folder, prefix in (("xquant_fx", ""), ("passes", "passes."), ("kernels", "kernels.")):
        for path in (ROOT / folder).rglob("*.py"):  # which does not follow the links
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


SOURCES = sources()


@functools.cache
def imports(module: str) -> set[str]:
    """What a module imports: those of this package without ``xquant_fx.``, others by full name."""
    path = SOURCES[module]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative import"
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    own = {name.removeprefix("xquant_fx.") for name in names if name.startswith("xquant_fx.")}
    return own & SOURCES.keys() | {n for n in names if not n.startswith("xquant_fx")}


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def floor_of(name: str) -> int:
    """The floor that a module lies on."""
    (floor,) = (i for i, patterns in enumerate(FLOORS) if matches(name, patterns))
    return floor


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name):
    above = {i for i in imports(name) & SOURCES.keys() if i and floor_of(i) > floor_of(name)}
    assert above == set()


@pytest.mark.parametrize("target", MAY_BE_IMPORTED_BY)
def test_who_may_import(target):
    importers = [
        name
        for name in SOURCES
        if name  # the package itself names what it exports to type checkers, and loads it when asked
        and any(fnmatch(i, target) or i.startswith(target + ".") for i in imports(name))
    ]
    assert [name for name in importers if not matches(name, MAY_BE_IMPORTED_BY[target])] == []


@pytest.mark.parametrize("pattern", MAY_IMPORT)
def test_what_may_be_imported(pattern):
    modules = [name for name in SOURCES if fnmatch(name, pattern)]
    assert modules, f"no module is called {pattern}"
    for name in modules:
        assert {i for i in imports(name) & SOURCES.keys() if not matches(i, MAY_IMPORT[pattern])} == set(), name


def test_no_import_cycle():
    graph = {name: imports(name) & SOURCES.keys() for name in SOURCES}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_init_is_a_docstring():
    # At the root of a checkout the folder shadows Hugging Face's `kernels`, which transformers imports.
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_listed_packages_are_the_folders():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    mapped = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert mapped == {"xquant_fx.passes": "passes", "xquant_fx.kernels": "kernels"}
    folders = [("xquant_fx", ROOT / "xquant_fx"), *((name, ROOT / folder) for name, folder in mapped.items())]
    found = {
        ".".join([name, *init.parent.relative_to(folder).parts])
        for name, folder in folders
        for init in folder.rglob("__init__.py")
    }
    assert set(listed) == found
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    sources = {
        (".".join(["xquant_fx", *p.relative_to(ROOT).parent.parts]), f"*{p.suffix}")
        for kind in ("*.cpp", "*.h")
        for p in (ROOT / "kernels").rglob(kind)
    }
    assert sources == {(name, glob) for name, globs in data.items() if ".kernels." in name for glob in globs}


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_links(name):
    link = ROOT / "xquant_fx" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    assert link.resolve() == ROOT / name


def test_version():
    assert PYPROJECT["project"]["version"] == xquant_fx.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {xquant_fx.__version__}\n" in citation
    assert f"\n## {xquant_fx.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def pins(kind: str) -> dict[str, list[int]]:
    """Package to [major, minor] that `make compat-KIND` installs."""
    text = (ROOT / f"requirements-compat-{kind}.txt").read_text()
    return {name: [int(major), int(minor)] for name, major, minor in re.findall(r"^(\w+)==(\d+)\.(\d+)", text, re.M)}


def test_compat_runs_the_ends_of_the_declared_range():
    oldest, newest = pins("oldest"), pins("newest")
    (torch,) = (d for d in PYPROJECT["project"]["dependencies"] if d.startswith("torch"))
    assert torch == "torch>={}.{},<{}.{}".format(*oldest["torch"], newest["torch"][0], newest["torch"][1] + 1)
    (transformers,) = PYPROJECT["project"]["optional-dependencies"]["hf"]
    assert transformers == "transformers>={}.{},<{}".format(*oldest["transformers"], newest["transformers"][0] + 1)
    table = (ROOT / "docs" / "versions.md").read_text()
    assert all(f"{name} {major}.{minor}" in table for p in (oldest, newest) for name, (major, minor) in p.items())


def test_every_public_name_resolves():
    for name in xquant_fx.__all__:
        assert getattr(xquant_fx, name) is not None
    assert set(xquant_fx.__all__) <= set(dir(xquant_fx))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = xquant_fx.nonsense


def test_names_are_told_to_type_checkers_as_they_are_loaded():
    """The lazy table, ``__all__`` and the imports under TYPE_CHECKING say the same."""
    tree = ast.parse((ROOT / "xquant_fx" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {name.name: node.module for node in block.body for name in node.names}
    assert told == {name: f"xquant_fx.{home}" for name, home in xquant_fx._HOMES.items()}
    assert set(xquant_fx.__all__) == {*told, "__version__"}


#: What is used, and what it does not load; in one process, one after the other, as none allows more than the next one.
LAZY = (
    ("__version__", ["transformers", "torch"]),
    ("XQuantConfig, quantize", ["transformers", "torch._inductor"]),
    ("memory_report", ["transformers", "torch._inductor.compile_fx"]),
    ("xquant_backend, explain", ["transformers", "torch._inductor.compile_fx"]),
)


def test_import_is_lazy():
    code = f"import sys, xquant_fx\nfor names, absent in {LAZY!r}:\n for name in names.split(', '):\n"
    code += "  getattr(xquant_fx, name)\n  print([(name, it) for it in absent if it in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]"] * 6


def test_backend_is_registered_by_name():
    import torch

    assert "xquant" in torch._dynamo.list_backends()

"""The fixture of tests that Triton interprets; their files name this module in ``pytest_plugins``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import triton
from packaging.version import Version
from triton_interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """One process for the tests of all files."""
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("Triton 3.6 interprets kernels with numpy below 2.4 only")
    process = Interpreter()
    yield process
    process.close()

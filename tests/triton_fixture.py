"""The fixture of tests that Triton interprets; their files name this module in ``pytest_plugins``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from triton_interpreter import Interpreter


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """One process for all tests of a file."""
    process = Interpreter()
    yield process
    process.close()

"""A fixture of tests of graphs; their files name this module in ``pytest_plugins``."""

from __future__ import annotations

import pytest

from xquant_fx import ops


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention has no kernel: compiling one for each kind of mask and number of tokens takes longer than all else."""
    monkeypatch.delitem(ops.DECODE_KERNELS, "cpu")

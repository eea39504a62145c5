"""Fixtures of tests of graphs and of evaluators; their files name this module in ``pytest_plugins``."""

from __future__ import annotations

import pytest

from xquant_fx import ops
from xquant_fx.kernels.cpu import build


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention has no kernel: compiling one for each kind of mask and number of tokens takes longer than all else."""
    monkeypatch.delitem(ops.DECODE_KERNELS, "cpu")


@pytest.fixture(params=["plain torch", pytest.param("kernels", marks=pytest.mark.slow)])
def attended_by(request: pytest.FixtureRequest) -> str:
    """``plain_torch``; kernels in slow twins of tests: what they compute is that of test_cpu_attention.py."""
    if request.param == "plain torch":
        request.getfixturevalue("plain_torch")
    return str(request.param)


@pytest.fixture
def no_compiler(plain_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``plain_torch``, and nothing uncompiled has a kernel: for tests of what is above long prompts and many steps."""
    monkeypatch.setattr(build, "has_compiler", lambda: False)

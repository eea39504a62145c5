"""A folder of Inductor's caches that is used on another kind of processor: nothing made for the first is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_at_hand import a_load
from test_kept_steps import chain_of_two

from xquant_fx.kernels.cpu import build, kept_call
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.shared_code_load import cpu_call as cpu_load
from xquant_fx.kernels.shared_code_load import cpu_source

PROGRAM = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from xquant_fx import XQuantCache, XQuantConfig

def logits(call):
    settings = XQuantConfig(residual_length=32, k_group_size=32)
    cache = XQuantCache(model.config, config=settings, max_cache_len=64)
    with torch.no_grad():
        model(torch.arange(1, 21)[None], past_key_values=cache)
        return torch.cat([call(torch.tensor([[n]]), past_key_values=cache).logits for n in range(8)])

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, initializer_range=0.15, **sizes)).eval()
expected, found = logits(model.forward), logits(torch.compile(model.forward, backend="xquant"))
print(torch.backends.cpu.get_cpu_capability(), (found - expected).abs().max().item())
"""


@pytest.mark.slow  # test_cache_key.py has that the keys differ
def test_of_fewer_instructions(tmp_path: Path) -> None:
    """Inductor's own caches give it C++ for vectors of 16 numbers, of which 8 are computed and the others anything."""
    for capability in dict.fromkeys((torch.backends.cpu.get_cpu_capability(), "AVX2")):
        given = {"ATEN_CPU_CAPABILITY": capability.lower(), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**os.environ, **given}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        _capability, difference = done.stdout.split()
        assert float(difference) < 1e-4, done.stdout  # and no NaN


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it, and sources are for another machine."""

    def change() -> None:
        monkeypatch.setattr(kept_call, "machine", lambda: ("another processor",))
        kept_call.for_this_machine.cache_clear()

    yield change
    kept_call.for_this_machine.cache_clear()


def test_a_library_is_named_by_the_machine_it_is_for(elsewhere: Callable[[], None]) -> None:
    """Inductor names it by its source, and compiles it for all that the processor can: another would stop at it."""
    source = cpu_source.source.__wrapped__  # which is asked once for each problem
    given = cpu_load.problem_of(a_load()), ISAS["avx2"]
    here = source(*given)[1]
    elsewhere()
    there = source(*given)[1]
    assert there != here and there.split("\n", 1)[1] == here.split("\n", 1)[1]


def test_a_step_in_one_call_is_named_by_it_too(elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    monkeypatch.setattr(build, "begin_kernel", lambda types, code: sources.append(code))
    chain_of_two(None)
    elsewhere()
    chain_of_two(None)
    here, there = sources
    assert there != here and there.split("\n", 1)[1] == here.split("\n", 1)[1]

"""A folder of Inductor's caches that is used on another kind of processor: nothing made for the first is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

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

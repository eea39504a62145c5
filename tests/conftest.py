"""Fixtures that several test files use. Helper modules beside this file are importable by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch._logging._internal import trace_log

from xquant_fx.compiler import tracing_time
from xquant_fx.warn_once import forget

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

# From 9.1 on pytest listens to loggers that do not propagate, and so Dynamo and Inductor would write every graph, guard
# and kernel for torch's structured trace, in each test and for nobody: a fifth of the time of tests that compile.
trace_log.propagate = True

EMBEDDED = HERE.parent / "examples" / "model"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each test compiles for itself and sees its own recompile counts and warnings."""
    torch._dynamo.reset()
    forget()
    automatic = torch._dynamo.config.automatic_dynamic_shapes
    watched = list(tracing_time._backends)
    yield
    torch._dynamo.reset()
    tracing_time._backends[:] = watched  # or every backend of a test, and the graphs it has seen, would stay
    # Of torch 2.11, which leaves it off after two threads at once have called what was compiled with dynamic=False.
    torch._dynamo.config.automatic_dynamic_shapes = automatic


@pytest.fixture
def all_traced(monkeypatch):
    """Prompts and chunks are traced, which they are not where a cache tells beforehand (``test_untraced.py``)."""
    from xquant_fx.compiler import untraced

    monkeypatch.setattr(untraced, "_backends", [])


@pytest.fixture(scope="session")
def trained():
    """(model, token ids [1, 2048]) with trained weights: the model that the repository brings, in every clone the same.

    The text is the license: English, long enough, and never edited.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    text = (HERE.parent / "LICENSE").read_text()
    ids = torch.tensor(AutoTokenizer.from_pretrained(EMBEDDED)(text)["input_ids"][:2048])
    assert ids.shape == (2048,)
    return model.eval(), ids[None]


@pytest.fixture
def tiny_llama():
    """Factory of random Llama models: ``tiny_llama(layers=4, head_dim=16, ...)``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers: int = 4, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, dtype=torch.float32, **more):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=heads * head_dim,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=512,
            initializer_range=0.15,
            **more,
        )
        model = LlamaForCausalLM(config).eval().to(dtype)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        return model

    return make


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

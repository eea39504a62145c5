"""XQuantCache under the backend on families that write and read their caches differently.

Tiny random models; the rewritten graphs run op by op. Attention with sinks, softcap, ALiBi, one KV
head, sliding layers in between, latent attention, and graph breaks inside the attention (MPT).
"""

from __future__ import annotations

import pytest
import torch
import transformers
from dynamo_graphs import OLD_BLOOM
from stepping import interpreted, relative_error, run_steps
from transformers import AutoModelForCausalLM, StaticCache

from xquant_fx import XQuantCache, XQuantConfig

pytest_plugins = ["plain_torch"]

CONFIG = XQuantConfig.preset("xquant-1bit").replace(k_group_size=8, residual_length=16)
IDS = torch.randint(1, 128, (1, 61), generator=torch.Generator().manual_seed(1))
STEPS = 29  # keys are quantized with the prompt and twice after it; sliding windows have gone round

BASE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SMALL = dict(vocab_size=128, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "Qwen3": BASE,
    "Gemma3Text": {
        **BASE,
        "num_hidden_layers": 4,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Gemma2": {**BASE, "sliding_window": 12},
    "GptOss": {**BASE, "sliding_window": 12, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GPT2": dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2),
    "Falcon": SMALL,
    "Bloom": dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "Mpt": dict(vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=512),
}


def build(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**FAMILIES[name])).eval()


#: As Bloom is; as test_fuse_decode.py has them; as tests of Llama.
MARKS = {"Bloom": OLD_BLOOM, **dict.fromkeys(("Mpt", "Falcon", "Gemma2", "Qwen3"), pytest.mark.slow)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, ())) for n in sorted(FAMILIES)])
def test_compiled_equals_eager_equals_static(name, attended_by):
    model = build(name)
    step = torch.compile(model.forward, backend=interpreted())  # dynamic=None: Gemma and GPT-OSS count on the host

    def run(call, cache):
        return run_steps([(model.forward, 21)] + [(call, 1)] * STEPS, IDS[:, : 21 + STEPS], cache)

    full, quantized = (
        (lambda: XQuantCache(model.config, 96, XQuantConfig.preset("full"))),
        (lambda: XQuantCache(model.config, 96, CONFIG)),
    )
    static = run(model.forward, StaticCache(model.config, max_cache_len=96))
    assert relative_error(run(model.forward, full()), static) < 1e-6
    eager = run(model.forward, quantized())
    assert relative_error(eager, static) > 1e-4, "nothing was quantized"
    with torch._dynamo.config.patch(recompile_limit=64):
        assert relative_error(run(step, quantized()), eager) < 1e-5

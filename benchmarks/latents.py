"""What quantized latents cost: a toy of DeepSeek-V3's attention is trained on the bytes of a text, then measured.

No real model of the kind is at hand, and random weights say nothing, so a model of 1.7 million parameters (4 layers,
latents of 64 channels, rotary keys of 16) learns the first nine tenths of a text for some minutes. Windows of the last
tenth are then decoded token by token, the text given, with latent and rotary key stored in one way each.

    python benchmarks/latents.py rover.txt --minutes 12
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.huggingface_layer import XQuantLayer
from xquant_fx.plan import buffer_plan
from xquant_fx.reports.quality import kl_divergence

PROMPT, SKIPPED, LENGTH, BATCH = 96, 40, 384, 8
SIZES = dict(
    vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    head_dim=16, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=16,
    first_k_dense_replace=4, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASE = XQuantConfig(residual_length=32, k_group_size=32)
#: Name, fields, and whether the latent is stored as values and the rotary key as keys (else the other way round).
ROWS: list[tuple[str, dict[str, Any], bool]] = [
    *((f"latent: values' scheme, {b} bits; rotary in full", dict(v_bits=b, k_bits=16), True) for b in (4, 3, 2)),
    *((f"latent: keys' scheme, {b} bits; rotary in full", dict(k_bits=b, v_bits=16), False) for b in (4, 3, 2)),
    *((f"rotary: keys' scheme, {b} bits; latent in full", dict(k_bits=b, v_bits=16), True) for b in (4, 3, 2)),
    *((f"rotary: values' scheme, {b} bits; latent in full", dict(v_bits=b, k_bits=16), False) for b in (4, 3, 2)),
    *((f"latent as values, 2 bits; rotary as keys, {b}", dict(k_bits=b, v_bits=2), True) for b in (4, 3, 2)),
    ("latent as keys, 2 bits; rotary as values, 2", dict(k_bits=2, v_bits=2), False),
]


def train(text: Tensor, minutes: float) -> torch.nn.Module:
    """A model that has read ``text`` (int64, bytes) for ``minutes``."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    begin, steps, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = (time.monotonic() - begin) / (60 * minutes)
        falling = max(0.05, 0.5 + 0.5 * math.cos(math.pi * (done - 0.3) / 0.7)) if done > 0.3 else 1.0
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (steps + 1) / 30) * falling
        starts = torch.randint(len(text) - LENGTH, (BATCH,))
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    print(f"{steps} steps, loss {loss.item():.3f} nats per byte")
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor, cache: StaticCache) -> Tensor:
    """Logits [B, T, V] of single steps, but for the prompt and some after it."""
    out = [model(ids[:, :PROMPT], past_key_values=cache).logits]
    out += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, ids.shape[1] - 1)]
    return torch.cat(out, 1)[:, PROMPT + SKIPPED :]


def measure(model: torch.nn.Module, ids: Tensor) -> None:
    """Print a line for each of ``ROWS``."""
    reference = logits(model, ids, StaticCache(model.config, max_cache_len=ids.shape[1]))
    other = patch.object(XQuantLayer, "_roles", lambda self, keys, values: ("key", "value"))
    with patch.object(buffer_plan, "ROTARY_BITS", 1):
        for name, fields, by_use in ROWS:
            cache = XQuantCache(model.config, ids.shape[1], BASE.replace(**fields))
            if by_use:
                found = logits(model, ids, cache)
            else:
                with other:
                    found = logits(model, ids, cache)
            same = (found.argmax(-1) == reference.argmax(-1)).float().mean()
            print(f"{name:52} KL {kl_divergence(reference, found):.4f}  same top token {100 * same:.1f} %", flush=True)


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=12, help="of training")
    parser.add_argument("--windows", type=int, default=3)
    args = parser.parse_args()
    text = torch.tensor(list(args.text.read_bytes()))
    cut = len(text) * 9 // 10
    model = train(text[:cut], args.minutes)
    starts = [cut + 3000 * i for i in range(args.windows)]
    measure(model, torch.stack([text[start : start + LENGTH] for start in starts]))


if __name__ == "__main__":
    main()

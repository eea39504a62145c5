"""Quantize the KV cache of a hand-written model: nothing of Hugging Face, one line of ours.

    python examples/custom_model.py
    python examples/custom_model.py --preset kivi-2

The model is written the way gpt-fast writes one: KV buffers in a module, appended to by indexed
assignment at ``input_pos``, and read whole under a boolean mask. The weights are random.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from xquant_fx import PRESETS, explain, memory_report


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """Sizes of the model."""

    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 256
    max_len: int = 512

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


class KVCache(nn.Module):
    """Keys and values of one layer: [B, kv_heads, max_len, head_dim]."""

    def __init__(self, args: ModelArgs, batch: int) -> None:
        super().__init__()
        shape = (batch, args.kv_heads, args.max_len, args.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, batch: int) -> None:
        super().__init__()
        self.args = args
        self.wqkv = nn.Linear(args.dim, (args.heads + 2 * args.kv_heads) * args.head_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.kv_cache = KVCache(args, batch)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        a, (batch, length, dim) = self.args, x.shape
        qkv = self.wqkv(x).view(batch, length, a.heads + 2 * a.kv_heads, a.head_dim)
        q, k, v = qkv.split([a.heads, a.kv_heads, a.kv_heads], dim=2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        k, v = (t.repeat_interleave(a.heads // a.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, batch: int) -> None:
        super().__init__()
        self.attention = Attention(args, batch)
        self.feed_forward = nn.Sequential(
            nn.Linear(args.dim, 2 * args.dim), nn.SiLU(), nn.Linear(2 * args.dim, args.dim)
        )
        self.norm1, self.norm2 = nn.RMSNorm(args.dim), nn.RMSNorm(args.dim)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary, mask, input_pos)
        return x + self.feed_forward(self.norm2(x))


class Transformer(nn.Module):
    """A decoder that keeps its KV cache in buffers."""

    def __init__(self, args: ModelArgs, batch: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(args.vocab, args.dim)
        self.blocks = nn.ModuleList(Block(args, batch) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.dim)
        self.head = nn.Linear(args.dim, args.vocab, bias=False)
        self.register_buffer("rotary", rotary_table(args), persistent=False)
        self.register_buffer("mask", torch.ones(args.max_len, args.max_len, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        x, rotary, mask = self.embed(ids), self.rotary[input_pos], self.mask[None, None, input_pos]
        for block in self.blocks:
            x = block(x, rotary, mask, input_pos)
        return self.head(self.norm(x))


def rotary_table(args: ModelArgs) -> Tensor:
    """Cosines and sines of each position: [max_len, head_dim / 2, 2]."""
    frequency = 10000.0 ** -(torch.arange(0, args.head_dim, 2) / args.head_dim)
    angle = torch.outer(torch.arange(args.max_len), frequency)
    return torch.stack([angle.cos(), angle.sin()], -1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the two halves of the channels of x [B, length, heads, head_dim] by position."""
    (a, b), (cos, sin) = x.chunk(2, -1), rotary[None, :, None].unbind(-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def decode(model: nn.Module, ids: Tensor, prompt_length: int) -> Tensor:
    """Logits [B, T - prompt_length + 1, vocab]: the prompt in one piece, then a token a step."""
    logits = [model(ids[:, :prompt_length], torch.arange(prompt_length))[:, -1]]
    for t in range(prompt_length, ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], torch.tensor([t]))[:, -1])
    return torch.stack(logits, 1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="xquant", choices=sorted(PRESETS))
    parser.add_argument("--prompt-length", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=ModelArgs.layers)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Decode with three models of equal weights: uncompiled, compiled at 16 bits, and quantized."""
    cli = parse_args(argv)
    torch.manual_seed(0)
    plain = Transformer(ModelArgs(layers=cli.layers)).eval()
    full, quantized = copy.deepcopy(plain), copy.deepcopy(plain)
    ids = torch.randint(0, ModelArgs.vocab, (1, cli.prompt_length + cli.steps))
    print(explain(quantized, ids[:, :1], torch.tensor([0]), options={"preset": cli.preset}))

    want = decode(plain, ids, cli.prompt_length)
    for name, model, preset in (("16 bits", full, "full"), (cli.preset, quantized, cli.preset)):
        compiled = torch.compile(model, backend="xquant", options={"preset": preset})
        got = decode(compiled, ids, cli.prompt_length)
        error = (got - want).norm() / want.norm()
        print(f"{name}: relative error of the logits against the uncompiled model {error:.2e}")
        if preset == "full" and error > 1e-5:
            raise SystemExit("at 16 bits the compiled model must equal the uncompiled one")
    print(memory_report(quantized))


if __name__ == "__main__":
    main()

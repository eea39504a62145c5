"""A decoder without positions, which Dynamo reads in no time."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import LlamaConfig


class Layer(torch.nn.Module):
    """Attention, 4 heads over 2 or as many, of a decoder without positions."""

    def __init__(self, index: int, kv_heads: int = 2) -> None:
        super().__init__()
        self.index, self.kv_heads = index, kv_heads
        self.qkv, self.out = torch.nn.Linear(64, 64 + 32 * kv_heads), torch.nn.Linear(64, 64)

    def between(self) -> None:
        """What is done between the update of the cache and attention."""

    def forward(self, x, mask, cache):
        heads = self.qkv(x).unflatten(2, (-1, 16)).transpose(1, 2)
        keys, values = cache.update(heads[:, 4 : 4 + self.kv_heads], heads[:, 4 + self.kv_heads :], self.index)
        self.between()
        keys, values = (t.repeat_interleave(4 // self.kv_heads, 1) for t in (keys, values))
        seen = torch.nn.functional.scaled_dot_product_attention(heads[:, :4], keys, values, attn_mask=mask)
        return x + self.out(seen.transpose(1, 2).flatten(2))


class Decoder(torch.nn.Module):
    """What Hugging Face's decoders have in common, as far as a cache sees it."""

    def __init__(self, layers: int = 2, kv_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=16
        )
        self.embed = torch.nn.Embedding(128, 64)
        self.layers = torch.nn.ModuleList(Layer(index, kv_heads) for index in range(layers))

    def forward(self, ids, past_key_values, attention_mask=None, use_cache=True):
        return SimpleNamespace(logits=self.logits(ids, past_key_values, attention_mask))

    def logits(self, ids, past_key_values, attention_mask=None):
        """The tensor alone: of one graph, as no object has to be made."""
        tokens = torch.arange(ids.shape[1]) + past_key_values.get_seq_length()
        width, _ = past_key_values.get_mask_sizes(ids.shape[1], 0)
        mask = (torch.arange(width) <= tokens[:, None])[None, None]
        if attention_mask is not None:
            padding = torch.nn.functional.pad(attention_mask.bool(), (0, width - attention_mask.shape[1]))
            mask = mask & (padding[:, None, None] | (torch.arange(width) == tokens[:, None]))
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask, past_key_values)
        return x @ self.embed.weight.T

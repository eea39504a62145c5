"""A small Llama, and how caches of it are made and stepped: of one kind, plain, in eager code or compiled."""

from __future__ import annotations

from typing import Any

import torch
from conformance import FULL, Watching
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xquant_fx import XQuantCache
from xquant_fx.cache.reads import Dequantized

MAX_LEN = 64
KINDS = ("XQuantCache", "StaticCache", "DynamicCache")
MODES = ("eager", "compiled")
FIELDS: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
IDS = torch.randint(3, 64, (3, MAX_LEN), generator=torch.Generator().manual_seed(1))


class Life:
    """A model, and how caches are made and stepped: of one kind, plain, in eager code or compiled."""

    def __init__(self, kind: str, mode: str) -> None:
        torch.manual_seed(0)
        self.kind, self.mode = kind, mode
        self.model: Any = LlamaForCausalLM(LlamaConfig(**FIELDS)).eval()
        self.made: list[Any] = []
        torch._dynamo.reset()
        self.options = {} if kind == "XQuantCache" else {"config": FULL}
        self.compiled: Any = self.compile(self.model.forward)

    def compile(self, function: Any, **how: Any) -> Any:
        """``function`` compiled; rewritten graphs run op by op, unless a ``backend`` is given."""
        if "backend" not in how:
            how["backend"] = backend = Watching(**self.options)
            backend.looks = False
        return torch.compile(function, **how)

    def new(self) -> Any:
        """An empty cache."""
        self.made.append(self._new())
        return self.made[-1]

    def in_full_precision(self) -> bool:
        """Whether no cache that was made holds anything quantized."""
        kept = [layer.keys for cache in self.made for layer in cache.layers]
        return bool(kept) and not any(isinstance(keys, Dequantized) for keys in kept)

    def _new(self) -> Any:
        if self.kind == "XQuantCache":
            return XQuantCache(self.model.config, MAX_LEN, FULL)
        if self.kind == "StaticCache":
            return StaticCache(self.model.config, max_cache_len=MAX_LEN)
        return DynamicCache(config=self.model.config)

    def begin(self, ids: Tensor, cache: Any = None, **more: Any) -> tuple[Any, Tensor]:
        """A cache that holds ``ids``, and the last token's logits [B, 1, V]. The backend has seen it."""
        cache = self.new() if cache is None else cache
        self.model(ids[:, :-1], past_key_values=cache, use_cache=True, **{k: v[:, :-1] for k, v in more.items()})
        first = self.model.forward if self.mode == "plain" or self._stays_eager() else self.compiled
        return cache, first(ids[:, -1:], past_key_values=cache, use_cache=True, **more).logits

    def step(self, ids: Tensor, cache: Any, **more: Any) -> Tensor:
        """Logits of more tokens."""
        call = self.compiled if self.mode == "compiled" else self.model.forward
        logits: Tensor = call(ids, past_key_values=cache, use_cache=True, **more).logits
        return logits

    def for_generate(self) -> Any:
        """The model, whose ``generate()`` runs compiled steps if this life is compiled."""
        if self.mode == "compiled":
            self.model.forward = self.compiled
        return self.model

    def cache_argument(self) -> dict[str, Any]:
        """What ``generate()`` is given; nothing in a plain life, where it makes a ``DynamicCache``."""
        return {} if self.mode == "plain" else {"past_key_values": self.new()}

    def _stays_eager(self) -> bool:
        return self.mode == "eager" and self.kind == "XQuantCache"

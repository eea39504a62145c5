"""``XQuantCache``: a Hugging Face cache that stores XQuant codes.

Its layers are Hugging Face's own static layers whose buffers are :class:`QuantizedKV`. They write
and read like any static layer, so the same passes rewrite this cache and any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from xquant_fx.cache.allocate import Slot, quantized_empty
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.cache.state import CacheGroup, KVState
from xquant_fx.errors import ArgumentError, CacheStateError, ConfigError
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan, make_plan
from xquant_fx.plan.warnings import warn_of_cost


class XQuantLayer(StaticLayer):
    """A static layer whose ``keys`` and ``values`` are quantized buffers, allocated at first use."""

    is_croppable = True

    def __init__(self, max_cache_len: int, layer_idx: int, below: list[XQuantLayer], plan: Plan) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.layer_idx = layer_idx
        self.lower = below[-1] if below and layer_idx % 2 else None
        self.first = below[0] if below else self
        # As text, which Dynamo can put into a graph. The first buffer brings the plan of the whole cache.
        self.key_slot = Slot.of(plan, layer_idx, "key", max_cache_len).to_json()
        self.value_slot = Slot.of(plan, layer_idx, "value", max_cache_len).to_json()
        self.plan_text = "" if below else plan.to_json()
        self.start: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate codes, scales and residual windows for keys and values such as these."""
        self.dtype, self.device = key_states.dtype, key_states.device  # from 5.24 on, static layers keep no dtype
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        lower, first = self.lower, self.first
        start = _rows(first.start, self.batch_size)
        below = (None, None) if lower is None else (lower.keys, lower.values)
        self.keys = quantized_empty(key_states, first.keys, below[0], start, self.key_slot, self.plan_text)
        self.values = quantized_empty(value_states, first.keys, below[1], start, self.value_slot, "")
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns what attention sees: of a cold prefill the prompt itself, with nothing behind it."""
        cold = not self.is_initialized
        stored = super().update(key_states, value_states, *args, **kwargs)
        if not cold:
            return stored
        if isinstance(self.keys, QuantizedKV) and not torch.compiler.is_compiling():
            key_states = PromptKeys.of(key_states, self.keys.live.note_queries)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that attention sees, offset of the first): those of ``update``."""
        return super().get_mask_sizes(query_length) if self.is_initialized else (query_length, 0)

    @property
    def states(self) -> list[KVState]:
        """Key and value state; empty before the first use."""
        return [t.state for t in (self.keys, self.values) if isinstance(t, QuantizedKV) and t.state is not None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows in place, codes once per pair."""
        for state in self.states:
            state.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back ``-tokens_to_remove`` tokens of this layer; see :meth:`XQuantCache.crop`."""
        _refuse_positive(tokens_to_remove)
        if not tokens_to_remove or not self.is_initialized:
            return
        length = max(int(self.cumulative_length.item()) + tokens_to_remove, 0)
        for state in self.states:
            state.check_truncate(length)
        for state in self.states:
            state.truncate(length)
        self.cumulative_length.fill_(length)

    def offload(self) -> None:
        """Not supported: raises CacheStateError."""
        raise CacheStateError(f"layer {self.layer_idx}: a quantized KV cache cannot be offloaded")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: raises CacheStateError."""
        raise CacheStateError(f"layer {self.layer_idx}: a quantized KV cache has a fixed batch; make one of the larger")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: raises CacheStateError."""
        raise CacheStateError(f"layer {self.layer_idx}: a quantized KV cache has a fixed batch; use reorder_cache")


class XQuantCache(StaticCache):
    """KV cache of 1 to 16 bits per element, for ``past_key_values=`` (``cache=`` from transformers 5.24 on).

    Full-attention layers are quantized; other kinds (sliding window, linear attention) stay as in
    ``StaticCache``. Memory is allocated at the first step and never holds full-precision keys or
    values but for the residual windows.

    Args:
        model_config: the model's ``config``; or the model, with whose weights a plan made for one model is compared.
        max_cache_len: tokens the cache can hold.
        config: settings, or a plan for as many layers as the model has quantized ones; default: ``XQuantConfig()``.
        padding_mask: int or bool [B, S], 0 for left padding. Padding then takes no part in scales
            and fits; without it padding counts as tokens. Kept by ``reset()``.

    Raises:
        ConfigError: a length is not positive, padding is not on the left, or a plan is for another number of layers or
            another model.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig | nn.Module,
        max_cache_len: int,
        config: XQuantConfig | Plan | None = None,
        *,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise ConfigError(f"XQuantCache takes no {sorted(kwargs)}")
        if config is not None and not isinstance(config, XQuantConfig | Plan):
            raise ConfigError(f"config must be an XQuantConfig or a Plan, got {type(config).__name__}")
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ConfigError(f"max_cache_len must be at least 1 token, got {max_cache_len}")
        if isinstance(config, Plan):
            config.check_model(model_config)
        of_model: Any = model_config.config if isinstance(model_config, nn.Module) else model_config
        super().__init__(config=of_model, max_cache_len=max_cache_len)
        self.xquant_config = config if config is not None else XQuantConfig()
        warn_of_cost(self.xquant_config)
        full = [i for i, layer in enumerate(self.layers) if type(layer) is StaticLayer]
        below: list[XQuantLayer] = []
        self.plan = make_plan(self.xquant_config, len(full)) if full else None
        for layer_idx, index in enumerate(full):
            assert self.plan is not None
            layer = XQuantLayer(max_cache_len, layer_idx, below, self.plan)
            self.layers[index] = layer
            below.append(layer)
        self.quantized_layers = below
        if padding_mask is not None:
            self.set_padding_mask(padding_mask)

    def set_padding_mask(self, padding_mask: Tensor | None) -> None:
        """Say which tokens of the next prompt are left padding (0 in ``padding_mask`` [B, S])."""
        start = None if padding_mask is None else left_padding(padding_mask)
        for layer in self.quantized_layers:
            layer.start = start
        group = self.group
        if group is not None:
            rows = _rows(start, group.start.shape[0])
            group.start.zero_() if rows is None else group.start.copy_(rows)

    @property
    def group(self) -> CacheGroup | None:
        """What the layers share; None before the first step."""
        states = self.states
        return states[0].group if states else None

    @property
    def states(self) -> list[KVState]:
        """States of all quantized layers that are allocated."""
        return [state for layer in self.quantized_layers for state in layer.states]

    def reset(self) -> None:
        """Empty the cache; what is allocated stays, and so does padding."""
        super().reset()  # type: ignore[no-untyped-call]

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back ``-tokens_to_remove`` tokens (Hugging Face counts them negative), in all layers or in none.

        Layers that are not quantized decide by their ``is_croppable``: static ones cannot be rolled
        back before transformers 5.24, sliding windows from then on if the whole cache fits into them.

        Raises:
            CacheStateError: more than 8 tokens and not all: those before them are quantized. Or a layer
                that is not quantized cannot be rolled back.
            ArgumentError: a positive number (a ValueError, too).
        """
        _refuse_positive(tokens_to_remove)
        fixed = sorted({type(layer).__name__ for layer in self.layers if not layer.is_croppable})
        if tokens_to_remove and fixed:
            raise CacheStateError(f"a cache is rolled back in all its layers or in none, and cannot be in {fixed}")
        stored = int(self.get_seq_length())
        length = max(stored + tokens_to_remove, 0)
        for state in self.states:
            state.check_truncate(length)
        for layer in self.layers:
            if layer.is_croppable:
                layer.crop(length - stored)  # type: ignore[union-attr]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows in place (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.group is not None:
            start = self.group.start
            start.copy_(start.index_select(0, beam_idx.to(start.device)))


def _refuse_positive(tokens_to_remove: int) -> None:
    """Positive numbers once meant the length to keep; transformers 5.24 refuses them, too."""
    if tokens_to_remove > 0:
        raise ArgumentError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")


def left_padding(padding_mask: Tensor) -> Tensor:
    """Number of padding tokens in front of each row of ``padding_mask`` [B, S]: int64 [B]."""
    mask = padding_mask.to(torch.bool)
    if mask.dim() != 2:
        raise ConfigError(f"padding_mask must have shape [B, S], got {tuple(mask.shape)}")
    start = (~mask).sum(1)
    expected = torch.arange(mask.shape[1], device=mask.device) >= start[:, None]
    if not torch.equal(mask, expected):
        raise ConfigError("padding_mask must be left padding: 0s, then 1s in every row")
    return start


def _rows(start: Tensor | None, batch: int) -> Tensor | None:
    """Padding of a batch that generate() may have multiplied (beams, several return sequences)."""
    if start is None or start.shape[0] == batch:
        return start
    if batch % start.shape[0]:
        raise ConfigError(f"padding_mask has {start.shape[0]} rows, which do not divide the batch of {batch}")
    return start.repeat_interleave(batch // start.shape[0])

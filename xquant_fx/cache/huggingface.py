"""``XQuantCache``: a Hugging Face cache that stores XQuant codes.

Its layers (``huggingface_layer.py``) are Hugging Face's own static layers whose buffers are :class:`QuantizedKV`. They
write and read like any static layer, so the same passes rewrite this cache and any other.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, StaticCache

from xquant_fx.cache.fork import forked
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.huggingface_layer import XQuantLayer, minus_tokens
from xquant_fx.cache.huggingface_layers import (
    full_and_windows,
    keep_windows,
    quantized_layer,
    warn_of_buffers_taken_for_text,
    why_no_window_masks,
)
from xquant_fx.cache.padding import Padding
from xquant_fx.cache.prompts import TellsPrompts
from xquant_fx.cache.remake import move, rows_held, select_rows
from xquant_fx.cache.saving import load, save
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ArgumentError, CacheStateError, ConfigError
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan, make_plan
from xquant_fx.plan.warnings import warn_of_cost
from xquant_fx.plan.windows import why_not_windows

#: Tokens that ``max_cache_len`` may be at most.
LONGEST_CACHE = 2**30


class XQuantCache(StaticCache, TellsPrompts):
    """KV cache of 1 to 16 bits per element, for ``past_key_values=`` (``cache=`` from transformers 5.24 on).

    Full-attention layers are quantized, and so are long sliding windows (``xquant_fx/plan/windows.py``); other kinds
    (linear attention) stay as in ``StaticCache``. Memory is allocated at the first step and never holds full-precision
    keys or values but for the residual windows.

    Args:
        model_config: the model's ``config``; or the model, with whose weights a plan made for one model is compared.
            ``config=`` takes a model's config, too, as other caches do.
        max_cache_len: tokens the cache can hold.
        config: settings, or a plan for as many layers as the model has quantized ones; default: ``XQuantConfig()``. A
            plan for the full-attention layers alone leaves sliding windows in full precision.
        padding_mask: int or bool [B, S], 0 for left padding of the first prompt. Padding then takes no part in scales
            and fits; without it padding counts as tokens. Forgotten by ``reset()``.

    Raises:
        ConfigError: an argument breaks its rule, padding is not on the left, or a plan is for another number of layers
            or another model.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig | nn.Module | None = None,
        max_cache_len: int = 0,
        config: XQuantConfig | Plan | None = None,
        *,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise ConfigError(f"XQuantCache takes no {sorted(kwargs)}")
        if model_config is None and isinstance(config, PreTrainedConfig):
            model_config, config = config, None
        of_model: Any = getattr(model_config, "config", None) if isinstance(model_config, nn.Module) else model_config
        if not isinstance(of_model, PreTrainedConfig):
            raise ConfigError(
                "write XQuantCache(model.config, max_cache_len, config=XQuantConfig(...)): the model's config must "
                f"come first, got {type(model_config).__name__}"
            )
        if config is not None and not isinstance(config, XQuantConfig | Plan):
            raise ConfigError(f"config must be an XQuantConfig or a Plan, got {type(config).__name__}")
        max_cache_len = _length(max_cache_len)
        if isinstance(config, Plan):
            config.check_model(model_config)
        with torch.inference_mode(False):  # or only inference mode could write to the counters
            super().__init__(config=of_model, max_cache_len=max_cache_len)
        self.xquant_config = config if config is not None else XQuantConfig()
        warn_of_cost(self.xquant_config)
        warn_of_buffers_taken_for_text(of_model)
        full, windows = full_and_windows(self.layers)
        left = why_not_windows(list(windows.values()), len(full), self.xquant_config)
        self.windows_left = left or (why_no_window_masks(of_model) if windows else "")
        """Why sliding windows stay in full precision; "" where there are none, or none stays."""
        chosen = full if self.windows_left else full | windows
        self.quantized_layers: list[XQuantLayer] = []
        self.plan = make_plan(self.xquant_config, len(chosen)) if chosen else None
        latents = _latents(of_model)
        for layer_idx, index in enumerate(sorted(chosen)):
            assert self.plan is not None
            window = chosen[index] % max_cache_len  # one as long as the cache never slides
            of_layer = (max_cache_len, layer_idx, self.quantized_layers, self.plan)
            layer = quantized_layer(self.layers[index], *of_layer, latents, window)
            self.layers[index] = layer
            self.quantized_layers.append(layer)
        if self.windows_left:
            keep_windows(self.layers, self.windows_left)
        if padding_mask is not None:
            self.set_padding_mask(padding_mask)

    def set_padding_mask(self, padding_mask: Tensor | None) -> None:
        """Say which tokens of the next prompt are left padding (0 in ``padding_mask`` [B, S]); None: none are.

        Raises:
            CacheStateError: the cache holds tokens; ``reset()`` it first.
            ConfigError: padding is not on the left.
        """
        if any(layer.is_initialized for layer in self.quantized_layers):
            raise CacheStateError("padding belongs to a prompt, and this cache holds one already: reset() it first")
        padding = None if padding_mask is None else Padding.of(padding_mask)
        for layer in self.quantized_layers:
            layer.padding = padding

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
        """Back to a new cache, padding included; memory is kept and taken again by a prompt of the same batch."""
        super().reset()  # type: ignore[no-untyped-call]

    @property
    def layers_begun(self) -> tuple[int, int]:
        """How many quantized layers hold tokens, or did since the cache was empty, and how many there are."""
        layers = self.quantized_layers
        if not layers or layers[-1].is_initialized:
            return len(layers), len(layers)
        return sum(layer.is_initialized for layer in layers), len(layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back ``-tokens_to_remove`` tokens (Hugging Face counts them negative), in all layers or in none.

        Where none is left the cache is new, as after ``reset()``. After a step that was interrupted it brings all
        layers to one length again. Layers that are not quantized decide by their ``is_croppable``: static ones cannot
        be rolled back before transformers 5.24, sliding windows from then on if the whole cache fits into them.

        Raises:
            CacheStateError: more tokens than ``rollback_tokens`` of the config and not all: those before them are
                quantized. Or a layer that is not quantized cannot be rolled back.
            ArgumentError: a positive number (a ValueError, too).
        """
        tokens_to_remove = minus_tokens(tokens_to_remove)
        first: Any = self.quantized_layers[0] if self.quantized_layers else self
        stored = int(first.get_seq_length())
        length = max(stored + tokens_to_remove, 0)
        if stored and not length:
            self.reset()
            return
        fixed = sorted({type(layer).__name__ for layer in self.layers if not layer.is_croppable})
        if tokens_to_remove and fixed:
            raise CacheStateError(f"a cache is rolled back in all its layers or in none, and cannot be in {fixed}")
        for state in self.states:
            state.check_truncate(length)
        for layer in self.layers:
            if isinstance(layer, XQuantLayer):
                layer.truncate(length)
            elif layer.is_croppable:
                layer.crop(length - stored)  # type: ignore[union-attr]

    def activate_past_recording(self) -> None:
        """Called where tokens are going to be taken back: assisted decoding, prompt lookup.

        Raises:
            CacheStateError: a layer cannot take tokens back.
        """
        fixed = sorted({type(layer).__name__ for layer in self.layers if not layer.is_croppable})
        if fixed:
            raise CacheStateError(
                f"assisted decoding and prompt lookup take tokens back, which layers of this cache cannot: {fixed}"
            )
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows in place (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.group is not None:
            start = self.group.start
            start.copy_(start.index_select(0, beam_idx.to(start.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        select_rows(self.layers, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch ``repeats`` times."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ArgumentError(f"rows are repeated at least once, got {repeats!r}")
        select_rows(self.layers, torch.arange(rows_held(self.layers)).repeat_interleave(repeats))

    def to(self, device: torch.device | str) -> XQuantCache:
        """Move all that is stored to ``device``, to wait there or to go on with a model on it; returns the cache."""
        move(self.layers, torch.device(device))
        return self

    def fork(self) -> XQuantCache:
        """A copy that goes on by itself: one prompt, several continuations.

        On Linux's CPUs it shares memory with this cache, page by page, until one of the two writes to a page. Elsewhere
        it is a copy like ``copy.deepcopy``, and a warning says so once. Either may be reset, cropped, reordered,
        forked again or deleted: the other does not see it.

        Raises:
            CacheStateError: another thread is in a step of this cache.
        """
        group = self.group
        return copy.deepcopy(self) if group is None else forked(self, self.states, group)

    def __deepcopy__(self, memo: dict[int, Any]) -> XQuantCache:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        with torch.inference_mode(False):
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """All that is stored, as tensors by name, for ``safetensors`` or ``torch.save``: the tensors themselves."""
        return save(self)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave, of a cache with the same plan and ``max_cache_len``.

        Raises:
            ArgumentError: it is of another cache, or incomplete; nothing is changed.
        """
        load(self, tensors)


def _latents(config: PreTrainedConfig) -> tuple[int, int] | None:
    """(channels of the latent, of the rotary part of keys), of a model whose layers cache these."""
    decoder = config.get_text_config(decoder=True)
    rank, rotary = (getattr(decoder, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    return (rank, rotary) if isinstance(rank, int) and isinstance(rotary, int) else None


def _length(tokens: Any) -> int:
    try:
        length = operator.index(tokens)
    except TypeError:
        length = 0
    if isinstance(tokens, bool) or not 1 <= length <= LONGEST_CACHE:
        raise ConfigError(f"max_cache_len must be an integer of 1 to {LONGEST_CACHE} tokens, got {tokens!r}")
    return length

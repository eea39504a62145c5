"""Quantized layers that hold more than keys and values: keys of an indexer (sparse attention), or recurrent states.

Those stay as transformers makes them: an indexer's keys choose tokens, recurrent states hold no tokens at all.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from xquant_fx.cache.huggingface_layer import XQuantLayer
from xquant_fx.cache.huggingface_window import FullPrecisionWindow
from xquant_fx.warn_once import warn_once

#: Layers of transformers, which older ones may not have.
Indexed: Any = getattr(cache_utils, "StaticIndexedLayer", StaticLayer)
Hybrid: Any = getattr(cache_utils, "LinearAttentionAndStaticFullAttentionLayer", StaticLayer)
SlidingHybrid: Any = getattr(
    cache_utils, "LinearAttentionAndStaticSlidingWindowAttentionLayer", StaticSlidingWindowLayer
)
States: Any = getattr(cache_utils, "LinearAttentionLayer", StaticLayer)


class XQuantIndexedLayer(XQuantLayer, Indexed):  # type: ignore[misc]
    """A quantized layer beside an indexer's keys [B, tokens, channels], which stay in full precision."""

    is_indexer_initialized: bool
    indexer_position_ids: Any = None  # older transformers have none

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append; returns what the indexer sees, like ``update``: of a cold prefill the prompt itself."""
        cold = not self.is_indexer_initialized
        stored: Tensor = super().update_indexer(indexer_key_states)
        return indexer_key_states if cold else stored

    def reset(self) -> None:
        """Empty the layer."""
        XQuantLayer.reset(self)
        if self.is_indexer_initialized:
            self.indexer_cumulative_length.zero_()  # which older transformers make but once
        self.is_indexer_initialized, self.indexer_keys, self.indexer_position_ids = False, None, None

    def truncate(self, length: int) -> None:
        """Keep ``length`` tokens."""
        XQuantLayer.truncate(self, length)
        if self.is_indexer_initialized:
            self.indexer_cumulative_length.fill_(length)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows."""
        XQuantLayer.reorder_cache(self, beam_idx)
        if self.is_indexer_initialized:
            keys: Any = self.indexer_keys
            keys.copy_(keys.index_select(0, beam_idx.to(keys.device)))
        if self.indexer_position_ids is not None:
            positions = self.indexer_position_ids
            self.indexer_position_ids = positions.index_select(1, beam_idx.to(positions.device))


class _Hybrid(XQuantLayer):
    """What is the same with a sliding window and without one."""

    is_croppable = False  # type: ignore[assignment]  # recurrent states cannot be taken back

    def set_states(self, number_of_states: int) -> None:
        """Make room for so many states: once, behind ``__init__``."""
        States.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:
        """Of keys and values, if they are given; else of states."""
        (XQuantLayer if args else States).lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        """Tokens that the layer can hold."""
        return int(self.max_cache_len)

    def get_seq_length(self) -> Any:
        """Tokens that it holds: a number of its own, for such models ask before they append and use it afterwards."""
        length = XQuantLayer.get_seq_length(self)
        return length.clone() if isinstance(length, Tensor) else length

    def reset(self) -> None:
        """Empty the layer; its memory is kept."""
        States.reset(self)
        XQuantLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows."""
        States.reorder_cache(self, beam_idx)
        XQuantLayer.reorder_cache(self, beam_idx)


class XQuantHybridLayer(_Hybrid, Hybrid):  # type: ignore[misc]
    """A quantized layer beside states of linear attention, which stay in full precision."""


QUANTIZED: dict[type, type[XQuantLayer]] = {
    SlidingHybrid: XQuantHybridLayer,
    Hybrid: XQuantHybridLayer,
    Indexed: XQuantIndexedLayer,
    StaticSlidingWindowLayer: XQuantLayer,
    StaticLayer: XQuantLayer,
}
"""Layers of a ``StaticCache``, and what is made of them."""


#: Functions of transformers of which a model with sliding windows has one: they make masks that hide older tokens.
MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")
WINDOWS = (StaticSlidingWindowLayer, SlidingHybrid)


def quantized_layer(like: Any, *args: Any) -> XQuantLayer:
    """The quantized layer that takes the place of ``like``, made with these arguments."""
    made = QUANTIZED[type(like)](*args)
    if isinstance(made, _Hybrid):
        made.set_states(like.number_of_states)
    return made


def keep_windows(layers: list[Any], reason: str) -> None:
    """Put windows that stay in full precision for ``reason`` in the places of those of a ``StaticCache``."""
    for index, layer in enumerate(layers):
        if type(layer) is StaticSlidingWindowLayer:
            layers[index] = FullPrecisionWindow(layer, layers, reason)


def full_and_windows(layers: Sequence[Any]) -> tuple[dict[int, int], dict[int, int]]:
    """By index, those of ``layers`` that can be quantized: of full attention with 0, of sliding windows with tokens."""
    kinds = {index: layer for index, layer in enumerate(layers) if type(layer) in QUANTIZED}
    windows = {index: int(layer.max_cache_len) for index, layer in kinds.items() if type(layer) in WINDOWS}
    return {index: 0 for index in kinds if index not in windows}, windows


def why_no_window_masks(config: Any) -> str:
    """Why sliding windows of a model stay as they are: it makes no mask for them, and wants a cache that forgets.

    Such are models of transformers whose code names none of ``MASKS`` (Moshi); of other code nothing is known.
    """
    code = _code_of(config)
    makes_masks = code is None or any(hasattr(code, name) for name in MASKS)
    return "" if makes_masks else "its model makes no masks of sliding windows and relies on a cache that forgets"


def warn_of_buffers_taken_for_text(config: Any) -> None:
    """Warn once of a model whose text is wrong with every cache of fixed length (GPT-Neo), by its code."""
    code = _code_of(config)
    if code is not None and "key_length - query_length : key_length" in inspect.getsource(code):
        warn_once(
            f"{code.__name__.rpartition('.')[2]}: this model takes the length of a cache for that of its text, so what "
            "it writes is wrong with every cache of fixed length, a StaticCache like an XQuantCache; give generate() "
            'none: with model.compile(backend="xquant") what grows is quantized'
        )


def _code_of(config: Any) -> Any:
    """The module of transformers that a config's model is in; None of other code."""
    of_config = type(config.get_text_config(decoder=True)).__module__
    of_model = of_config.replace(".configuration_", ".modeling_")
    try:
        return None if of_model == of_config else importlib.import_module(of_model)
    except ImportError:
        return None

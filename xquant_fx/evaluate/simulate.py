"""All decode steps of a window in one pass, exactly: each query sees the cache as it was before its step.

The cache is the product's own: the prompt is stored as one chunk and the tokens after it as a few more, which gives the
codes that steps would have stored (those of a token do not change once it is quantized). What they give back is read
by the op that eager steps read by. Which of it a query sees, the scheme's ``quantized_limit`` says.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from xquant_fx import ops
from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.cache.huggingface_layer import XQuantLayer
from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.attention import Form, Side, attend, plain
from xquant_fx.evaluate.models import attending, forward
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.kernels.shared_code_load.arguments import STORED
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.reports.quality import kl_divergence


class Seen(NamedTuple):
    """One layer's attention in a pass, for those who look on."""

    layer: int
    """Number of the quantized layer, from 0."""
    query: Tensor
    keys: Side
    values: Side
    form: Form
    out: Tensor
    """[B, Hq, q, D] of the attention that the model goes on with."""


#: Mean KL in nats that arithmetic of another order may cause, in 16-bit models.
ROUNDING = 0.01

Observer = Callable[[Seen], None]


class WatchedCache(DynamicCache):
    """A cache in full precision that keeps the queries of a prompt, as an ``XQuantCache`` gets to see them."""

    queries: dict[int, Tensor] | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Masks hide what has left a sliding window.
        self.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in self.layers]
        self.queries = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; keys that are read tell who attends to them."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        queries = self.queries
        if queries is None:
            return keys, values

        def note(q: Tensor) -> None:
            queries.setdefault(layer_idx, q)

        return PromptKeys.of(keys, note), values


class Prefilled(NamedTuple):
    """A window whose prompt a model has read in full precision; several passes start from it."""

    model: Any
    ids: Tensor
    """int64 [B, T]."""
    prompt: int
    cache: Any
    queries: dict[int, Tensor]
    """The prompt's queries [B, Hq, q, D] by layer: keys may be ranked by them (``KVState.note_queries``)."""
    last: Tensor
    """Logits [B, 1, V] at the prompt's last token."""

    @classmethod
    def of(cls, model: Any, ids: Tensor, prompt: int) -> Prefilled:
        """Read the first ``prompt`` tokens of ``ids`` with the model's own attention."""
        cache = WatchedCache(config=model.config)
        last = forward(model, ids[:, :prompt], cache, torch.tensor([prompt - 1], device=ids.device))
        queries, cache.queries = cache.queries, None
        return cls(model, ids, prompt, cache, queries or {}, last)

    def rest(self, keep: Tensor) -> Tensor:
        """Logits [B, len(keep), V] at the positions ``keep`` (int64, of the window), by one pass after the prompt.

        The last token is not read: nothing follows it that could be predicted.
        """
        cache = copy.deepcopy(self.cache)
        return forward(self.model, self.ids[:, self.prompt : -1], cache, keep - self.prompt)


def reference_logits(window: Prefilled, keep: Tensor) -> Tensor:
    """Logits [B, len(keep), V] at ``keep`` in full precision, by the arithmetic of :func:`simulated_logits`."""
    with attending(window.model, _Pass(window, None)):
        return window.rest(keep)


def check_attention(window: Prefilled, keep: Tensor, reference: Tensor) -> None:
    """Whether ``reference``, logits [B, len(keep), V] at ``keep``, are what the model's own attention gives.

    Raises:
        ArgumentError: they are not: the model does to its scores what :class:`Form` has no field for.
    """
    apart = kl_divergence(window.rest(keep), reference)
    if not apart < ROUNDING:
        raise ArgumentError(
            f"the model's attention does something that the simulation does not know (KL {apart:.4f} nats in full "
            "precision): measure such a model by real steps"
        )


def simulated_logits(
    window: Prefilled,
    keep: Tensor,
    config: XQuantConfig | Plan,
    observer: Observer | None = None,
    *,
    lean: bool = False,
) -> tuple[Tensor, XQuantCache]:
    """(logits [B, len(keep), V] at ``keep`` as decode steps give them, the cache after the last step).

    ``lean`` leaves layers of 16 bits out of the cache, which the logits do not need.

    Raises:
        ArgumentError: the model's attention cannot be exchanged, or reads something else than its layer stores.
        ConfigError: ``config`` does not fit the model.
    """
    cache = XQuantCache(window.model.config, max_cache_len=window.ids.shape[1], config=config)
    for layer in cache.quantized_layers:
        if layer.window and cache.plan is not None:
            layer.keep_all(cache.plan)
    with attending(window.model, _Pass(window, cache, observer, lean)):
        return window.rest(keep), cache


class _Pass:
    """An attention function of transformers: quantizes a layer's window, then attends to what each step sees."""

    def __init__(
        self, window: Prefilled, cache: XQuantCache | None, observer: Observer | None = None, lean: bool = False
    ) -> None:
        self.window, self.cache, self.observer, self.lean = window, cache, observer, lean

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
        scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if mask is None:
            raise ArgumentError(f"a model must give its attention a mask, got none from {type(module).__name__}")
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        form = Form(scale, mask, softcap, s_aux)
        layer = self._layer(module, key, value)
        if layer is None:
            new = query.shape[2]
            return attend(query, plain(key, new), plain(value, new), form).transpose(1, 2).contiguous(), None
        keys, values = self._sides(layer, module.layer_idx, key, value, query.shape[2])
        out = attend(query, keys, values, form)
        if self.observer is not None:
            self.observer(Seen(layer.layer_idx, query, keys, values, form, out))
        return out.transpose(1, 2).contiguous(), None

    def _layer(self, module: Any, key: Tensor, value: Tensor) -> XQuantLayer | None:
        """The layer of the cache that this attention would store to; None: it is not quantized."""
        if self.cache is None:
            return None
        index = module.layer_idx
        layer = self.cache.layers[index] if index < len(self.cache.layers) else None
        if layer is not None and not isinstance(layer, XQuantLayer):
            return None
        stored = self.window.cache.layers[index] if layer is not None else None
        if stored is None or not (_begins_with(key, stored.keys) and _begins_with(value, stored.values)):
            raise ArgumentError(
                f"attention must read what its layer stores, and layer {index} reads something else (latents, or "
                "another layer's keys); measure such a model by real steps"
            )
        return None if layer is None or (self.lean and _is_full(self.cache, layer)) else layer

    def _sides(self, layer: XQuantLayer, index: int, key: Tensor, value: Tensor, new: int) -> tuple[Side, ...]:
        split = self.window.prompt
        if layer.first is not layer and not layer.first.is_initialized:
            # A pass that begins above the first layer (replay.py), which all others take their group from.
            layer.first.lazy_initialization(key, value)
        layer.update(key[:, :, :split], value[:, :, :split])
        if index in self.window.queries:
            layer.states[0].note_queries(self.window.queries[index])
        total = key.shape[2]
        ends = sorted({first_quantized(state, split, total) for state in layer.states} | {total})
        for begin, end in itertools.pairwise([split, *ends]):
            layer.update(key[:, :, begin:end], value[:, :, begin:end])
        past = torch.arange(split, split + new, device=key.device)
        sides = tuple(side(s, x, past) for s, x in zip(layer.states, (key, value), strict=True))
        layer.states[0].group.drop()
        return sides


def _is_full(cache: XQuantCache, layer: XQuantLayer) -> bool:
    """Whether a layer's keys and values are stored as they are."""
    assert cache.plan is not None
    return all(entry.bits == 16 for entry in cache.plan.layers[layer.layer_idx])


def _begins_with(x: Tensor, stored: Tensor) -> bool:
    """Whether the first token of ``x`` [B, H, T, D] is that of ``stored``."""
    first, other = x[:, :, :1], stored[:, :, :1]
    return first.shape == other.shape and torch.equal(first, other)


def side(state: KVState, full: Tensor, past: Tensor) -> Side:
    """What queries see of ``full`` [B, H, T, D], all stored, when ``past`` (int64 [q], rising) tokens are stored."""
    if not state.spec.quantized:
        return plain(full, len(past))
    spec = state.spec
    limits = SCHEMES[spec.scheme].quantized_limit(past, spec.group_size, spec.residual_length)
    return Side(full, read_back(state, max(int(limits[-1]), 0)), limits)


def first_quantized(state: KVState, stored: int, total: int) -> int:
    """Tokens, from ``stored`` + 1 to ``total``, with which a step first quantizes any; ``total`` if that was before.

    What is quantized first may decide for all that follows (how channels are ranked), so it is stored as steps do.
    """
    spec = state.spec
    if not spec.quantized:
        return total
    limits = ((n, SCHEMES[spec.scheme].quantized_limit(n, spec.group_size, spec.residual_length)) for n in
              range(stored, total))  # fmt: skip
    first = next((n for n, limit in limits if limit > 0), total)
    return first if first > stored else total


def read_back(state: KVState, n: int) -> Tensor:
    """The first ``n`` tokens [B, H, n, D] as they are read once all are quantized; sinks in full precision."""
    # So far on that every one of them is below the limit, whatever the schedule.
    past = torch.tensor([n + state.spec.shape[2] + 4 * state.spec.residual_length], device=state.group.start.device)
    tensors: dict[str, Any] = {name: state.tensor(name) for name in STORED}
    return ops.LOAD(**tensors, past=past, new_tokens=1, n=n, **state.spec.load_constants(), x=None)

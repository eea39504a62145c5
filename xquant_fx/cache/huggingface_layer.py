"""``XQuantLayer``: one layer of an ``XQuantCache``, a static layer of Hugging Face whose buffers are quantized.

Whether Dynamo traces is asked by ``is_dynamo_compiling``: ``torch.compiler.is_compiling()`` is true in all threads
while one of them compiles (torch 2.13).
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from xquant_fx.cache.allocate import Slot, quantized_empty
from xquant_fx.cache.heap import keep_freed_memory
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.padding import Padding
from xquant_fx.cache.prompt_attention import may_be_attended
from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ArgumentError, CacheStateError
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import Role, why_not_tokens
from xquant_fx.tracing import is_traced, not_traced

KEYS_AND_VALUES: tuple[Role, Role] = ("key", "value")


class XQuantLayer(StaticLayer):
    """A static layer whose ``keys`` and ``values`` are quantized buffers, allocated at first use.

    ``is_initialized`` says that they are in use: ``reset()`` keeps them, and a prompt that fits takes them again.

    With a sliding ``window`` (0: none) it is written and read as if it held all tokens, by a mask that hides the older
    ones; stored are those that the window may still see.
    """

    is_croppable = True

    def __init__(
        self,
        max_cache_len: int,
        layer_idx: int,
        siblings: list[XQuantLayer],
        plan: Plan,
        latents: tuple[int, int] | None = None,
        window: int = 0,
    ) -> None:
        with torch.inference_mode(False):
            super().__init__(max_cache_len=max_cache_len)
        self.layer_idx, self.window = layer_idx, window
        if window:  # else it is what its class says, and no attribute of its own that Dynamo would guard on
            self.is_sliding = True
        self.left_window = 0
        """The window of a layer that keeps all tokens nevertheless."""
        self.lower = siblings[-1] if siblings and layer_idx % 2 else None
        self.first = siblings[0] if siblings else self
        self.leads = not siblings
        """Whether it is the first one."""
        self.siblings = siblings
        """All quantized layers of the cache, once it is made."""
        self.latents = latents
        """Channels of what ``keys`` and ``values`` hold where keys and values are computed from latents."""
        self.roles = KEYS_AND_VALUES
        """What ``keys`` and ``values`` are stored as."""
        self._set_slots(plan)
        # As text, which Dynamo can put into a graph. The first buffer brings the plan of the whole cache.
        self.plan_text = "" if siblings else plan.to_json()
        self.masked = False
        """Whether masks were made for this cache since it was empty: a model steps through all layers, not someone's
        code through one."""
        self.padding: Padding | None = None
        self.chunk = 0
        self.prompt_left = 0
        """Tokens of a padded prompt that are still to come, of the first layer."""

    def _set_slots(self, plan: Plan) -> None:
        index, window = self.layer_idx, self.window
        self.slots = {role: Slot.of(plan, index, role, window=window).to_json() for role in KEYS_AND_VALUES}
        self.rotary_slot = Slot.of(plan, index, "key", rotary=True, window=window).to_json()

    def keep_all(self, plan: Plan) -> None:
        """Store tokens that have left the window, too: for looking back. Before the first step."""
        self.left_window, self.window = self.window, self.max_cache_len
        self._set_slots(plan)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate codes, scales and residual windows for keys and values such as these.

        The first layer does so for all, where nothing is traced: what stays is then one block of memory, and what a
        prompt needs for a moment leaves no holes between.
        """
        if self.leads and not torch.compiler.is_dynamo_compiling() and key_states.device.type == "cpu":
            keep_freed_memory()
        self._allocate(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_dynamo_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
            for layer in self.siblings[1:] if self.leads else []:
                layer._allocate(key_states, value_states)  # taken when its turn comes, if it fits
        self.is_initialized = True

    def get_seq_length(self) -> Any:
        """Tokens that are held, a number or a tensor [] of its own: what transformers returns counts on with the cache.

        Its masks for flex attention would read that once the step has counted its tokens.
        """
        return self.cumulative_length.clone() if self.is_initialized else 0

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device  # from 5.24 on, static layers keep no dtype
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        lower, padding = self.lower, self.first.padding
        first = None if self.leads else self.first.keys
        start = None if padding is None else padding.rows(self.batch_size)
        self.roles = key, value = self._roles(key_states, value_states)
        below = {} if lower is None else dict(zip(lower.roles, (lower.keys, lower.values), strict=True))
        masked, plan = self.first.masked, self.plan_text
        slots = self.slots if key == "key" else {**self.slots, "key": self.rotary_slot}
        room = self.first.max_cache_len  # all have the same, and each that is asked is a number to Dynamo
        keys = quantized_empty(key_states, first, below.get(key), start, slots[key], room, plan, self.keys, masked)
        first = keys if first is None else first
        lower_values, old = below.get(value), self.values
        values = quantized_empty(value_states, first, lower_values, start, slots[value], room, "", old, masked)
        self.keys, self.values = keys, values

    def _roles(self, key_states: Tensor, value_states: Tensor) -> tuple[Role, Role]:
        """What each side is stored as. A latent becomes keys as well as values, and its channels are no keys'.

        Models of transformers give the latent as keys, and as values the rotary part that all heads' keys share.
        """
        is_latent = key_states.shape[1] == 1 and (key_states.shape[-1], value_states.shape[-1]) == self.latents
        return ("value", "key") if is_latent else KEYS_AND_VALUES

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns what attention sees: of a cold prefill the prompt itself, with nothing behind it.

        Raises:
            CacheStateError: the tokens do not fit the cache; nothing is changed.
        """
        # What Dynamo traces in each layer of a step, and guards on, are the lines that follow and no others: what does
        # not fit is found by the buffers that it sees (``QuantizedKV.append_at``).
        if not torch.compiler.is_dynamo_compiling():
            return self._uncompiled(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            return self._compiled_prompt(key_states, value_states, *args, **kwargs)
        new = key_states.shape[2]
        if self.leads and (self.padding is not None or not self.siblings[-1].is_initialized):
            self._check_step(new, cold=False)
        keys: Any = self.keys
        values: Any = self.values
        positions = torch.arange(new, device=keys.device) + self.cumulative_length
        keys.index_copy_(2, positions, key_states)
        values.index_copy_(2, positions, value_states)
        self.cumulative_length.add_(new)  # last: the graph ends before what is refused
        return keys, values

    def _compiled_prompt(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(key_states, value_states, cold=True)
        super().update(key_states, value_states, *args, **kwargs)
        # A mask that was not made for this cache may be as wide as it. Queries are shown by who runs the graph.
        if not self.first.masked:
            key_states = PromptKeys.of(key_states, _ignored, self.first.max_cache_len)
        return key_states, value_states

    def _uncompiled(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting() and is_traced(key_states):
            raise CacheStateError(
                f"layer {self.layer_idx}: torch.export(strict=False) would make this XQuantCache part of the program; "
                'compile the model by backend="xquant" instead, which takes any cache'
            )
        cold = not self.is_initialized
        self._check(key_states, value_states, cold)
        if cold:  # as a buffer would give them back: attention reads them faster, and storing needs a copy anyway
            key_states, value_states = key_states.contiguous(), value_states.contiguous()
        stored = self._update(key_states, value_states, *args, **kwargs)
        if not cold:
            return self._as_prompt(*stored) if may_be_attended(key_states) else stored
        if isinstance(self.keys, QuantizedKV):
            key_states = PromptKeys.of(key_states, self.keys.live.note_queries, self.max_cache_len)
        return key_states, value_states

    def _as_prompt(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a long chunk attends to, dequantized, as it would be anyway: its attention has a kernel, too."""
        if not isinstance(keys, QuantizedKV) or not isinstance(values, QuantizedKV):
            return keys, values
        return PromptKeys.of(keys.dense(), _ignored), values.dense()

    def _check(self, key_states: Tensor, value_states: Tensor, cold: bool) -> None:
        """Whatever can be known before anything is written; where Dynamo traces this, eager code says what it is."""
        # Attributes that are read here only to be told are read then: Dynamo guards on each that it meets.
        new, room = key_states.shape[2], self.first.max_cache_len if cold or self.keys is None else self.keys.shape[2]
        if new > room:
            raise CacheStateError(
                f"layer {self.layer_idx}: a step of {new} tokens does not fit into a cache of {room} (max_cache_len)"
            )
        if cold and self.first.masked and self.siblings[-1].is_initialized:
            raise self._left_behind()
        if not cold:
            for buffer, x in ((self.keys, key_states), (self.values, value_states)):
                if buffer is None:
                    continue
                if reason := why_not_tokens(x, buffer.shape, buffer.dtype):
                    raise CacheStateError(f"layer {self.layer_idx}: {reason}")
                if buffer.device != x.device:
                    raise CacheStateError(
                        f"layer {self.layer_idx}: this cache is on {buffer.device}, the step on {x.device}: make the "
                        "cache after the model was moved, or move the cache (cache.to(device))"
                    )
        if self.leads:
            self._check_step(new, cold)

    def _check_step(self, new: int, cold: bool) -> None:
        """The same of a whole step, by the cache's first layer."""
        left = [layer for layer in self.siblings if not layer.is_initialized]
        if not cold and left and self.masked:
            raise left[0]._left_behind()
        padding = self.padding
        if padding is None:
            return
        if cold:
            padding.check_prompt(new)
            self.chunk, self.prompt_left = new, max(padding.width - new, 0)
        elif self.prompt_left:
            if self.masked and isinstance(self.keys, QuantizedKV) and not torch.compiler.is_dynamo_compiling():
                self.keys.live.group.check_whole()  # else the mask would be blamed for a chunk that broke off
            padding.check_chunk(new, self.chunk, self.prompt_left)
            self.prompt_left -= new

    def _left_behind(self) -> CacheStateError:
        other = next(layer.layer_idx for layer in self.siblings if layer.is_initialized)
        return CacheStateError(
            f"layer {self.layer_idx} holds no tokens, layer {other} does: the first step was interrupted between them; "
            "reset() empties the cache"
        )

    @not_traced("what runs uncompiled here stays so: Dynamo would split it at the first length")
    def _update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The same, uncompiled: what breaks off in this layer is taken back."""
        cold = not self.is_initialized
        turn: AbstractContextManager[Any] = nullcontext()
        if not cold and isinstance(self.keys, QuantizedKV):
            turn = self.keys.live.group.turn
        with turn:
            length = int(self.cumulative_length)
            try:
                return super().update(key_states, value_states, *args, **kwargs)
            except BaseException:  # Ctrl-C, too
                self._count(length)
                for state in self.states:
                    state.undo(length)
                self.is_initialized = not cold
                raise

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that attention sees, offset of the first): those of ``update``."""
        self.first.masked = True
        if isinstance(self.keys, QuantizedKV) and not torch.compiler.is_dynamo_compiling():
            self.keys.live.group.lockstep = True
            self.keys.live.group.announce()
        return super().get_mask_sizes(query_length) if self.is_initialized else (query_length, 0)

    @property
    def states(self) -> list[KVState]:
        """Key and value state; empty before the first use."""
        return [t.state for t in (self.keys, self.values) if isinstance(t, QuantizedKV) and t.state is not None]

    def reset(self) -> None:
        """Empty the layer; its memory is kept."""
        for state in self.states:
            state.reset()
        self.cumulative_length.zero_()
        self.is_initialized, self.masked, self.padding, self.prompt_left = False, False, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows in place, codes once per pair."""
        for state in self.states:
            state.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back ``-tokens_to_remove`` tokens of this layer; see :meth:`XQuantCache.crop`."""
        tokens_to_remove = minus_tokens(tokens_to_remove)
        if not tokens_to_remove or not self.is_initialized:
            return
        length = max(int(self.cumulative_length.item()) + tokens_to_remove, 0)
        for state in self.states:
            state.check_truncate(length)
        self.truncate(length)

    def truncate(self, length: int) -> None:
        """Keep ``length`` tokens; none: as ``reset()``, since padding is that of the prompt that goes."""
        if not length and self.is_initialized:
            self.reset()
            return
        for state in self.states:
            state.truncate(length)
        self._count(length)

    def _count(self, length: int) -> None:
        """The layer holds ``length`` tokens again, some of a padded prompt that was still being read, maybe."""
        self.cumulative_length.fill_(length)
        if self.prompt_left and self.padding is not None:
            self.prompt_left = max(self.padding.width - length, 0)

    def offload(self) -> None:
        """Not supported: raises CacheStateError."""
        raise CacheStateError(f"layer {self.layer_idx}: a quantized KV cache is moved as a whole: cache.to(device)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: raises CacheStateError."""
        raise CacheStateError(f"layer {self.layer_idx}: rows are repeated in the whole cache: batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: raises CacheStateError."""
        raise CacheStateError(f"layer {self.layer_idx}: rows are selected in the whole cache: batch_select_indices")


def _ignored(query: Tensor) -> None:
    """What a traced prompt's keys do with the query that reads them."""


def minus_tokens(tokens_to_remove: Any) -> int:
    """What ``crop`` is given. Positive numbers once meant the length to keep; transformers 5.24 refuses them, too."""
    try:
        tokens = operator.index(tokens_to_remove)
    except (TypeError, RuntimeError) as error:
        raise ArgumentError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove!r}") from error
    if tokens > 0:
        raise ArgumentError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
    return tokens

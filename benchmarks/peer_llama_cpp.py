"""llama.cpp as one of the ways that ``peers.py`` compares, by the C functions of llama-cpp-python."""

from __future__ import annotations

import ctypes
from pathlib import Path

from peer_ways import WARM_UP, MissingError, Time, Way, need, now, tokens

TILE = 512  # tokens that are evaluated; a longer prompt is copies of them, moved to where they belong


class LlamaCpp(Way):
    """One context of llama.cpp with flash attention. A step is ``llama_decode`` of one token, logits included."""

    def __init__(self, gguf: Path, kind: str, room: int, threads: int) -> None:
        self.api = api = need("llama_cpp")
        self.quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.quiet, None)
        self.model = api.llama_model_load_from_file(str(gguf).encode(), api.llama_model_default_params())
        given = api.llama_context_default_params()
        given.n_ctx, given.n_seq_max, given.kv_unified = room, 2, True
        given.n_threads = given.n_threads_batch = threads
        given.type_k = given.type_v = getattr(api, f"GGML_TYPE_{kind.upper()}")
        given.flash_attn_type = 1  # on: off is slower from 256 tokens on
        self.context = api.llama_init_from_model(self.model, given)
        if not self.context:
            raise MissingError(f"llama.cpp made no context of {room} tokens with a {kind} cache")
        self.memory = api.llama_get_memory(self.context)
        self.instructions = api.llama_print_system_info().decode().strip()
        self.held = 0

    def _decode(self, ids: list[int]) -> None:
        held = (self.api.llama_token * len(ids))(*ids)  # the batch points at it
        batch = self.api.llama_batch_get_one(held, len(ids))
        if found := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode of {len(ids)} tokens at position {self.held} returned {found}")
        self.held += len(ids)

    def _tile(self, context: int) -> None:
        """Copies of the first tokens' state behind them, up to ``context`` tokens."""
        size = self.api.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.context, state, size, 0)
        while self.held < context:
            assert self.api.llama_state_seq_set_data(self.context, state, size, 1) == size
            self.api.llama_memory_seq_add(self.memory, 1, -1, -1, self.held)
            self.api.llama_memory_seq_rm(self.memory, 1, context, -1)
            self.api.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            self.api.llama_memory_seq_rm(self.memory, 1, -1, -1)
            self.held = min(context, self.held + TILE)

    def _fill(self, context: int) -> None:
        if self.held == 0 or self.held < context:
            self.api.llama_memory_clear(self.memory, True)
            self.held = 0
            self._decode(tokens(min(context, TILE)))
            self._tile(context)
        self.api.llama_memory_seq_rm(self.memory, 0, context, -1)
        self.held = context

    def steps(self, context: int, count: int) -> list[Time]:
        """By the clocks, around each step."""
        self._fill(context)
        times = []
        for _ in range(WARM_UP + count):
            begin = now()
            self._decode([0])
            self.api.llama_get_logits(self.context)
            times.append(Time(*(b - a for a, b in zip(begin, now(), strict=True))))
        return times[WARM_UP:]

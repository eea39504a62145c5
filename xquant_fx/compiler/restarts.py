"""Steps that write over tokens of a cache that was taken over.

A new sequence may begin at position 0, without anything having emptied the buffers, or the last tokens are taken back.
Or the buffer rotates, or its tokens are slots in any order, and the old ones are still meant to be seen. The masks
tell: those of a sequence hide all that lies behind its new tokens. Where they do not, or where there is none, or where
the positions of one step do not follow one another, the buffers are given back, before anything is written.

Positions that the program passes in on the CPU are looked at before each step. Computed ones, and those that each row
has of its own, are known after it, by how many tokens are stored then: what is wrong raises. Those on a device would
have to be waited for. There the kernels find the fault (``Fault.RESTARTED``); of rows, masks are looked at in the first
step, and lengths after each only where they do not hide what lies behind a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import KVState
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.compiler.give_back import give_back, groups_of
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.proof import Call
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.graph import size_among_inputs
from xquant_fx.passes.kept_positions import kept
from xquant_fx.passes.records import Detection

REASON = "a position was written to anew while tokens behind it are attended to (a rotating buffer, or slots?)"
SCATTERED = "the positions of one step do not follow one another (a rotating buffer, or slots?)"


class Restarts:
    """Looks at the positions of a compiled graph before each of its steps."""

    def __init__(self, gm: GraphModule, found: Detection, request: Request) -> None:
        self.gm, self.request = gm, request
        places = {node: i for i, node in enumerate(found.gm.graph.find_nodes(op="placeholder"))}
        self.written: dict[int | None, list[int]] = {}
        """Argument index of the first position (None: it is 0) to those of the buffers."""
        self.computed: list[tuple[int, int | tuple[int, int]]] = []
        """Argument indices of buffers whose positions the graph computes, or that have one per row, and how many tokens
        it appends to them: a number, or of which argument and dimension it is the size."""
        self.hides_rows = False
        """Whether masks hid what rows that have positions of their own hold behind them, when one of them first went
        back: idle rows do so in each step. On a device, whose lengths would have to be waited for: in the first step.
        """
        self.looked = False
        for write in found.writes:
            if write.slide is not None:  # which has no positions
                continue
            first = write.positions.start if isinstance(write.positions, slice) else kept(write.positions)
            place = places.get(first) if isinstance(first, Node) else (None if first == 0 else -1)
            place = -1 if write.per_row else place
            if place != -1 and not (place is None and isinstance(first, Node)):
                self.written.setdefault(place, []).append(places.get(write.buffer, -1))
            elif write.buffer in places:
                tokens = write.tokens
                if not isinstance(tokens, int):  # a size that nothing has is not to be had: only less is told then
                    tokens = size_among_inputs(places, tokens) or 0
                self.computed.append((places[write.buffer], tokens))

    @property
    def graph(self) -> Callable[..., Any]:
        """The graph as it was, to be run on buffers that were given back."""
        forward: Callable[..., Any] = self.gm.forward
        return forward

    def give_back(self, args: tuple[Any, ...]) -> bool:
        """Whether the step goes on with old tokens behind its own; then the buffers are ordinary ones again.

        Where a new sequence begins the cache is emptied.
        """
        kept = [arg.state for arg in args if isinstance(arg, QuantizedKV) and arg.state and arg.state.behind]
        if kept and not self._hides_old(args):  # what uncompiled steps wrote before older tokens, that are still seen
            give_back(groups_of(args), REASON, self.request)
            forget_compiled_frame()
            return True
        for state in kept:
            state.behind = None
        back: dict[int, list[KVState]] = {}
        scattered = False
        for place, buffers in self.written.items():
            positions = 0 if place is None else args[place]
            first = _first(positions)
            states = [args[i].live for i in buffers if i >= 0 and isinstance(args[i], QuantizedKV)]
            if first is None or not states or not states[0].group.taken_over:
                continue
            scattered = scattered or _scattered(positions, first)
            if first < states[0].length:
                back.setdefault(first, []).extend(states)
        if not back and not scattered:
            return False
        if not scattered and self._hides_old(args):
            for state in back.get(0, ()):
                state.reset()
            return False
        give_back(groups_of(args), SCATTERED if scattered else REASON, self.request)
        forget_compiled_frame()
        return True

    def before(self, args: tuple[Any, ...]) -> list[tuple[KVState, list[int], int]]:
        """What was taken over and is appended to at computed positions, or at a position per row: a state of each
        cache, the lengths of its rows, new tokens.

        Only on the CPU, where that is to be had without waiting; elsewhere of rows whose old tokens masks do not hide.
        """
        found: dict[int, tuple[KVState, list[int], int]] = {}
        for index, tokens in self.computed:
            buffer = args[index]
            if isinstance(buffer, QuantizedKV) and id(buffer.live.group) not in found:
                state = buffer.live
                if state.group.taken_over and self._is_watched(state, args):
                    new = tokens if isinstance(tokens, int) else args[tokens[0]].shape[tokens[1]]
                    found[id(state.group)] = state, state.row_lengths, new
        return list(found.values())

    def _is_watched(self, state: KVState, args: tuple[Any, ...]) -> bool:
        """Whether a step has to tell how far it went."""
        if not state.spec.ragged:
            return is_host(state)
        if not is_host(state) and not self.looked:
            self.looked, self.hides_rows = True, self._hides_old(args)
        return not self.hides_rows

    def check(self, args: tuple[Any, ...], before: list[tuple[KVState, list[int], int]]) -> None:
        """After the step: where it wrote over old tokens, masks must have hidden those behind.

        Raises:
            CacheStateError: they did not, so what the step gave is wrong.
        """
        back = [
            (past, now)
            for state, pasts, tokens in before
            for past, now in zip(pasts, state.row_lengths, strict=True)
            if now < past + tokens
        ]
        behind = [(past, now) for past, now in back if now < past]  # else the step wrote over all of the old ones
        if not behind and not (back and before[0][0].spec.ragged):
            return
        if self._hides_old(args):
            self.hides_rows = True
        elif behind:
            past, now = behind[0]
            raise CacheStateError(
                "quantized KV cache: a step wrote at a position that the program computes, or at a row's own, before "
                f"the {past} tokens stored; {now} are left, and no mask is recognised that hides the others (a "
                "rotating buffer, or slots?). Its contents are no longer right: reset() it; pass positions in that all "
                "rows have in common, and such buffers stay in full precision"
            )

    def _hides_old(self, args: tuple[Any, ...]) -> bool:
        """Whether the masks of all attentions hide all tokens behind the new ones."""
        found = detect_graph(self.gm, list(args), self.request)
        graph = found.gm.graph
        given = dict(zip(graph.find_nodes(op="placeholder"), args, strict=True))
        call, facts = Call(found.gm, given), Facts(graph)
        sites = [site for site in found.sites if site.is_quantized]
        return all(call.hides_the_rest(site, facts) for site in sites)


def is_host(state: KVState) -> bool:
    """Whether the lengths of ``state`` are read without waiting for a device."""
    return state.group.start.device.type == "cpu"


def _first(positions: Any) -> int | None:
    """The first position; None where it is on a device that would have to be waited for."""
    if isinstance(positions, Tensor):
        return int(positions.reshape(-1)[0]) if positions.device.type == "cpu" else None
    return positions if isinstance(positions, int) else None


def _scattered(positions: Any, first: int) -> bool:
    """Whether positions on the CPU do not follow one another: they go on at the front of the buffer, say."""
    if not isinstance(positions, Tensor) or positions.numel() < 2:
        return False
    flat: list[int] = positions.reshape(-1).tolist()
    return flat != list(range(first, first + len(flat)))

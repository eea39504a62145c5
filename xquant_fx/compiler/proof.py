"""What must be proven of an ordinary buffer before it is taken over, at every call: a graph serves many buffers.

The quantized buffer holds the tokens before the first new one and nothing else. So nobody else may see the buffer, what
lies at the first new position and behind it must be zeros, what lies before it must not, and the new tokens must follow
one another. A rotating buffer, memory slots, or a cache that was not emptied break one of these rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from xquant_fx.cache.aliases import aliases_from, owner_of
from xquant_fx.cache.left import why_kept, why_left
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.storage import share_storage, why_not_alone
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.foresight import foresee, foresee_value
from xquant_fx.passes.forms import NOT_SEEN
from xquant_fx.passes.match_decode import first_tokens, masks_of
from xquant_fx.passes.records import Foresight, Site, Write
from xquant_fx.passes.trace import at_hand, value_of


class Call:
    """The arguments of one call of a graph, and the positions that it is going to write to.

    Args:
        gm: the graph.
        given: placeholders to arguments.
        foresights: how positions are computed, by the nodes that write; what is not there yet is found out.
        originals: tensors whose copies are among the arguments, by the ids of the copies.
    """

    def __init__(
        self,
        gm: GraphModule,
        given: Mapping[Node, Any],
        foresights: Mapping[Node, Foresight] | None = None,
        originals: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.gm, self.given, self.originals = gm, given, originals or {}
        self.foresights = dict(foresights or {})
        self.known: dict[tuple[tuple[Node, ...], tuple[object, ...]], tuple[Any, ...]] = {}

    def refuse(self, node: Node, what: str, facts: Facts) -> str:
        """Why the buffer of the placeholder ``node``, appended to once, cannot be taken over; "" if it can."""
        writes = facts.writes_to(node)
        if len(writes) != 1:  # what is quantized already, and read in part
            return f"{what}: the buffer is appended to {len(writes)} times in this graph, not once"
        (write,) = writes
        self.foresights[write.node] = foresee(write, facts)
        reason = self.why_not(node, write)
        return f"{what}: {reason}" if reason else ""

    def why_kept(self, node: Node) -> str:
        """Why the buffer of the placeholder ``node`` is never taken over; "" if that depends."""
        buffer = self.given.get(node)
        return why_kept(self._original(buffer)) if type(buffer) is Tensor else ""

    def why_not(self, node: Node, write: Write) -> str:
        """As ``refuse``, of a write whose positions can be foreseen already."""
        buffer = self.given.get(node)
        if type(buffer) is not Tensor:
            return _why_not_plain(buffer)
        reason = why_left(buffer) or self._why_seen(buffer) or self.foresight_of(write).reason
        if not reason and write.slide is not None:
            return "" if write.slide.is_prompt else why_not_held(buffer, self.tokens_before(write))
        if reason or not write.per_row:
            return reason or why_not_appended(buffer, self.positions(write))
        rows = enumerate(self.row_positions(write))
        reasons = ((row, why_not_appended(buffer[row : row + 1], positions)) for row, positions in rows)
        return next((f"row {row}: {why}" for row, why in reasons if why), "")

    def _why_seen(self, buffer: Tensor) -> str:
        shown = [alias for t in self._tensors() for alias in aliases_from(t)[:-1] if share_storage(alias, buffer)]
        aliases = len({id(alias) for alias in shown})
        buffer = self._original(buffer)
        others = [self._original(t) for t in self._tensors()]
        if any(share_storage(other, buffer) for other in others if other is not buffer):
            return "another input shares the buffer's memory and would not see what is appended"
        why = why_not_alone(buffer, aliases)
        return f"{why}, which would not see what is appended" if why else ""

    def _tensors(self) -> list[Tensor]:
        return [each for each in self.given.values() if type(each) is Tensor]

    def _original(self, tensor: Tensor) -> Tensor:
        owner = owner_of(tensor)
        return owner_of(self.originals.get(id(owner), owner))

    def foresight_of(self, write: Write) -> Foresight:
        """How the positions of ``write`` are known ahead."""
        return self.foresights[write.node]

    def first_position(self, write: Write) -> int | tuple[int, ...] | None:
        """The first position of ``write``, or of each row; None where the arguments are no real ones."""
        if type(self.given.get(write.buffer)) is not Tensor or self.foresight_of(write).reason:
            return None
        return tuple(self.row_tokens_before(write)) if write.per_row else self.positions(write)[0]

    def hides_the_rest(self, site: Site, facts: Facts) -> bool:
        """Whether a mask of ``site`` hides all tokens behind those that the site's append of keys brings."""
        write = site.key_write
        if write is None or write.slide is not None:  # a window that moves writes over what left it, and nothing else
            return write is not None
        self.foresights[write.node] = foresee(write, facts)
        given = self.given.get(write.buffer)  # whose length may be a symbol in the graph
        length = (given if isinstance(given, Tensor) else value_of(write.buffer)).shape[2]
        rows = self.row_positions(write) if write.per_row else [self.positions(write)]
        past_last = torch.arange(length) > torch.tensor([positions[-1] for positions in rows])[:, None]  # [B or 1, N]
        past_last = past_last[:, : self._read_up_to(site, facts)]
        if not past_last.any():
            return True
        for term in masks_of(site.attention, site.key, site.value):
            foresight = foresee_value(term.node, site.attention.value_reader, facts)
            mask = None if foresight.reason else _computed(self.gm, foresight, self.given)[0]
            if mask is None or mask.dim() == 0 or mask.shape[-1] != past_last.shape[1]:
                continue
            hidden = mask * term.factor <= NOT_SEEN if term.fill is None else mask == term.where
            # Of a mask that all rows have in common what is hidden must be what lies behind any.
            behind = past_last[:, None, None] if mask.dim() == 4 else past_last.any(0)
            if bool((hidden | ~behind.to(hidden.device)).all()):
                return True
        return False

    def _read_up_to(self, site: Site, facts: Facts) -> int | None:
        """How many tokens of the buffer ``site`` reads; None: all."""
        taken = first_tokens(site.attention.key, site.key.root)[1]
        if not isinstance(taken, Node):
            return taken
        foresight = foresee_value(taken, site.attention.key_reader, facts)
        return None if foresight.reason else int(_computed(self.gm, foresight, self.given)[0])

    def row_positions(self, write: Write) -> list[list[int]]:
        """The positions of each row, of a write at a position per row."""
        found: list[list[int]] = self._bounds(write)[0].tolist()
        return found

    def row_tokens_before(self, write: Write) -> list[int]:
        """How many tokens each row holds before a write at a position per row."""
        return [positions[0] for positions in self.row_positions(write)]

    def tokens_before(self, write: Write) -> int:
        """How many tokens the buffer holds before ``write``, which goes on behind them."""
        if write.slide is None:
            return self.positions(write)[0]
        held = self._bounds(write)[0]
        return 0 if held is None else int(_at_hand(held))

    def _bounds(self, write: Write) -> tuple[Any, ...]:
        foresight = self.foresight_of(write)
        key = foresight.nodes, foresight.bounds
        if key not in self.known:
            # Dynamo would guard on a number that is looked at: each step would be judged and compiled by itself.
            given = {node: _at_hand(self.given[node]) for node in foresight.nodes if node in self.given}
            self.known[key] = _computed(self.gm, foresight, given)
        return self.known[key]

    def positions(self, write: Write) -> list[int]:
        """The positions that ``write`` is going to write to, computed on copies of the arguments."""
        values = self._bounds(write)
        if isinstance(write.positions, slice):
            return list(range(int(values[0]), int(values[1])))
        return [int(p) for p in values[0].reshape(-1).tolist()]


def _computed(gm: GraphModule, foresight: Foresight, given: Mapping[Node, Any]) -> tuple[Any, ...]:
    run = Interpreter(gm, garbage_collect_values=False)  # which would look at the whole graph
    with torch.no_grad():
        for node in foresight.nodes:
            if node.op == "placeholder":
                value = given[node]
                run.env[node] = value.clone() if isinstance(value, Tensor) else value
            else:
                run.env[node] = run.run_node(node)
    return tuple(run.env[bound] if isinstance(bound, Node) else bound for bound in foresight.bounds)


def _at_hand(value: Any) -> Any:
    """A number that Dynamo leaves open as it is in this call."""
    return value if (number := at_hand(value)) is None else number


def _why_not_plain(buffer: object) -> str:
    """Why what is no ``Tensor`` itself cannot be taken over; "" of what is quantized, fake, or not there."""
    if not isinstance(buffer, Tensor) or isinstance(buffer, FakeTensor | Dequantized):
        return ""
    return (
        f"the buffer is a {type(buffer).__name__}, a subclass of torch.Tensor, and would not be one any more: "
        "allocate it as a torch.Tensor"
    )


def why_not_appended(buffer: Tensor, positions: list[int]) -> str:
    """Why writing to ``positions`` is no append to ``buffer`` [B, H, N, D], as far as its contents say."""
    first, length = positions[0] if positions else 0, buffer.shape[2]
    if not positions or positions != list(range(first, first + len(positions))) or first < 0:
        return f"positions {_short(positions)} are no tokens that follow one another"
    if positions[-1] >= length:
        return f"positions {_short(positions)} are past the end of a buffer of {length} tokens"
    return why_not_held(buffer, first)


def why_not_held(buffer: Tensor, first: int) -> str:
    """Why ``buffer`` [B, H, N, D] does not hold ``first`` tokens and nothing else, as far as its contents say."""
    if not bool((buffer[0, 0, :first] != 0).any(1).all()):  # one head of one row says it nearly always
        written = (buffer[:, :, :first] != 0).any(3).any(1).any(0)
        if not bool(written.all()):
            gap = int(written.logical_not().nonzero()[0, 0])
            return f"the buffer is empty at position {gap}, before the first that is written, {first} (memory slots?)"
    if not _is_zero(buffer[:, :, first:]):
        return (
            f"the buffer holds numbers at or behind position {first}, the first that is written (a rotating buffer, "
            "memory slots, or a cache that was not emptied: fill it with zeros first)"
        )
    return ""


def _is_zero(x: Tensor) -> bool:
    """Whether all of ``x`` [B, H, N, D] is 0: asked of integers of 64 bits where it can be, six times as fast."""
    a_word = max(8 // x.element_size(), 1)
    if x.stride(3) == 1 and not any(n % a_word for n in (x.shape[3], x.storage_offset(), *x.stride()[:3])):
        words = x.view(torch.int64)
        if torch.equal(words, words.new_zeros(()).expand_as(words)):
            return True
    return not bool(x.any())  # -0.0, say


def _short(positions: list[int]) -> str:
    return str(positions) if len(positions) <= 6 else f"[{', '.join(map(str, positions[:5]))}, ...]"

"""What detection finds: frozen records that later stages act on and ``explain`` prints."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec, Role


@dataclasses.dataclass(frozen=True)
class Slide:
    """How a sliding window moves (``find_slides.py``)."""

    nodes: tuple[Node, ...]
    """What it is spelt with before the node that writes, in program order."""
    whole: Node | None
    """Old and new tokens, which attention reads: of a prompt the new ones. None: it reads the buffer afterwards."""
    old: Any
    """How many tokens of the buffer go with the new ones: a number or a node; 0 of a prompt."""
    is_full: bool
    """Whether the buffer is full before."""

    @property
    def is_prompt(self) -> bool:
        """Whether nothing that the buffer holds is read: it gets the last tokens of a long prompt."""
        return not self.is_full and isinstance(self.old, int) and self.old == 0

    @property
    def first(self) -> Node | None:
        """The first node that reads the buffer; None of a prompt."""
        return None if self.is_prompt else self.nodes[0]


@dataclasses.dataclass(frozen=True)
class Write:
    """An append to a KV buffer: ``buffer[:, :, positions] = x``, ``cat([past, x], dim=2)``, or a window that moves."""

    node: Node
    """The node that writes."""
    buffer: Node
    """Placeholder of the buffer [B, H, N, D], or the node that allocates it; of a concatenation its result."""
    x: Node
    """New tokens, broadcastable to [B, H, q, D]."""
    positions: Node | slice
    """int64 [q], [B, q] where it is ``per_row``, or a slice of tokens (of a concatenation: without bounds; of a window
    that moves: from the number of those that the buffer holds before)."""
    kind: str
    """For people: ``index_copy_``, ``indexed assignment``, ``position per row``, ``concatenation`` or ``sliding
    window``."""
    tokens: Any
    """Number of new tokens q: an int, or symbolic."""
    past: Node | None = None
    """Of a concatenation: what ``x`` is put behind, an input or an empty tensor."""
    kept: Node | None = None
    """Of a concatenation of which the last tokens alone are returned (a sliding window): those."""
    keep: int = 0
    """How many that are; 0: all."""
    slide: Slide | None = None
    """Of a sliding window that moves: how."""
    per_row: bool = False
    """Whether each row of the batch is written at positions of its own."""

    @property
    def moves(self) -> bool:
        """Whether it moves a sliding window whose tokens go on being seen."""
        return self.slide is not None and not self.slide.is_prompt

    @property
    def returned(self) -> Node:
        """Of a concatenation: what the graph returns of it, the cache of the next step."""
        return self.kept or self.node

    @property
    def window(self) -> int:
        """Tokens that a single new one sees, itself included, where only the last are kept; 0: all."""
        return self.keep and self.keep + 1

    @property
    def begins(self) -> bool:
        """Whether it is a concatenation with nothing: a prompt's first step."""
        value = None if self.past is None else self.past.meta.get("example_value")
        return isinstance(value, Tensor) and value.numel() == 0


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, as an einsum: ``equation`` holds the letters of left, right and result."""

    node: Node
    left: Node
    right: Node
    equation: tuple[str, str, str] | None
    """None where the shapes are unknown or the equation is none that is understood."""
    alpha: float = 1.0
    """``baddbmm``: factor of the product."""
    added: Node | None = None
    """``baddbmm``: what is added to it,"""
    beta: float = 1.0
    """and its factor."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: SDPA, flex attention, or a softmax between two matrix products."""

    node: Node
    """The attention op, or the softmax."""
    kind: str
    """For people: ``scaled_dot_product_attention``, ``flex_attention`` or ``softmax between matrix products``."""
    query: Node
    key: Node
    """The key operand, as the attention op or the product takes it."""
    value: Node
    """The value operand."""
    scores: Product | None = None
    """The product of queries and keys, where it is written out."""
    output: Product | None = None
    """The product of weights and values, where it is written out."""
    is_recognised: bool = True
    """False where buffers are appended to and no attention is seen to read them: ``query`` is what is appended then."""

    @property
    def key_reader(self) -> Node:
        """The node that takes the key operand."""
        return self.node if self.scores is None else self.scores.node

    @property
    def value_reader(self) -> Node:
        """The node that takes the value operand."""
        return self.node if self.output is None else self.output.node


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an attention operand comes from."""

    root: Node
    """First node, going back, that is neither a view nor a cast nor a repeat."""
    path: tuple[str, ...]
    """Names of the view-like ops between root and attention, in program order."""
    reader: Node | None = None
    """The view-like op that reads the root; None where the attention reads it itself."""


@dataclasses.dataclass(frozen=True)
class MaskTerm:
    """One change that a mask makes to the scores, in the order of the program."""

    node: Node
    """The mask, or the condition of a fill."""
    fill: float | None
    """None: ``node`` is added to the scores. Else the scores become this number where ``where`` holds."""
    where: bool = True
    """Of a fill: whether it fills where the condition is true, or where it is false."""
    factor: float = 1.0
    """What the added mask is multiplied with, as scales that come after it say."""
    scores: tuple[int, ...] = ()
    """Shape of the scores there."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an operand of rank 4 in the op's order relates to a tensor of the program."""

    order: tuple[int, ...] | None = None
    """Permutation to apply, or None."""
    shape: tuple[int, ...] | None = None
    """Shape to give, or None."""


class HeadPart(NamedTuple):
    """Heads side by side that one call of the op takes: of the query in its order, of keys and of values."""

    query: slice
    keys: slice
    values: slice


@dataclasses.dataclass(frozen=True)
class Pairing:
    """In which calls query heads meet their KV heads."""

    turned: tuple[int, int, int] | None = None
    """(a, b, c): query heads [a, b, c] of the program are taken as [b, a, c]."""
    parts: tuple[HeadPart, ...] = ()
    """Of each call; () if one call takes all heads."""


class Projection(NamedTuple):
    """Rows of a linear layer's weight that make keys or values of latents."""

    linear: Node
    x: Node
    """Its operand, a view of the latents."""
    weight: Node
    """[heads * width, R]."""
    width: int
    """Rows of a head,"""
    first: int
    """of which those from here on are meant,"""
    size: int
    """so many of them."""


class Absorbed(NamedTuple):
    """Linear layers between an attention and the latents that are stored, which its queries absorb."""

    key: Projection
    value: Projection
    query: slice
    """Channels of the query that meet projected latents,"""
    rotary: slice
    """and those that meet the stored rotary keys."""
    rotary_read: tuple[Node, Node]
    """The operand that these are, and what takes it."""
    assembling: tuple[Node, ...]
    """What writes both parts of the keys into one tensor, and runs no more."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """One attention as ``xquant::decode_attention`` takes it."""

    output: Node
    """The node whose value the op computes."""
    query: Node
    scale: float
    softcap: float = 0.0
    terms: tuple[MaskTerm, ...] = ()
    sinks: Node | None = None
    """One logit per head [1, Hq, 1, 1] that joins the softmax without a value."""
    heads: int = 0
    """Query heads."""
    query_layout: Layout = Layout()
    """Permute, then reshape, the query to [B, Hq, q, D]."""
    output_layout: Layout = Layout()
    """Reshape, then permute, the result [B, Hq, q, Dv] to that of ``output``."""
    carriers: frozenset[Node] = frozenset()
    """Nodes that carry the scores, where they are written out."""
    pairing: Pairing = Pairing()
    """Which KV heads the query heads read."""
    absorbed: Absorbed | None = None
    """Of attention to latents."""
    taken: Any = None
    """How many of the first tokens attention reads, where not all of the buffer: a number or a node."""


class Linear(NamedTuple):
    """A linear layer beside an attention, and those of its weights that can rotate."""

    node: Node
    weight: Node
    bias: Node | None


@dataclasses.dataclass(frozen=True)
class Folding:
    """Which linear layers can rotate an attention's values, which are stored rotated."""

    value: Linear | None
    """The one that gives new values; None: they are rotated at each step."""
    output: Linear | None
    """The one that takes the output; None: that is rotated back at each step."""
    reasons: tuple[str, ...]
    """Why there is none, of each that there is not."""


class Refused(NamedTuple):
    """Why a buffer stays as it is."""

    reason: str
    """"" if it does not."""
    of_call: bool = False
    """Whether that is so of the tensors of this call, and may be otherwise of others."""


@dataclasses.dataclass(frozen=True)
class Foresight:
    """The part of a graph that computes the positions of one append."""

    nodes: tuple[Node, ...]
    """In program order: inputs, ops, and what changes any of them in place before the append."""
    bounds: tuple[object, ...]
    """The node of the positions, or both ends of a slice: nodes or numbers."""
    reason: str = ""
    """Why they cannot be known ahead; "" if they can."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention with its KV cache, if it has one: all that was decided, and why."""

    attention: Attention
    key: Source
    value: Source
    key_write: Write | None
    """The append to the key buffer that the attention reads after; None if the graph has none."""
    value_write: Write | None
    buffer_name: str
    """Name of the key buffer in the user's program, for people."""
    has_cache: bool
    """Whether keys or values come from a KV cache at all."""
    is_quantized: bool
    """Whether the buffers are quantized already: inputs, or allocated in this graph."""
    is_latent: bool = False
    """Whether keys or values are computed from what is stored (latent attention), not read as they are."""
    key_is_rotary: bool = False
    """Whether the key buffer holds a part of the keys only, and the rest is computed from the values' latent."""
    allocated_here: bool = False
    """Whether ordinary buffers are allocated in this graph, so that the next step takes them over."""
    reason: str = ""
    """Why the site is left alone; empty where it is rewritten."""
    of_call: bool = False
    """Whether that reason is true of this call's buffers, and others of the same graph may be taken over."""
    form: Decode | None = None
    """How the fused op is called; None where it reads dequantized keys and values."""
    window_tokens: int = 0
    """Tokens that its key buffer has room for, if that is taken for a sliding window's; 0: it is not."""
    is_short_window: bool = False
    """Whether it is left alone as a window that is not longer than what a quantized layer keeps in full precision."""
    dequantized: str = ""
    """Why it reads dequantized keys and values; "" too for a prompt that allocates its cache: it runs uncompiled."""
    folding: Folding | None = None
    """Where values are stored rotated and the op is fused: who rotates."""

    @property
    def rewritable(self) -> bool:
        """Whether the site's cache is or can be quantized."""
        return not self.reason

    @property
    def buffers(self) -> tuple[Node, Node]:
        """The nodes of the key and the value buffer."""
        return self.key.root, self.value.root

    @property
    def stays_ordinary(self) -> bool:
        """Whether the site has a KV cache that stays in full precision, of which people are told."""
        return self.has_cache and not self.rewritable and not self.allocated_here and not self.is_short_window


@dataclasses.dataclass(frozen=True, eq=False)  # by identity: a slice of positions has no hash
class Buffer:
    """One ordinary KV buffer of a graph, to be taken over."""

    node: Node
    index: int | None
    """Number of the graph's argument; None for what grows by concatenation."""
    layer: int
    role: Role
    write: Write
    group: int
    """Which cache of the graph it belongs to, if there are several: number of its plan."""
    foresight: Foresight
    """How to know the positions of ``write`` ahead."""
    rotary: bool = False
    """Whether it holds the rotary part of keys that are computed from latents."""


@dataclasses.dataclass(frozen=True)
class Detection:
    """What was found in one graph, once; passes, takeover and ``explain`` act on it."""

    gm: GraphModule
    """A clone of Dynamo's graph, whose nodes the records name. The passes change it."""
    sites: tuple[Site, ...]
    """One per attention, in program order."""
    writes: tuple[Write, ...]
    """All recognised appends, in program order."""
    written: frozenset[Node]
    """Placeholders that the graph writes to in any way."""
    specs: dict[Node, KVSpec]
    """Of each buffer that is quantized, or is going to be, by node."""
    ordinary: tuple[Buffer, ...] = ()
    """Ordinary buffers that can be taken over,"""
    plans: tuple[Plan, ...] = ()
    """and what they are going to be, one plan for each cache."""
    foresights: dict[Node, Foresight] = dataclasses.field(default_factory=dict)
    """How many tokens windows hold before they move, by the node that moves each."""

    @property
    def left_for_now(self) -> tuple[int, ...]:
        """Numbers of the arguments that stay as they are for what they are in this call; others might not."""
        inputs = self.gm.graph.find_nodes(op="placeholder")
        left = {node for site in self.sites if site.of_call for node in site.buffers}
        return tuple(i for i, node in enumerate(inputs) if node in left)

"""What detection finds: plain records that later stages act on and ``explain`` prints."""

from __future__ import annotations

import dataclasses

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class Write:
    """An append to a KV buffer: ``buffer[:, :, positions] = x``."""

    node: Node
    """The node that writes."""
    buffer: Node
    """Placeholder of the buffer [B, H, N, D]."""
    x: Node
    """New tokens, broadcastable to [B, H, q, D]."""
    positions: Node | slice
    """int64 [q], or a slice of tokens."""
    how: str
    """For people: ``index_copy_`` or ``indexed assignment``."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: SDPA, flex attention, or a softmax between two matrix products."""

    node: Node
    """The attention op, or the softmax."""
    how: str
    """For people: ``scaled_dot_product_attention``, ``flex_attention`` or ``softmax``."""
    query: Node
    key: Node
    """The key operand, as the attention op takes it."""
    value: Node
    """The value operand."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an attention operand comes from."""

    root: Node
    """First node, going back, that is neither a view nor a cast nor a repeat."""
    path: tuple[str, ...]
    """Names of the view-like ops between root and attention, in program order."""


@dataclasses.dataclass
class SiteRecord:
    """One attention site with its KV cache, if it has one: what was decided and why."""

    attention: Attention
    key: Source
    value: Source
    key_write: Write | None = None
    value_write: Write | None = None
    label: str = ""
    """Name of the key buffer in the user's program, for people."""
    has_cache: bool = False
    """Whether keys or values come from a KV cache at all."""
    computed: bool = False
    """Whether keys or values are computed from what is stored (latent attention), not read as they are."""
    deferred: bool = False
    """Whether the buffers are allocated in this graph, so that the next step takes them over."""
    reason: str = ""
    """Why the site is left alone; empty where it is rewritten."""

    @property
    def rewritable(self) -> bool:
        """Whether the site's cache is or can be quantized."""
        return not self.reason

"""What ``explain`` reports of one attention."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention of the model."""

    layer: int | None
    """Index of the quantized layer; None where the site is left alone."""
    name: str
    """The key buffer in the user's program."""
    write: str
    """How the cache is written."""
    read: str
    """Ops between the buffer and the attention, and the attention."""
    rewritten: bool
    reason: str
    """Why it was not rewritten, or how: in words."""
    key_partner: int | None
    """Layer whose key codes this layer reads."""
    value_partner: int | None
    """Layer whose value codes this layer reads."""
    k_bits: float | None
    """Bits of its keys; of latent attention, of their rotary part."""
    v_bits: float | None
    """Bits of its values; of latent attention, of the latent that keys and values are projected from."""
    k_eta: float | None
    """Relaxation of the range of its keys; None: their scheme has none, or scales are fitted to borrowed codes."""
    v_eta: float | None
    """The same of its values."""
    bytes: int
    """Bytes stored for this layer's keys and values, without what it borrows; 0 if a site before counts them."""
    full_bytes: int
    """Bytes of the same buffers in full precision."""
    dequantized: str = ""
    """Why attention reads dequantized keys and values; empty where it reads the codes themselves.

    Empty as well for a prompt that allocates the cache: it runs uncompiled, attending to itself."""
    notes: tuple[str, ...] = ()
    """Where codes were to be shared and are not: why. Where values are stored rotated: who rotates."""

    @property
    def partner(self) -> int | None:
        """Layer whose codes this layer reads, for keys or values; None if it reads its own."""
        return self.key_partner if self.key_partner is not None else self.value_partner

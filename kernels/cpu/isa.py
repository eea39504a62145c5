"""The instruction sets that the C++ kernels are written for: a header each.

To add one: copy ``simd_portable.h``, give it a branch in ``simd.h`` and a row here.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Isa:
    """One instruction set."""

    name: str
    lanes: int
    """32-bit lanes of a vector."""
    header: str
    """Its file beside this one."""
    inductor: str
    """A word of the name that Inductor's ``pick_vec_isa()`` gives it."""

    @property
    def macro(self) -> str:
        """The C++ macro that chooses its header."""
        return f"XQ_ISA_{self.name.upper()}"


#: By name. Inductor's names are "avx512", "avx512 avx512_vnni", "avx512 avx512_vnni amx_tile", "avx2" and "asimd"
#: (which is SVE's, too). What it has no vectors for, or we have no header for, is portable.
ISAS = {
    isa.name: isa
    for isa in (
        Isa("avx512", 16, "simd_avx512.h", "avx512"),
        Isa("avx2", 8, "simd_avx2.h", "avx2"),
        Isa("neon", 4, "simd_neon.h", "asimd"),
        Isa("portable", 4, "simd_portable.h", "INVALID_VEC_ISA"),
    )
}


def named_by_inductor(name: str) -> Isa:
    """The row for a name of Inductor's."""
    words = name.split()
    return next((isa for isa in ISAS.values() if isa.inductor in words), ISAS["portable"])

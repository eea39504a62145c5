"""Where the codes of a scheme are in their words, as constants of C++ kernels that store and load them."""

from __future__ import annotations

from xquant_fx.kernels.cpu.source import array, namespace, sign_table
from xquant_fx.kernels.packing import plane_widths
from xquant_fx.kernels.widths import Field, fields_of, planes, rank_widths


def tables(append: str, bits: float, dim: int) -> str:
    """Planes of codes; constants of ranked keys and of rotated values: where the fields of ranks are, signs.

    ``append`` is that of the scheme.
    """
    ranked = append == "ranked"
    fields = fields_of(planes(bits, dim)) if ranked else [Field(0, 0, 0, 0, 0, False)]
    widths = rank_widths(bits, dim) if ranked else (0,)
    return namespace(
        "// Fields of `width` bits, with `shift` bits of a code below them and `above` above them.\n"
        "struct Plane {\n    int64_t width, shift, above;\n};\n"
        + array("Plane", "PLANES", ["{8, 0, 0}"] if ranked else _planes(int(bits)))
        + "// Bits `shift` and up of the code of a rank, under `mask`, are at `bit` of a word; `first` in it or not.\n"
        "struct Field {\n    int64_t word, rank;\n    uint32_t shift, mask, bit;\n    bool first;\n};\n"
        + array("Field", "FIELDS", ["{" + ", ".join(str(int(x)) for x in field) + "}" for field in fields])
        + array("int32_t", "LARGEST_CODES", [str(2**width - 1) for width in widths])
        + sign_table(dim if append in ("rotated", "folded") else 1)
    )


def _planes(bits: int) -> list[str]:
    rows, above = [], 0
    for width in plane_widths(bits):
        rows.append(f"{{{width}, {bits - above - width}, {above}}}")
        above += width
    return rows

"""Positions, and how new tokens get into the cache: source text over ``K``, ``V`` (buffers), ``k``, ``v`` (new)."""

from __future__ import annotations

import textwrap

#: How a step knows where it writes: lines before the layers. ``pos`` int64 [t] and, if it is drawn, the int ``p``.
POSITIONS = {
    "tensor": "",
    "int": "pos = torch.arange(p, p + t)",
    "scalar tensor": "pos = pos[0] + torch.arange(t)",
    "int32": "pos = pos.to(torch.int32).long()",
    "item": "p = int(pos[0])\npos = torch.arange(p, p + t)",
    "counted": "pos = torch.cumsum(torch.ones_like(pos), 0) - 1 + pos[:1]",
}
#: Positions that give the int ``p``.
HAVE_INT = ("int", "item")

#: How ``{x}`` [B, KV, t, D] is put into the buffer ``{B}``; ``{s}`` are slices before the tokens, dimension ``{d}``.
APPENDS = {
    "index_copy_": "{B}.index_copy_({d}, pos, {x})",
    "indexed": "{B}[{s}pos] = {x}",
    "index_put_": "torch.ops.aten.index_put_({B}, [{n}pos], {x})",
    "by detach": "{B}.detach().index_copy_({d}, pos, {x})",
    "scatter_": "{B}.scatter_({d}, pos[:, None].expand_as({x}), {x})",
    "by row": "{B}[torch.arange(B)[:, None], :, pos.expand(B, t)] = {x}.transpose(1, 2)",
    "index_add_": "{B}[{s}pos] = 0\n{B}.index_add_({d}, pos, {x})",
    "slice": "{B}[{s}p : p + t] = {x}",
    "narrow": "{B}.narrow({d}, p, t).copy_({x})",
    "slice copy_": "{B}[{s}p : p + t].copy_({x})",
    "one by one": "for j in range(t):\n    {B}[{s}p + j] = {x}.select({d}, j)",
}
NEEDS_INT = ("slice", "narrow", "slice copy_", "one by one")
#: The same where each row has positions of its own, ``pos`` [B, t].
RAGGED = {
    "rows": "if t == 1:\n    {B}[torch.arange(B), :, pos[:, 0]] = {x}[:, :, 0]\n"
    "else:\n    {B}[torch.arange(B)[:, None], :, pos] = {x}.transpose(1, 2)",
    "rows of tokens": "{B}[torch.arange(B)[:, None], :, pos] = {x}.transpose(1, 2)",
    "rows and heads": "if t == 1:\n    {B}[torch.arange(B)[:, None], torch.arange(KV), pos] = {x}[:, :, 0]\n"
    "else:\n    {B}[torch.arange(B)[:, None], :, pos] = {x}.transpose(1, 2)",
    "rows by index_put_": "torch.ops.aten.index_put_({B}, [torch.arange(B)[:, None], None, pos], {x}.transpose(1, 2))",
    "rows by scatter_": "{B}.scatter_(2, pos[:, None, :, None].expand(-1, KV, -1, D), {x})",
    "row after row": "for j in range(B):\n    {B}[j].index_copy_(1, pos[j], {x}[j])",
}
#: In place of an append: the cache grows.
CONCATENATE = "K, V = torch.cat([K, k], 2), torch.cat([V, v], 2)"

#: Layout to its shape, [B, KV, N, D] of a buffer, new tokens [B, KV, t, D] in it, and the dimension of tokens.
LAYOUTS = {
    "bhtd": ("(B, KV, N, D)", "{}", "{}", 2),
    "bthd": ("(B, N, KV, D)", "{}.transpose(1, 2)", "{}.transpose(1, 2)", 1),
    "rank 3": ("(B * KV, N, D)", "{}.view(B, KV, -1, D)", "{}.reshape(B * KV, -1, D)", 1),
}


def append(form: str, layout: str) -> str:
    """Lines that append ``k`` to ``K`` and ``v`` to ``V``."""
    if form == "cat":
        return CONCATENATE
    _, _, into, dim = LAYOUTS[layout]
    if form == "by row" and layout != "bhtd":
        form = "indexed"  # batch and tokens are no first and third dimension
    if form == "scatter_" and layout == "bthd":
        form = "index_copy_"  # positions would have to be expanded otherwise
    words = dict(d=dim, s=":, " * dim, n="None, " * dim)
    forms = {**APPENDS, **RAGGED}
    sides = (forms[form].format(B=b, x=into.format(x), **words) for b, x in (("K", "k"), ("V", "v")))
    return "\n".join(sides)


def indented(text: str, by: int) -> str:
    """``text`` moved to the right by ``by`` levels."""
    return textwrap.indent(text, "    " * by)

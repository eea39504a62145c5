"""Positions, and how new tokens get into the cache: source text over ``K``, ``V`` (buffers), ``k``, ``v`` (new)."""

from __future__ import annotations

import textwrap

from fuzz.holders import Holder

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
CONCATENATE = "{B} = torch.cat([{B}, {x}], {d})"
#: Keys and values at once, into the tensor ``{both}`` in which they are stacked along ``{at}``.
TOGETHER = {
    "both": "{both}[{all}pos] = torch.stack([{k}, {v}], {at})",
    "both by index_copy_": "{both}.index_copy_({dim}, pos, torch.stack([{k}, {v}], {at}))",
}

#: Layout to its shape, [B, KV, N, D] of a tensor, new tokens [B, KV, t, D] in it, and the dimension of tokens.
LAYOUTS = {
    "bhtd": ("(B, KV, N, D)", "{}", "{}", 2),
    "bthd": ("(B, N, KV, D)", "{}.transpose(1, 2)", "{}.transpose(1, 2)", 1),
    "rank 3": ("(B * KV, N, D)", "{}.view(B, KV, -1, D)", "{}.reshape(B * KV, -1, D)", 1),
    "tbhd": ("(N, B, KV, D)", "{}.permute(1, 2, 0, 3)", "{}.permute(2, 0, 1, 3)", 0),
    "bhdt": ("(B, KV, D, N)", "{}.transpose(2, 3)", "{}.transpose(2, 3)", 3),
}
#: Of tensors that grow, besides.
GROWN = {
    **LAYOUTS,
    "merged": ("(B, N, KV * D)", "{}.unflatten(-1, (KV, D)).transpose(1, 2)", "{}.transpose(1, 2).flatten(2)", 1),
}


def append(form: str, layout: str, holder: Holder) -> str:
    """Lines that append ``k`` to ``K`` and ``v`` to ``V``."""
    _, _, into, dim = GROWN[layout]
    if form in TOGETHER:
        at = holder.both_at
        dim += dim >= at
        words = dict(both=holder.both, at=at, dim=dim, all=":, " * dim, k=into.format("k"), v=into.format("v"))
        return TOGETHER[form].format(**words)
    if form == "by row" and layout != "bhtd":
        form = "indexed"  # batch and tokens are no first and third dimension
    if form == "scatter_" and layout in ("bthd", "tbhd", "bhdt"):
        form = "index_copy_"  # positions would have to be expanded otherwise
    words = dict(d=dim, s=":, " * dim, n="None, " * dim)
    forms = {**APPENDS, **RAGGED, "cat": CONCATENATE}
    sides = (forms[form].format(B=b, x=into.format(x), **words) for b, x in (("K", "k"), ("V", "v")))
    return "\n".join(sides)


def indented(text: str, by: int) -> str:
    """``text`` moved to the right by ``by`` levels."""
    return textwrap.indent(text, "    " * by)

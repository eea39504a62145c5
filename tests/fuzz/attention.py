"""How the cache is read, masked and attended to: source text.

Over ``K``, ``V`` (the cache), ``q`` [B, HEADS, t, D], ``pos`` [t], ``p`` and ``pad`` [B] they make ``y``.
"""

from __future__ import annotations

#: What attention reads of the cache [B, KV, N, D]: expression over ``{}``.
READS = {
    "whole": "{}",
    "slice": "{}[:, :, : p + t]",
    "narrow": "{}.narrow(2, 0, p + t)",
    "contiguous": "{}.contiguous()",
    "cloned": "{} * 1.0",
}
READS_NEED_INT = ("slice", "narrow")

#: Which tokens are seen: lines that make ``seen``, bool [B or 1, 1, t, total], of ``total`` tokens.
MASKS = {
    "none": "seen = torch.ones(1, 1, t, total, dtype=torch.bool)",
    "causal": "seen = (torch.arange(total) <= pos[:, None])[None, None]",
    "window": (
        "at = torch.arange(total)\n"
        "seen = ((at <= pos[:, None]) & (at > pos[:, None] - 5))[None, None]"
    ),
    "padded": (
        "at = torch.arange(total)\n"
        "seen = (at <= pos[:, None]) & ((at >= pad[:, None, None]) | (at == pos[:, None]))\nseen = seen[:, None]"
    ),
    "table": "seen = torch.ones(N, N, dtype=torch.bool).tril()[pos][None, None, :, :total]",
}  # fmt: skip

#: The same where each row has positions of its own, ``pos`` [B, t].
RAGGED_MASKS = {
    "causal": "seen = (torch.arange(total) <= pos[..., None])[:, None]",
    "window": (
        "at = torch.arange(total)\n"
        "seen = ((at <= pos[..., None]) & (at > pos[..., None] - 5))[:, None]"
    ),
    "padded": (
        "at = torch.arange(total)\n"
        "seen = (at <= pos[..., None]) & ((at >= pad[:, None, None]) | (at == pos[..., None]))\nseen = seen[:, None]"
    ),
    "table": "seen = torch.ones(N, N, dtype=torch.bool).tril()[pos][:, None, :, :total]",
}  # fmt: skip

#: Heads of keys and values beside those of queries: expression over ``{}``, [B, KV, T, D] to [B, HEADS, T, D].
REPEATS = {
    "repeat_interleave": "{}.repeat_interleave(HEADS // KV, 1)",
    "expand": "{}[:, :, None].expand(-1, -1, HEADS // KV, -1, -1).flatten(1, 2)",
    "index": "{}[:, torch.arange(HEADS) // (HEADS // KV)]",
}

LEAST = "torch.finfo(s.dtype).min"
BIAS = "torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, {least})"
#: How ``seen`` is put to scores ``s`` that are written out.
APPLIED = {
    "masked_fill": "s = s.masked_fill(~seen, -torch.inf)",
    "masked_fill, least": f"s = s.masked_fill(~seen, {LEAST})",
    "where": f"s = torch.where(seen, s, {LEAST})",
    "added": f"s = s + {BIAS.format(least='-torch.inf')}",
    "added, least": f"s = s + {BIAS.format(least='torch.finfo(q.dtype).min')}",
    "masked_fill_": "s.masked_fill_(~seen, -torch.inf)",
}
#: The product of queries and keys, [B, HEADS, t, T].
PRODUCTS = {
    "matmul": "s = q @ keys.transpose(2, 3)",
    "einsum": 's = torch.einsum("bhtd,bhnd->bhtn", q, keys)',
    "bmm": "s = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT).view(B, HEADS, t, -1)",
    "baddbmm": "s = torch.baddbmm(torch.zeros(1, 1, 1, dtype=q.dtype), q.flatten(0, 1), keys.flatten(0, 1).mT, "
    "beta=0.5, alpha=1.5).view(B, HEADS, t, -1)",
}
#: What else is done to the scores before the mask,
BEFORE = {
    "nothing": "",
    "scale": "s = s * D**-0.5",
    "divided": "s = s / math.sqrt(D)",
    "softcap": "s = 3.0 * torch.tanh(s / 3.0)",
    "scale, softcap": "s = torch.tanh(s * D**-0.5 / 2.0) * 2.0",
    "alibi": "s = s + (2.0 ** -torch.arange(1, HEADS + 1)).to(s.dtype)[:, None, None] * -torch.arange(total)",
    "clamp": "s = s.clamp(-4, 4)",
    "float": "s = s.float()",
}
#: after it,
AFTER = {
    "nothing": "",
    "largest subtracted": "s = s - s.amax(-1, keepdim=True)",
    "scale": "s = s * 0.9",
}
#: the softmax,
WEIGHTS = {
    "softmax": "w = torch.softmax(s, -1)",
    "float softmax": "w = F.softmax(s, dim=-1, dtype=torch.float32)",
    "sinks": "sinks = self.sinks.to(s.dtype).view(1, HEADS, 1, 1).expand(B, -1, t, 1)\n"
    "w = torch.softmax(torch.cat([s, sinks], -1), -1)[..., :-1]",
    "log_softmax": "w = torch.log_softmax(s, -1).exp()",
    "spelt out": "w = (s - s.amax(-1, keepdim=True)).exp()\nw = w / w.sum(-1, keepdim=True)",
    "softmax, dropout": "w = F.dropout(torch.softmax(s, -1), 0.1, training=False)",
}
#: and the product with the values.
OUTPUTS = {
    "matmul": "y = w.to(q.dtype) @ values",
    "einsum": 'y = torch.einsum("bhtn,bhnd->bhtd", w.to(q.dtype), values)',
    "bmm": "y = torch.bmm(w.to(q.dtype).flatten(0, 1), values.flatten(0, 1)).view(B, HEADS, t, D)",
}
#: The op of torch instead of all that; ``r`` are keys and values with repeated heads.
SDPA = {
    "sdpa": "y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)",
    "sdpa, float mask": f"y = F.scaled_dot_product_attention(q, keys, values, {BIAS.format(least='-3e4')})",
    "sdpa, scale": "y = F.scaled_dot_product_attention(q, keys, values, seen, scale=0.3)",
    "sdpa, gqa": "y = F.scaled_dot_product_attention(q, K_, V_, seen, enable_gqa=True)",
    "sdpa, no mask": "y = F.scaled_dot_product_attention(q, keys, values)",
}

"""Decode steps that every kernel of decode attention is tried on, and how wrong it may be."""

from __future__ import annotations

from typing import Any

import torch

CASES: dict[str, dict[str, Any]] = {
    "float32": dict(dtype="float32"),
    "float16": dict(),
    "bfloat16": dict(dtype="bfloat16"),
    **{
        f"keys {k}, values {v} bits": dict(k_bits=k, v_bits=v)
        for k, v in ((1, 1), (1, 8), (2, 2), (3, 3), (4, 2), (8, 1))
    },
    "4 bits, float32": dict(k_bits=4, v_bits=4, dtype="float32"),
    "8 bits, float32": dict(k_bits=8, v_bits=8, dtype="float32", query=2),
    "3 bits, float32, head_dim 40": dict(k_bits=3, v_bits=3, dtype="float32", dim=40),
    "one query head": dict(group=1, kv_heads=2),
    "3 query tokens": dict(query=3, mask="padded"),
    "8 query tokens": dict(query=8, group=1),
    "more rows than a program takes": dict(query=6, group=4, mask="heads"),
    "batch, heads, padding": dict(batch=2, kv_heads=2, start=(0, 7), mask="padded"),
    "expanded mask": dict(batch=2, kv_heads=2, start=(3, 0), mask="expanded", query=2),
    "no mask": dict(mask="none", dtype="float32"),
    "no mask, softcap, window": dict(mask="none", softcap=2.0, window=40),
    "mask lets through unwritten tokens": dict(mask="row"),
    "a mask a head": dict(mask="heads", kv_heads=2, query=2),
    "alibi": dict(mask="alibi", batch=2, start=(0, 9), query=2),
    "a bias a token": dict(mask="bias", batch=2, dtype="float32"),
    "an empty row": dict(mask="empty", query=2),
    "an empty row with sink logits": dict(mask="empty", query=2, extra=True),
    "rows of the least number": dict(mask="least", query=2, dtype="float32"),
    "softcap": dict(softcap=1.5, dtype="float32", loud=4.0),
    "window in the codes": dict(window=100, query=2),
    "window in the ring": dict(window=20, query=3),
    "sink logits": dict(extra=True, dtype="float32"),
    "sink tokens": dict(sinks=4, batch=2, start=(0, 5), mask="padded", loud=5.0),
    "many sink tokens, window": dict(sinks=40, window=130, dtype="float32"),
    "sinks of tokens to come": dict(sinks=4, start=(151,), mask="none", past=150, query=3),
    "a chunk": dict(query=20, mask="padded", kv_heads=2, batch=2, start=(0, 5)),
    "a chunk, float32": dict(query=33, dtype="float32", group=2, k_bits=4, v_bits=4),
    "a chunk without a mask, softcap, window": dict(query=18, mask="none", softcap=2.0, window=40),
    "a chunk in the window": dict(query=30, window=15, group=1),
    "a chunk, a mask a head, sink logits": dict(query=12, mask="heads", extra=True),
    "a chunk with alibi, small groups": dict(query=17, mask="alibi", k_group=8, v_group=16),
    "a chunk over the sink tokens": dict(query=12, past=3, sinks=20, start=(2,), loud=5.0),
    "a chunk of odd head_dims": dict(query=36, dim=40, v_dim=24, group=3, dtype="float32"),
    "a prompt": dict(query=30, past=0, mask="padded", kv_heads=2, batch=2, start=(0, 4)),
    "a prompt on a long past": dict(query=40, past=430, max_len=480, residual=64, k_group=64),
    "head_dim 8": dict(dim=8, k_bits=1, v_bits=4, group=2),
    "head_dim 8, 8 bits": dict(dim=8, k_bits=8, v_bits=8, dtype="float32"),
    "head_dim 32, 1 bit": dict(dim=32, k_bits=1),
    "head_dim 96": dict(dim=96, query=2),
    "head_dim 96, 4 bits": dict(dim=96, k_bits=4, v_bits=4, dtype="float32"),
    "head_dim 128": dict(dim=128, kv_heads=2, group=2),
    "head_dim 256": dict(dim=256, group=2),
    "another head_dim of values": dict(dim=96, v_dim=64),
    "nothing before": dict(past=0),
    "nothing before, 5 tokens": dict(past=0, query=5, dtype="float32"),
    "less than the window": dict(past=20),
    "one token past the window": dict(past=33, residual=32),
    "whole blocks": dict(past=160),
    "one less than whole blocks": dict(past=159),
    "full": dict(past=199),
    "several tiles a split": dict(past=470, max_len=480, kv_heads=1, batch=2, k_group=64, residual=64),
    "the default lengths": dict(past=400, max_len=420, residual=128, k_group=128, dim=128),
    "groups of 128 in blocks of 256": dict(past=300, max_len=420, residual=256, k_group=128, dtype="float32"),
    "groups below a tile": dict(k_group=8, v_group=16),
    "groups below a tile, 3 bits": dict(k_group=8, v_group=16, k_bits=3, v_bits=3, dim=48, dtype="float32"),
    "groups of one": dict(k_group=1, v_group=8, residual=20, dtype="float32"),
    "odd groups": dict(k_group=24, residual=24, v_group=32),
    "small groups, sink tokens": dict(k_group=4, residual=12, v_group=16, sinks=5, start=(3,)),
    "key windows of several blocks more": dict(residual=64, v_residual=24, sinks=4, dtype="float32"),
    "value windows longer than keys'": dict(residual=32, v_residual=70, query=3, mask="padded"),
    "float32 scales": dict(scale_dtype="float32", dtype="float32", loud=1e6, scale=1e-12),
    "bfloat16 scales": dict(scale_dtype="bfloat16", dtype="bfloat16"),
    **{
        f"one token outweighs all others, {dtype}, {bits} bits": dict(
            peak=peak, past=1500, max_len=1520, residual=64, k_group=64, v_bits=bits, dtype=dtype, kv_heads=heads,
            group=2,
        )
        for dtype, bits, peak, heads in (("float16", 2, 11.2, 8), ("bfloat16", 1, 11.2, 1), ("float32", 2, 15.9, 1))
    },
    "a softcap that hardly caps": dict(softcap=1e5, dtype="float32"),
    "loud channels": dict(loud=100.0, scale=1e-3),
    "quiet values": dict(loud=1e-3, scale=3.0),
}  # fmt: skip

#: What spoils which case: a scale or zero point that is NaN makes the rows that see it NaN.
SPOILED = {
    f"{what}, {k_group} a group": dict(spoil=what, kv_heads=2, batch=1, k_group=k_group, v_group=v_group)
    for what in ("key.zero", "key.scale", "value.zero", "value.scale")
    for k_group, v_group in ((32, None), (8, 16))
}
RANKED_SPOILED = {
    f"ranked, {what}": dict(k_scheme="per_channel_ranked", v_scheme="per_token_rotated", spoil=what, kv_heads=2)
    for what in ("key.scale", "key.center", "value.scale")
}
RANKED_SPOILED |= {
    f"{name}, float16 scales": dict(case, scale_dtype="float16") for name, case in RANKED_SPOILED.items()
}


RANKED: dict[str, Any] = dict(k_scheme="per_channel_ranked", v_scheme="per_token_rotated", residual=64)
#: The same of ranked keys and rotated values.
RANKED_CASES: dict[str, dict[str, Any]] = {
    name: {**RANKED, **case}
    for name, case in {
        "ranked, float32": dict(dtype="float32"),
        "ranked, float16": dict(),
        "ranked, bfloat16": dict(dtype="bfloat16", v_bits=2),
        **{
            f"ranked, head_dim {dim}, keys {k}, values {v} bits": dict(dim=dim, k_bits=k, v_bits=v)
            for dim, k, v in (
                (64, 1.5, 2),
                (64, 3, 1),
                (80, 2, 1),
                (96, 1.5, 2),
                (128, 2, 2),
                (128, 1, 1),
                (128, 4, 4),
                (64, 2, 3),
            )
        },
        "ranked, head_dim 8": dict(dim=8, k_bits=4, v_bits=8, group=2),
        "ranked, head_dim 48, values 24": dict(dim=48, v_dim=24, k_bits=2.5, dtype="float32"),
        "ranked, one query head": dict(group=1, kv_heads=2, dtype="float32", v_bits=2),
        "ranked, 3 query tokens, padding": dict(query=3, batch=2, kv_heads=2, start=(0, 7), mask="padded"),
        "ranked, more rows than a program takes": dict(query=6, mask="heads"),
        "ranked, no mask, softcap, window": dict(mask="none", softcap=2.0, window=100),
        "ranked, alibi, float32": dict(mask="alibi", batch=2, start=(0, 9), query=2, dtype="float32"),
        "ranked, window in the ring": dict(window=20, query=3),
        "ranked, an empty row with sink logits": dict(mask="empty", query=2, extra=True),
        "ranked, sink tokens": dict(sinks=4, batch=2, start=(0, 5), mask="padded", loud=5.0, dtype="float32"),
        "ranked, many sink tokens, window": dict(sinks=40, window=130, v_bits=2),
        "ranked, a chunk, float32, softcap, window": dict(
            query=33, dtype="float32", softcap=2.0, window=60, k_bits=1.5
        ),
        "ranked, a prompt": dict(query=30, past=0, mask="padded"),
        "ranked, nothing before": dict(past=0),
        "ranked, the first value in codes": dict(past=65),
        "ranked, the first key in codes": dict(past=32, dtype="float32"),
        "ranked, full": dict(past=199),
        "ranked, one group in the window": dict(residual=32),
        "ranked, several tiles a split": dict(past=470, max_len=480, batch=2, k_group=64, v_bits=2),
        "ranked, the default lengths": dict(past=500, max_len=520, residual=256, k_group=128, dim=128, v_bits=2),
        "ranked, keys later than values": dict(residual=128, v_residual=32, sinks=4, query=3, dtype="float32"),
        "ranked, keys later, a chunk": dict(query=20, residual=96, v_residual=24, v_bits=2, mask="padded"),
        "ranked, keys or values later, in turns": dict(residual=64, v_residual=48, v_group=16, v_bits=3, window=100),
        "ranked, values that came rotated": dict(
            v_scheme="per_token_folded", residual=96, v_residual=32, v_bits=2, sinks=4, query=3, dtype="float32"
        ),
        "ranked, values that came rotated, a chunk": dict(
            v_scheme="per_token_folded", query=20, v_bits=3, v_group=16, dim=96, mask="padded"
        ),
        "ranked, groups of 96": dict(past=300, max_len=320, residual=96, k_group=96, dtype="float32"),
        "ranked, groups of channels": dict(v_group=16, v_bits=2, dim=96, dtype="float32"),
        "ranked, one token outweighs all others": dict(
            peak=11.2, past=1500, max_len=1520, k_group=64, v_bits=2, kv_heads=2, group=2
        ),
        "ranked, values of 3 bits, groups of channels, float32": dict(v_group=16, v_bits=3, dtype="float32", sinks=4),
        "ranked, float16 scales": dict(scale_dtype="float16", v_bits=2, batch=2, start=(0, 9), mask="padded"),
        "ranked, float16 scales, float32": dict(scale_dtype="float16", v_bits=3, k_bits=1.5, dtype="float32"),
        "ranked, float16 scales, groups of channels": dict(
            scale_dtype="float16", v_group=16, v_bits=2, loud=100.0, scale=1e-3
        ),
        "ranked, token norms": dict(norms=True, batch=2, kv_heads=2, group=2, start=(0, 9), mask="padded", v_bits=2),
        "ranked, token norms, float32, softcap, window": dict(
            norms=True, dtype="float32", softcap=2.0, window=100, sinks=4, dim=80
        ),
        "ranked, token norms, a chunk": dict(norms=True, query=10, group=2, v_bits=2),
        "ranked, loud channels": dict(loud=100.0, scale=1e-3),
        "ranked, quiet values": dict(loud=1e-3, scale=2.0, v_bits=2),
    }.items()
}
#: Their large ones.
RANKED_SLOW = {
    f"ranked, head_dim 256, keys {k}, values {v} bits": {**RANKED, **dict(dim=256, k_bits=k, v_bits=v, kv_heads=2)}
    for k, v in ((2, 2), (1.5, 1), (3, 2))
}
RANKED_SLOW["ranked, a chunk"] = {
    **RANKED, **dict(query=20, mask="padded", kv_heads=2, batch=2, start=(0, 5), v_bits=2),
}  # fmt: skip

#: Cases whose options, one by one, mostly have another case: kernels that take long to build or to interpret leave
#: them to the slow tests. The plain torch kernel runs them all.
REPEATED = {
    "keys 1, values 1 bits", "keys 2, values 2 bits", "keys 3, values 3 bits", "4 bits, float32", "8 bits, float32",
    "3 query tokens", "no mask", "a mask a head", "an empty row", "sink logits", "head_dim 96", "head_dim 128",
    "a chunk without a mask, softcap, window", "a chunk, a mask a head, sink logits", "nothing before",
    "groups below a tile", "ranked, head_dim 64, keys 1.5, values 2 bits",
    "ranked, head_dim 128, keys 2, values 2 bits", "ranked, head_dim 64, keys 2, values 3 bits", "ranked, a prompt",
    "ranked, keys later, a chunk", "ranked, values that came rotated, a chunk", "ranked, groups of channels",
    "ranked, float16 scales", "ranked, token norms, a chunk", "8 query tokens", "expanded mask", "head_dim 32, 1 bit",
    "head_dim 8, 8 bits", "head_dim 96, 4 bits", "several tiles a split", "the default lengths",
    "groups of 128 in blocks of 256", "one token outweighs all others, bfloat16, 1 bits",
    "ranked, head_dim 128, keys 1, values 1 bits", "ranked, bfloat16", "ranked, groups of 96", "ranked, quiet values",
}  # fmt: skip
assert {*CASES, *RANKED_CASES} >= REPEATED

PLAIN: dict[str, Any] = dict(k_scheme="per_channel", v_scheme="per_token", residual=128)
#: Steps whose whole groups have a kernel of their own on NVIDIA's chips (``triton_interior.py``).
WHOLE: dict[str, Any] = dict(
    dim=128, v_bits=2, past=700, max_len=1024, kv_heads=1, group=4, k_group=128, residual=128,
)  # fmt: skip
WHOLE_CASES: dict[str, dict[str, Any]] = {
    name: {**WHOLE, **case}
    for name, case in {
        "whole groups": dict(),
        "whole groups, head_dim 64, 1 bit, small keys": dict(
            dim=64, k_bits=1, v_bits=1, group=2, kv_heads=2, quiet=1e-3, scale=100.0
        ),
        "whole groups, 4 bits, head_dim 96": dict(dim=96, k_bits=4, v_bits=4, mask="none", group=8),
        "whole groups, softcap, window": dict(mask="none", softcap=2.0, window=300, query=2, group=3),
        "whole groups, 16 rows, a mask a head": dict(query=4, mask="heads", max_len=1026),
        "whole groups, 16 rows, head_dim 64, 1 bit, small keys": dict(
            query=4, dim=64, k_bits=1, v_bits=1, quiet=1e-3, scale=100.0
        ),
        "whole groups, 16 rows, 3 bits, groups of 64, small keys": dict(
            query=4, dim=64, k_bits=3, v_bits=3, k_group=64, residual=64, past=360, quiet=1e-3, scale=100.0
        ),
        "whole groups, more rows than a program takes": dict(query=5, mask="padded", start=(300,)),
        "whole groups, an empty row, unwritten tokens": dict(mask="row", past=520),
        "whole groups, none yet": dict(past=250, dim=64),
        "whole groups, 3 bits, groups of 64": dict(k_bits=3, v_bits=3, dim=64, k_group=64, residual=64, past=360),
    }.items()
}
WHOLE_RANKED: dict[str, dict[str, Any]] = {
    name: {**WHOLE, **RANKED, "residual": 256, **case}
    for name, case in {
        "ranked, whole groups": dict(norms=True, residual=384, v_residual=128),
        "ranked, whole groups, head_dim 64, keys 1.5, values 1 bit, small keys": dict(
            dim=64, k_bits=1.5, v_bits=1, quiet=1e-5, scale=1e4
        ),
        "ranked, whole groups, 16 rows, padding": dict(
            query=4, norms=True, residual=384, v_residual=128, start=(300,), mask="padded"
        ),
        "ranked, whole groups, sinks, padding": dict(
            dim=64, sinks=4, start=(150,), mask="padded", query=3, group=2, norms=True
        ),
    }.items()
}
WHOLE_SLOW: dict[str, dict[str, Any]] = {
    name: {**WHOLE, **RANKED, "residual": 256, "past": 1200, "max_len": 1400, **case}
    for name, case in {
        **{
            f"ranked, whole groups, head_dim {dim}, keys {k}, values {v} bits": dict(dim=dim, k_bits=k, v_bits=v)
            for dim, k, v in (
                (128, 4, 4),
                (128, 1, 1),
                (96, 2, 2),
                (48, 2, 2),
                (128, 1.5, 2),
                (64, 3, 4),
                (128, 2.5, 1),
            )
        },
        "ranked, whole groups, sinks, two sequences": dict(
            dim=64, sinks=4, batch=2, start=(0, 150), mask="padded", query=3, norms=True
        ),
        "whole groups, loud": dict(loud=1e3, scale=1e-6, dim=64, k_scheme="per_channel", v_scheme="per_token"),
        "whole groups, bfloat16": dict(dtype="bfloat16", k_scheme="per_channel", v_scheme="per_token"),
        **{
            f"whole groups of {group}, {k} and {v} bits": dict(
                PLAIN, k_bits=k, v_bits=v, dim=64, k_group=group, residual=group, past=400, mask=mask, query=query
            )
            for group, k, v, mask, query in (
                (64, 2, 1, "heads", 3),
                (32, 2, 2, "padded", 1),
                (32, 4, 4, "none", 1),
                (96, 8, 8, "padded", 2),
                (64, 8, 3, "heads", 2),
                (128, 3, 1, "none", 3),
            )
        },
        **{
            f"whole groups of {group}, 16 rows, {k} and {v} bits": dict(
                PLAIN, k_bits=k, v_bits=v, dim=64, k_group=group, residual=group, past=400, mask="heads", query=4
            )
            for group, k, v in (
                (128, 2, 1),
                (128, 2, 3),
                (128, 3, 1),
                (128, 3, 8),
                (96, 8, 8),
                (64, 8, 3),
                (64, 2, 2),
                (32, 2, 2),
                (32, 4, 4),
            )
        },
        **{
            f"ranked, whole groups, 16 rows, keys {k}, values {v} bits": dict(
                k_bits=k, v_bits=v, query=4, mask=mask, norms=True, v_scheme=scheme
            )
            for k, v, mask, scheme in (
                (1.5, 1, "heads", "per_token_rotated"),
                (2, 3, "none", "per_token_folded"),
                (3, 3, "heads", "per_token_rotated"),
                (4, 4, "heads", "per_token_rotated"),
                (2, 8, "none", "per_token_rotated"),
            )
        },
        "whole groups, 12 rows, 3 bits, head_dim 96, softcap": dict(
            PLAIN, k_bits=3, v_bits=3, dim=96, query=3, dtype="bfloat16", softcap=2.0, mask="none"
        ),
        "whole groups, 16 rows, 3 bits, loud": dict(PLAIN, loud=1e3, scale=1e-6, dim=64, k_bits=3, v_bits=3, query=4),
        "whole groups, 3 bits, head_dim 96": dict(PLAIN, k_bits=3, v_bits=3, dim=96),
        "whole groups, head_dim 256": dict(PLAIN, dim=256, past=400, mask="padded"),
        "whole groups, head_dim 256, 8 bits": dict(PLAIN, dim=256, past=400, k_bits=8, v_bits=8, mask="none"),
        "whole groups, head_dim 256, more rows than a program takes": dict(PLAIN, dim=256, past=400, query=3),
        "ranked, whole groups, head_dim 256": dict(dim=256, past=500, v_bits=1, norms=True),
        "ranked, whole groups, values of 3 bits": dict(v_bits=3, past=600, mask="padded", norms=True),
        "ranked, whole groups, 3 bits, groups of 64": dict(
            k_bits=3, v_bits=3, dim=64, k_group=64, past=600, scale_dtype="float16", mask="none"
        ),
        "ranked, whole groups of 32, values of 8 bits": dict(v_bits=8, dim=64, k_group=32, past=600),
        "whole groups, 3 bits, loud": dict(PLAIN, loud=1e3, scale=1e-6, dim=64, k_bits=3, v_bits=3),
        "ranked, whole groups, loud": dict(loud=100.0, scale=1e-3),
        "ranked, whole groups, 12 rows, many channels without bits, loud": dict(
            query=3, k_bits=1, loud=100.0, scale=1e-3
        ),
        "ranked, whole groups, 16 rows, head_dim 64, small keys": dict(query=4, dim=64, quiet=1e-5, scale=1e4),
        "ranked, whole groups, 16 rows, keys 2.5 bits, softcap": dict(
            query=4, k_bits=2.5, mask="none", softcap=2.0, norms=True
        ),
        "ranked, whole groups, 12 rows, keys 3 bits, float16 scales": dict(
            query=3, dim=96, k_bits=3, scale_dtype="float16"
        ),
        "ranked, whole groups, values of rotated weights": dict(v_scheme="per_token_folded", dim=64, query=3),
        "ranked, whole groups, quiet": dict(loud=1e-3, scale=2.0),
        "ranked, whole groups, one token outweighs all others": dict(peak=11.2),
        "ranked, whole groups, an empty row with sink logits": dict(query=2, mask="empty", extra=True),
        "ranked, whole groups, 32 rows, a mask a head": dict(query=8, mask="heads", kv_heads=2, batch=2),
        "ranked, whole groups, bfloat16": dict(dtype="bfloat16"),
        "ranked, whole groups, float16 scales": dict(dim=96, scale_dtype="float16", k_bits=3),
    }.items()
}
WHOLE_SPOILED = {
    **{f"whole groups, {what}": {**WHOLE, "dim": 64, "spoil": what} for what in ("key.zero",)},
    **{f"ranked, whole groups, {what}": {**WHOLE, **RANKED, "residual": 256, "dim": 64, "spoil": what}
       for what in ("value.scale",)},
}  # fmt: skip

#: Of ranked keys a logit is a sum of five parts (three planes of codes, mid points, the center), each of which rounds
#: at its own size before they cancel.
RANKED_ROUNDINGS = 32


#: Rows of lengths of their own, ``pasts`` before the step: by the kernel that reads everything,
ROW_CASES: dict[str, dict[str, Any]] = {
    "rows": dict(pasts=[150, 0, 33, 199], mask="padded", dim=32, group=2),
    "rows, no mask, softcap, window, 3 query tokens": dict(
        pasts=[150, 20, 197], query=3, mask="none", softcap=2.0, window=40, dim=32, group=2
    ),
    "rows, alibi, sink logits, float32": dict(pasts=[150, 3], mask="alibi", query=2, dtype="float32", extra=True),
    "rows, a chunk": dict(pasts=[120, 0, 40], query=20, mask="padded", kv_heads=2),
    "rows, ranked, sinks, padding, token norms": dict(
        RANKED, pasts=[196, 0, 66], start=[9, 0, 2], sinks=4, norms=True, mask="padded", query=3, v_bits=2, group=2
    ),
}
#: and by that of whole groups beside it.
WHOLE_ROWS: dict[str, dict[str, Any]] = {
    name: {**{key: value for key, value in WHOLE.items() if key != "past"}, **case}
    for name, case in {
        "rows, whole groups": dict(pasts=[270, 0], mask="padded", dim=64, v_bits=1, group=2),
        "rows, whole groups, a full one, one without any": dict(pasts=[140, 1023]),
        "rows, whole groups, 16 rows, a mask a head": dict(pasts=[700, 1020], query=4, mask="heads"),
        "rows, whole groups, ranked, sinks, padding": dict(
            RANKED, residual=256, dim=64, pasts=[900, 260], start=[150, 0], sinks=4, mask="padded", query=3, group=2,
            norms=True,
        ),
    }.items()
}  # fmt: skip
ROWS_QUICK = ("rows", "rows, no mask, softcap, window, 3 query tokens", "rows, whole groups")


def allowed(result: dict[str, Any], case: dict[str, Any], roundings: int | None = None) -> float:
    """Three times the error of the fp32 reference, and not below what any order of summing may cost.

    Two sums of n terms in different orders differ by some roundings of their largest partial sum, and
    the reference's luck in one case is no bound: 8 roundings in float32 of the largest output, and one
    of the output's own dtype. ``roundings`` is for kernels that round otherwise; ``case`` is what ``Setup`` takes.
    """
    eps = torch.finfo(getattr(torch, case.get("dtype", "float16"))).eps
    if roundings is None:
        roundings = RANKED_ROUNDINGS if case.get("k_scheme") == "per_channel_ranked" else 8
    return 3 * result["usual"] + result["largest"] * (roundings * 2.0**-23 + eps / 2)

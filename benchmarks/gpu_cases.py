"""What ``gpu_kernels.py`` times: arguments of one decode step, whose numbers mean nothing, and full precision.

A batch is written as so many times the KV heads: the same programs read the same bytes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_triton_compile import decode_arguments

from xquant_fx.kernels.decode_attention.arguments import DecodeArguments

#: Settings by what ``decode_arguments`` takes.
SETTINGS: dict[str, dict[str, Any]] = {
    "2/2 bits": dict(k_bits=2, v_bits=2),
    "xquant-2.2": dict(ranked=True, k_bits=2, v_bits=2, residual=384, v_residual=128),
    "2/1 bits": dict(k_bits=2, v_bits=1),
    "xquant-1.7": dict(ranked=True, k_bits=2, v_bits=1, residual=384, v_residual=128),
    "4/4 bits": dict(k_bits=4, v_bits=4),
}
HEADS = 8
#: The step that the project is measured by.
BAR: dict[str, Any] = dict(length=131072, batch=8, group=4)
#: Rows of lengths of their own: tokens of each before the step.
ROWS: dict[str, Any] = dict(length=4096, batch=1, group=4, pasts=(4000, 0, 1300, 127))
Case = dict[str, Any]


def cases() -> list[Case]:
    """All steps, the ones that matter most first."""
    made = [dict(BAR, setting=name) for name in SETTINGS]
    main = ("2/2 bits", "xquant-2.2")
    for name in main:
        made += [dict(BAR, setting=name, mask=None), dict(BAR, setting=name, query=8)]
        made += [dict(BAR, setting=name, batch=1), dict(BAR, setting=name, dim=64), dict(BAR, setting=name, group=1)]
        made += [dict(BAR, setting=name, length=n) for n in (32768, 8192, 2048, 512)]
        made += [dict(BAR, setting=name, length=4096, max_len=131072), dict(BAR, setting=name, batch=1, length=8192)]
    made += [dict(BAR, setting="2/2 bits", k_group=32, v_group=32), dict(BAR, setting="2/2 bits", dim=256)]
    return made + [dict(BAR, setting=name, query=n) for name in main for n in (2, 4)]


def row_cases() -> list[Case]:
    """Steps that are checked, not timed: rows of lengths of their own."""
    return [dict(ROWS, setting=name) for name in ("2/2 bits", "xquant-2.2")]


def filled(t: Tensor, device: str, numbers: torch.Generator | None) -> Tensor:
    """A tensor of the shape and dtype of ``t``: any codes, scales of about 1, all of a mask true."""
    if t.dtype == torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, t.shape, dtype=t.dtype, device=device, generator=numbers)
    if t.dtype == torch.uint8:
        return torch.full(t.shape, 0x50, dtype=t.dtype, device=device)
    if t.dtype == torch.bool:
        return torch.ones(t.shape, dtype=t.dtype, device=device)
    return torch.zeros(t.shape, dtype=t.dtype, device=device) + (0 if t.dtype == torch.int64 else 0.01)


def step(case: Case, device: str) -> DecodeArguments:
    """Arguments of a decode step after ``length`` tokens less those of the step itself, or after ``pasts``."""
    others = ("setting", "length", "batch", "pasts")
    given = {**SETTINGS[case["setting"]], **{k: v for k, v in case.items() if k not in others}}
    given.setdefault("max_len", case["length"])
    query, pasts = given.get("query", 1), case.get("pasts", ())
    a = decode_arguments(**given, kv_heads=HEADS * case["batch"], rows=len(pasts) or 1)
    if device == "meta":
        return a
    numbers = torch.Generator(device).manual_seed(0)
    a = a.mapped(lambda t: filled(t, device, numbers))
    past = torch.tensor(pasts or [case["length"] - query], device=device)
    if pasts:
        a = a.replace(mask=torch.arange(a.max_len, device=device) <= past[:, None, None, None])
    if a.k_order is not None:
        ranks = torch.arange(a.q.shape[3], dtype=torch.int32, device=device).expand(a.k_order.shape).contiguous()
        a = a.replace(k_order=ranks)
    return a.replace(past=past)


def bytes_read(case: Case) -> tuple[int, int]:
    """Bytes that a step reads: of codes with scales and mask, and in 16 bits."""
    a = step(case, "meta")
    share = case["length"] / a.max_len
    stored = [t for name, t in a.tensors.items() if name.split("_")[-1] in ("codes", "scale", "zero", "norm")]
    mask = 0 if a.mask is None else a.mask.numel() * a.k_codes.shape[1]
    own = sum(t.numel() * t.element_size() for t in stored)
    full = 2 * case["length"] * a.k_codes.shape[1] * (a.k_ring.shape[3] + a.v_ring.shape[3])
    return int((own + mask) * share), full


def copies(case: Case, least: float = 256e6) -> int:
    """How many sets of arguments are read in turns, so that none is in the level-2 cache from the turn before."""
    return max(1, math.ceil(least / bytes_read(case)[0]))


def full_precision(case: Case, device: str) -> dict[str, Callable[[], Tensor]]:
    """Torch's ways to attend to bfloat16 keys and values, by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, dim, query = HEADS * case["batch"], case.get("dim", 128), case.get("query", 1)
    shape = (case["batch"], HEADS, case["length"], dim)
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(case["batch"], HEADS * case["group"], query, dim, device=device, dtype=torch.bfloat16)
    grouped = q.view(case["batch"], HEADS, -1, dim)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def by(backend: Any, q: Tensor, enable_gqa: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, enable_gqa=enable_gqa)

        return run

    assert heads == k.shape[0] * k.shape[1]
    return {
        # Query heads of one KV head as rows of one head: what reads keys once, whatever the back end does with groups.
        "flash, grouped": by(SDPBackend.FLASH_ATTENTION, grouped, False),
        "flash": by(SDPBackend.FLASH_ATTENTION, q, True),
        "cudnn": by(SDPBackend.CUDNN_ATTENTION, grouped, False),
        "matmul": lambda: torch.softmax((grouped @ k.transpose(-1, -2)) * dim**-0.5, -1) @ v,
    }

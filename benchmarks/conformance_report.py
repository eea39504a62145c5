"""docs/conformance.md: the records of ``conformance.py`` as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import transformers

HEAD = """# Conformance

What `make conformance` found with torch {torch} and transformers {transformers}: a tiny random model of each of {of}
architectures of `MODEL_FOR_CAUSAL_LM_MAPPING` ({done} examined), an `XQuantCache`, a prompt in eager code, then decode
steps whose rewritten graphs run op by op. Errors are relative, of logits, beside eager code with a `StaticCache`, or
with an `XQuantCache` of 16 bits where it is said that the other is off: such a model takes a buffer for the text. The
bytes at 4 bits are of 40 tokens with windows of 8. `docs/conformance.json` has the same for programs;
`tests/test_conformance.py` fails where less is quantized or fused than is recorded there.

{sums}

"""
COLUMNS = (
    "architecture", "attentions with a cache", "quantized", "fused", "error at 16 bits", "same tokens",
    "error at 4 bits", "bytes, of full precision", "left, and why",
)  # fmt: skip


def page(rows: Mapping[str, Mapping[str, Any]], of: int) -> str:
    """The page, with what the rows sum up to."""
    head = HEAD.format(
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        of=of,
        done=len(rows),
        sums=sums(rows),
    )
    head += f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    return head + "".join(row(name, record) for name, record in rows.items())


def sums(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What all architectures come to."""
    runs = [r for r in rows.values() if not r.get("eager", "not run")]
    total = {name: sum(r.get(name, 0) for r in runs) for name in ("sites", "quantized", "fused")}
    exact = [r for r in runs if r.get("error at 16 bits", 1) < 1e-4 and r.get("same tokens")]
    failed = [name for name, r in rows.items() if "error" in r]
    refused = sum(r.get("refused by self_check", 0) for r in runs)
    reasons: Counter[str] = Counter()
    for record in runs:
        reasons.update(record.get("left", {}))
    lines = [
        f"- run in eager code with a static cache: {len(runs)} of {len(rows)}",
        f"- attentions with a cache: {total['sites']}; quantized: {total['quantized']}; fused: {total['fused']}",
        f"- exact at 16 bits, with the same greedy tokens: {len(exact)} of {len(runs)}",
        f"- graphs that a self-check refused: {refused}; errors: {', '.join(failed) or 'none'}",
        *(f"- left {count} times: {reason}" for reason, count in reasons.most_common()),
    ]
    return "\n".join(lines)


def row(name: str, record: Mapping[str, Any]) -> str:
    """One line of the table."""
    if record.get("eager"):
        return f"| {name} | | | | | | | | eager code fails: {_cell(record['eager'])} |\n"
    why = [record[key] for key in ("error",) if key in record]
    if "off with a StaticCache" in record:
        why.append(f"eager code with a StaticCache is off by {record['off with a StaticCache']}")
    why += [f"{count}x {reason}" for reason, count in record.get("left", {}).items()]
    why += [f"{count}x reads dequantized: {reason}" for reason, count in record.get("read dequantized", {}).items()]
    stored, full = record.get("bytes"), record.get("bytes in full precision")
    cells = (
        record.get("sites", ""), record.get("quantized", ""), record.get("fused", ""),
        record.get("error at 16 bits", ""), {True: "yes", False: "no"}.get(record.get("same tokens"), ""),
        record.get("error at 4 bits", ""), f"{stored:,} of {full:,}" if stored else "", _cell("; ".join(why)),
    )  # fmt: skip
    return f"| {name} | {' | '.join(map(str, cells))} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "/")[:400]

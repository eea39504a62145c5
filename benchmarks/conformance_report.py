"""docs/conformance.md: the records of ``conformance.py`` as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HEAD = """# Conformance

What `make conformance` found with torch {torch} and transformers {transformers}: a tiny random model of each of {of}
architectures of `MODEL_FOR_CAUSAL_LM_MAPPING` ({done} examined), a prompt in eager code that is longer than sliding
windows are, then decode steps, of which some run in eager code and the others by rewritten graphs, op by op. Errors are
relative, of logits, beside eager code with a cache of transformers; where such a cache is off, as it is in a model that
takes a buffer for the text, the table says so. The first columns are those of an `XQuantCache`, whose bytes at 4 bits
are of 80 tokens with windows of 8; the next two of caches that the backend takes over: attentions that are quantized,
of those found. The last one is of `model.compile(backend="xquant")` and nothing else: prompt and steps compiled, at 4
bits, with a `DynamicCache`, and how far logits are off; each rewritten graph was compared with the program's at 16
bits. `docs/conformance.json` has all reasons; `tests/test_conformance.py` fails where less is quantized or fused than
is recorded there.

{sums}

"""
COLUMNS = (
    "architecture", "attentions with a cache", "quantized", "fused", "error at 16 bits", "same tokens",
    "error at 4 bits", "bytes, of full precision", "left, and why", "StaticCache", "DynamicCache",
    "one line",
)  # fmt: skip
#: Caches of transformers, which the backend takes over.
TAKEN_OVER = ("StaticCache", "DynamicCache")
#: The program of one line.
ONE_LINE = "one line"
OTHERS = (*TAKEN_OVER, ONE_LINE)
EXACT = 1e-4


def write(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """Both files, in the order of the mapping."""
    rows = {name: records[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in records}
    (folder / "conformance.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "conformance.md").write_text(page(rows, len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))


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
    """What all architectures come to, with each kind of cache."""
    parts = [_sums("XQuantCache", {name: r for name, r in rows.items() if "eager" in r})]
    parts += [_sums(kind, {name: r[kind] for name, r in rows.items() if kind in r}) for kind in OTHERS]
    return "\n\n".join(part for part in parts if part)


def _sums(kind: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    runs = {name: r for name, r in rows.items() if not r.get("eager")}  # where it took too long nothing is known
    total = {name: sum(r.get(name, 0) for r in runs.values()) for name in ("sites", "quantized", "fused")}
    exact = [name for name, r in runs.items() if r.get("error at 16 bits", 1) < EXACT and r.get("same tokens")]
    exactly = kind != ONE_LINE
    failed = [name for name, r in rows.items() if "error" in r]
    refused = sum(r.get("refused by self_check", 0) for r in runs.values())
    reasons: Counter[str] = Counter()
    for record in runs.values():
        reasons.update(record.get("left", {}))
    other = ", ".join(name for name in runs if name not in exact) or "none"
    again = ", ".join(name for name, r in runs.items() if r.get("later graphs")) or "none"
    lines = [
        f"{kind}:",
        "",
        f"- run in eager code: {len(runs)} of {len(rows)}",
        f"- attentions with a cache: {total['sites']}; quantized: {total['quantized']}; fused: {total['fused']}",
        *([f"- exact at 16 bits, with the same greedy tokens: {len(exact)} of {len(runs)}; others: {other}"] * exactly),
        f"- errors: {', '.join(failed) or 'none'}",
        *([f"- graphs that a self-check refused: {refused}"] * (kind not in TAKEN_OVER)),
        *([f"- compiled anew after the first step: {again}"] * (not exactly)),
        *(f"- left {count} times: {reason}" for reason, count in reasons.most_common()),
    ]
    return "\n".join(lines)


def row(name: str, record: Mapping[str, Any]) -> str:
    """One line of the table."""
    others = [_other(record.get(kind, {})) for kind in OTHERS]
    if record.get("eager", "not examined"):
        why = [f"eager code fails: {record['eager']}"] if "eager" in record else []
    else:
        why = [f"error: {record['error']}"] if "error" in record else []
        why += [f"eager code with a {kind} fails" for kind in TAKEN_OVER if f"{kind} fails" in record]
        off = {kind: record.get(f"off with a {kind}") for kind in TAKEN_OVER}
        why += [f"eager code with a {kind} is off by {error}" for kind, error in off.items() if error]
        why += [f"{count}x {reason}" for reason, count in record.get("left", {}).items()]
        why += [f"{count}x reads dequantized: {reason}" for reason, count in record.get("read dequantized", {}).items()]
    stored, full = record.get("bytes"), record.get("bytes in full precision")
    cells = (
        record.get("sites", ""), record.get("quantized", ""), record.get("fused", ""),
        record.get("error at 16 bits", ""), {True: "yes", False: "no"}.get(record.get("same tokens"), ""),  # type: ignore[call-overload]
        record.get("error at 4 bits", ""), f"{stored:,} of {full:,}" if stored else "", _cell("; ".join(why)), *others,
    )  # fmt: skip
    return f"| {name} | {' | '.join(map(str, cells))} |\n"


def _other(record: Mapping[str, Any]) -> str:
    """A cell for one of the other caches."""
    if record.get("eager"):
        return "eager code fails"
    if "error" in record:
        return _cell(f"error: {record['error']}")
    if "sites" not in record:
        return ""
    error = record.get("error at 16 bits", record.get("error at 4 bits"))
    off = "" if error < EXACT else f", off by {error}"
    return f"{record['quantized']} of {record['sites']}{off}"


def _cell(text: str) -> str:
    return text.replace("|", "/")[:400]

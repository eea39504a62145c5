"""Graphs as text, for people: files in a folder, and artifacts of torch's structured trace (``TORCH_TRACE``).

Relied on: ``torch._logging.trace_structured``. Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import Tensor
from torch._logging import trace_structured  # type: ignore[attr-defined]
from torch.fx import GraphModule

_numbers = itertools.count()


def begin(gm: GraphModule, folder: Path | None) -> str:
    """Dump ``gm`` as it is before the first pass; returns the number that its later dumps begin with."""
    number = f"{next(_numbers):03d}"
    graph(gm, f"{number}-0-detected", folder)
    return number


def graph(gm: GraphModule, name: str, folder: Path | None) -> None:
    """Dump ``gm`` under ``name``; nothing is rendered where nobody looks."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"xquant_{name}", "encoding": "string"},
        payload_fn=lambda: text_of(gm),
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text_of(gm))


def text_of(gm: GraphModule) -> str:
    """The graph, one line per node, with shapes and dtypes."""
    lines = []
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        tensor = isinstance(value, Tensor)  # a DeviceMesh has a shape, too
        kind = f"  # {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if tensor else ""
        lines.append(f"{node.format_node()}{kind}")
    return "\n".join(lines) + "\n"

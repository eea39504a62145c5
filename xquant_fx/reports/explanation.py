"""``explain``: what the backend does to each attention of a model, and why."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.allocate import planned_spec, quantized_empty
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler.backend import is_quantized, judge, report_left, takeover_config
from xquant_fx.compiler.options import parse
from xquant_fx.compiler.takeover import buffers_of, plan_buffers
from xquant_fx.passes.find_sites import label_of, written_inputs
from xquant_fx.passes.find_writes import find_writes
from xquant_fx.passes.match_decode import match_decode
from xquant_fx.passes.records import SiteRecord
from xquant_fx.passes.trace import fake
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.spec import KVSpec
from xquant_fx.reports.tables import render


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention of the model."""

    layer: int | None
    """Number of the quantized layer; None where the site is left alone."""
    name: str
    """The key buffer in the user's program."""
    write: str
    """How the cache is written."""
    read: str
    """Ops between the buffer and the attention, and the attention."""
    rewritten: bool
    reason: str
    """Why it was not rewritten, or how: in words."""
    key_partner: int | None
    """Layer whose key codes this layer reads."""
    value_partner: int | None
    """Layer whose value codes this layer reads."""
    k_bits: int | None
    """Bits of the buffer that the cache calls keys (latent attention may keep something else in it)."""
    v_bits: int | None
    """Bits of the buffer that the cache calls values."""
    bytes: int
    """Bytes stored for this layer's keys and values, without what it borrows; 0 if a site before counts them."""
    full_bytes: int
    """Bytes of the same buffers in full precision."""
    dequantized: str = ""
    """Why attention reads dequantized keys and values; empty where it reads the codes themselves.

    Empty as well for a prompt that allocates the cache: it runs uncompiled, attending to itself."""

    @property
    def partner(self) -> int | None:
        """Layer whose codes this layer reads, for keys or values; None if it reads its own."""
        return self.key_partner if self.key_partner is not None else self.value_partner


@dataclasses.dataclass
class Explanation:
    """What ``explain`` found: ``sites`` for programs, ``print()`` or ``str()`` for people."""

    sites: list[Site]
    graphs: int
    """Graphs that Dynamo made of the model; more than one means graph breaks."""

    def __str__(self) -> str:
        columns = ["layer", "buffer", "write", "read", "rewritten", "K bits", "V bits", "codes of", "bytes", "reason"]
        rows = [_row(site) for site in self.sites]
        done = sum(site.rewritten for site in self.sites)
        note = f"{done} of {len(self.sites)} attention sites rewritten, in {self.graphs} graph(s)"
        return render("xquant", columns, rows, note)

    def print(self) -> None:
        """Print the table."""
        print(self)


def explain(
    model: Any, *args: Any, mode: str | None = None, options: dict[str, Any] | None = None, strict: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Trace one call of ``model(*args, **kwargs)`` and say what the backend does to each attention.

    The call runs uncompiled on deep copies of the arguments, and buffers that the model itself holds
    are put back, so that no cache is advanced. The cache matters: pass the kind you generate with.
    Like ``torch._dynamo.explain`` this resets Dynamo, so that compiled functions compile anew at
    their next call.

    Args:
        model: a module or function, compiled or not.
        mode, options: as for ``torch.compile(backend="xquant")``; they decide for caches that are
            not an XQuantCache.
        strict: raise if a KV cache is found and not rewritten.

    Raises:
        NotRewrittenError: under ``strict``.
    """
    request = parse(mode, {**(options or {}), **({"strict": True} if strict else {})})
    seen: list[tuple[GraphModule, list[SiteRecord], XQuantConfig]] = []
    held = Held(model)

    def record(gm: GraphModule, inputs: list[Any]) -> Any:
        seen.append((gm, judge(gm, inputs, request), takeover_config(gm, request)))
        held.save(gm, inputs)
        return gm.forward

    function = getattr(model, "_orig_mod", model)
    function = function.forward if isinstance(function, torch.nn.Module) else function
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(function, backend=record)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    finally:
        held.restore()
        torch._dynamo.reset()
    report_left([s for _, sites, _ in seen for s in sites], request)
    return Explanation([site for found in seen for site in _sites(*found)], len(seen))


class Held:
    """Tensors that a model itself holds (KV buffers of modules), to be put back after a trial run."""

    def __init__(self, model: Any) -> None:
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        values = (value for m in modules for value in (*m._buffers.values(), *vars(m).values()))
        self.ids = {id(value) for value in values if isinstance(value, Tensor)}
        self.saved: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def save(self, gm: GraphModule, inputs: list[Any]) -> None:
        """Copy what ``gm`` is about to write to, unless an earlier graph of the same call did."""
        written = written_inputs(gm.graph)
        for node, tensor in zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True):
            if node in written and id(tensor) in self.ids and id(tensor) not in self.saved:
                self.saved[id(tensor)] = tensor, {name: part.clone() for name, part in _parts(tensor).items()}

    def restore(self) -> None:
        """Write the copies back."""
        with torch.no_grad():
            for tensor, saved in self.saved.values():
                for name, part in _parts(tensor).items():
                    part.copy_(saved[name])
                if isinstance(tensor, QuantizedKV):
                    tensor._live().group.drop()


def _parts(tensor: Tensor) -> dict[str, Tensor]:
    return tensor._live().owned if isinstance(tensor, QuantizedKV) else {"": tensor}


def _sites(gm: GraphModule, records: list[SiteRecord], config: XQuantConfig) -> list[Site]:
    specs = _planned_specs(gm, [r for r in records if r.rewritable and not is_quantized(r)], config)
    writers = {w.node: w.buffer for w in find_writes(gm.graph) if w.how == "index_copy_"}
    sites, counted = [], set()
    for record in records:
        site, buffers = _site(record, specs), {record.key.root, record.value.root}
        if site.rewritten:
            site = dataclasses.replace(site, dequantized=_why_dequantized(record, specs, writers))
        sites.append(dataclasses.replace(site, bytes=0, full_bytes=0) if buffers <= counted else site)
        counted |= buffers
    return sites


def _planned_specs(gm: GraphModule, records: list[SiteRecord], config: XQuantConfig) -> dict[Node, KVSpec]:
    """Specs of quantized buffers as they are, of ordinary ones as they are going to be."""
    specs: dict[Node, KVSpec] = {}
    for node in gm.graph.nodes:
        value = fake(node)
        if isinstance(value, QuantizedKV):
            specs[node] = value.spec
        elif node.target is quantized_empty:
            specs[node] = planned_spec(value, specs.get(node.args[2]), *node.args[4:])
    buffers = buffers_of(gm, records)
    if buffers:
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        values = [fake(inputs[b.index]) for b in buffers]
        plans = plan_buffers(buffers, [(v.shape, v.dtype) for v in values], config)
        specs.update({inputs[b.index]: plans[b].spec for b in buffers})
    return specs


def _site(record: SiteRecord, specs: dict[Node, KVSpec]) -> Site:
    write = record.key_write.how if record.key_write is not None else ""
    read = " > ".join([*record.key.path, record.attention.how])
    roots = record.key.root, record.value.root
    stored = {specs[node].role: node for node in roots if node in specs}  # latents: keys come from both sides
    if not record.rewritable or not stored:
        full = sum(_full_bytes(fake(node)) for node in roots) if record.has_cache else 0
        return Site(None, record.label, write, read, False, record.reason, None, None, None, None, full, full)
    sides = {side: specs[node] for side, node in sorted(stored.items())}
    bits, partner = {s: spec.bits for s, spec in sides.items()}, {s: spec.partner for s, spec in sides.items()}
    name = label_of(stored.get("key", roots[0]))
    return Site(
        next(iter(sides.values())).layer, name, write or "in another graph", read, True,
        _how(list(sides.values()), record.computed), partner.get("key"), partner.get("value"), bits.get("key"),
        bits.get("value"), sum(_stored_bytes(spec) for spec in sides.values()),
        sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in sides.values()),
    )


def _why_dequantized(record: SiteRecord, specs: dict[Node, KVSpec], writers: dict[Node, Node]) -> str:
    if any(node.target is quantized_empty for node in (record.key.root, record.value.root)):
        return ""
    if any(specs[node].bits == 16 for node in (record.key.root, record.value.root) if node in specs):
        return "16-bit storage"
    found = match_decode(record.attention, record.key, record.value, writers)
    return found if isinstance(found, str) else ""


def _stored_bytes(spec: KVSpec) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.tensor_shapes().values())


def _full_bytes(value: Tensor | None) -> int:
    return 0 if value is None else int(value.numel()) * value.dtype.itemsize


def _how(sides: list[KVSpec], computed: bool) -> str:
    how = "quantized latents, from which keys and values are computed" if computed else "quantized"
    lent = [f"{s.role} codes of layer {s.partner}" for s in sides if s.borrowed]
    return f"{how}, with the {' and '.join(lent)}" if lent else how


def _short(name: str) -> str:
    """The end of a source expression: ``layers[3].keys`` of ``L['kwargs']['past_key_values'].layers[3].keys``."""
    parts = re.split(r"\.(?![^\[]*\])", name)
    return ".".join(parts[-2:]) if len(parts) > 2 or len(name) > 30 else name


def _row(site: Site) -> list[str]:
    def text(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    read = site.read.replace("scaled_dot_product_attention", "sdpa")
    return [
        text(site.layer), _short(site.name), site.write, read, "yes" if site.rewritten else "no", text(site.k_bits),
        text(site.v_bits), text(site.partner), text(site.bytes),
        f"{site.reason}; read dequantized: {site.dequantized}" if site.dequantized else site.reason,
    ]

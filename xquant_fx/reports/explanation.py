"""``explain``: what the backend does to each attention of a model, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from xquant_fx.cache.growth import exact_rooms
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.emptied_inputs import emptied_inputs
from xquant_fx.compiler.laid_out_graph import laid_out_graph
from xquant_fx.compiler.laid_out_growth import laid_out_growth
from xquant_fx.compiler.left_alone import report_left
from xquant_fx.compiler.options import Request, parse
from xquant_fx.compiler.returned_inputs import returned_inputs
from xquant_fx.compiler.self_check import self_check
from xquant_fx.compiler.stacked_graph import LeftWholeError, stacked_graph
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.passes import records
from xquant_fx.passes.find_sites import buffer_name
from xquant_fx.passes.growth_copies import without_growth_copies
from xquant_fx.passes.records import Detection
from xquant_fx.passes.trace import fake
from xquant_fx.plan.buffer_plan import is_denied
from xquant_fx.plan.spec import KVSpec
from xquant_fx.reports.explain_table import table
from xquant_fx.reports.sites import Site
from xquant_fx.reports.trial_run import HeldTensors, copies


@dataclasses.dataclass
class Explanation:
    """What ``explain`` found: ``sites`` for programs, ``print()`` or ``str()`` for people."""

    sites: list[Site]
    graphs: int
    """Graphs that Dynamo made of the model; more than one means graph breaks."""

    def __str__(self) -> str:
        return table(self.sites, self.graphs)

    def print(self) -> None:
        """Print the table."""
        print(self)


def explain(
    model: Any,
    *args: Any,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    strict: bool = False,
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
            not an XQuantCache. ``self_check=True`` among the options says what a self-check finds, too.
        strict: raise if a KV cache is found and not rewritten.

    Raises:
        NotRewrittenError: under ``strict``.
    """
    request = parse(mode, {**(options or {}), **({"strict": True} if strict else {})})
    seen: list[Detection] = []
    held = HeldTensors(model)
    copied, originals = copies((args, kwargs))

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found, given = _judge(gm, inputs, request, originals)
        seen.append(found)
        held.save(found, given)
        return gm.forward

    function = getattr(model, "_orig_mod", model)
    function = function.forward if isinstance(function, torch.nn.Module) else function
    torch._dynamo.reset()
    try:
        with torch.no_grad(), exact_rooms():
            torch.compile(function, backend=record)(*copied[0], **copied[1])
    finally:
        held.restore()
        torch._dynamo.reset()
    report_left(tuple(site for found in seen for site in found.sites), request)
    return Explanation([site for found in seen for site in _sites(found)], len(seen))


def _judge(
    gm: torch.fx.GraphModule, inputs: list[Any], request: Request, originals: dict[int, Tensor]
) -> tuple[Detection, list[Any]]:
    """What is decided about a graph, and what its inputs are."""
    if (own := returned_inputs(gm)) is not None:
        gm = own.gm
    if (empty := emptied_inputs(gm, inputs)) is not None:
        gm = empty.gm
    gm = without_growth_copies(gm)
    if (stacks := stacked_graph(gm, inputs)) is None:
        return _detect(gm, inputs, request, originals), inputs
    parts = stacks.given(inputs)
    try:
        found = _detect(stacks.gm, parts, request, originals)
        stacks.judge(inputs)(found, "")
    except LeftWholeError as left:
        return _detect(stacks.left_whole(gm, str(left)), inputs, request, originals), inputs
    return found, parts


def _detect(gm: torch.fx.GraphModule, inputs: list[Any], request: Request, originals: dict[int, Tensor]) -> Detection:
    while (usual := laid_out_graph(gm, inputs) or laid_out_growth(gm, inputs)) is not None:
        gm, inputs = usual.gm, usual.given(inputs)
    found = detect_graph(gm, inputs, request, originals)
    if not request.self_check:
        return found
    return self_check(gm, found, inputs, request, originals).explained


def _sites(found: Detection) -> list[Site]:
    sites: list[Site] = []
    counted: set[Node] = set()
    for record in found.sites:
        site, buffers = _site(record, found.specs), set(record.buffers)
        sites.append(dataclasses.replace(site, bytes=0, full_bytes=0) if buffers <= counted else site)
        counted |= buffers
    return sites


def _site(record: records.Site, specs: dict[Node, KVSpec]) -> Site:
    stored = {specs[node].role: node for node in record.buffers if node in specs}  # latents: keys come from both
    if not record.rewritable or not stored:
        return _left_alone(record)
    found = {role: specs[node] for role, node in sorted(stored.items())}
    bits, partner = {r: spec.bits for r, spec in found.items()}, {r: spec.partner for r, spec in found.items()}
    return Site(
        layer=next(iter(found.values())).layer, name=buffer_name(stored.get("key", record.key.root)),
        write=_write(record), read=_read(record), rewritten=True, reason=_how(list(found.values()), record.is_latent),
        key_partner=partner.get("key"), value_partner=partner.get("value"), k_bits=bits.get("key"),
        v_bits=bits.get("value"), k_eta=_eta(found.get("key")), v_eta=_eta(found.get("value")),
        bytes=sum(spec.stored_bytes for spec in found.values()),
        full_bytes=sum(spec.full_bytes for spec in found.values()),
        dequantized=record.dequantized, notes=(*_notes(list(found.values())), *_rotations(record.folding)),
    )  # fmt: skip


def _left_alone(record: records.Site) -> Site:
    full = sum(_full_bytes(fake(node)) for node in record.buffers) if record.has_cache else 0
    return Site(
        layer=None, name=record.buffer_name, write=_write(record), read=_read(record), rewritten=False,
        reason=record.reason, key_partner=None, value_partner=None, k_bits=None, v_bits=None, k_eta=None,
        v_eta=None, bytes=full, full_bytes=full,
    )  # fmt: skip


def _write(record: records.Site) -> str:
    if record.key_write is not None:
        return record.key_write.kind
    return "in another graph" if record.rewritable else ""


def _read(record: records.Site) -> str:
    return " > ".join([*record.key.path, record.attention.kind])


def _eta(spec: KVSpec | None) -> float | None:
    if spec is None or not spec.quantized or not SCHEMES[spec.scheme].RANGE_CODES:
        return None
    return None if spec.borrowed and spec.fit == "least_squares" else spec.eta


def _full_bytes(value: Tensor | None) -> int:
    return 0 if value is None else int(value.numel()) * value.dtype.itemsize


def _how(specs: list[KVSpec], is_latent: bool) -> str:
    how = "quantized; keys or values are computed from what is stored" if is_latent else "quantized"
    lent = [f"{s.role} codes of layer {s.partner}" for s in specs if s.borrowed]
    return f"{how}, with the {' and '.join(lent)}" if lent else how


def _rotations(folding: records.Folding | None) -> tuple[str, ...]:
    """Who rotates values that are stored rotated, and what that takes."""
    if folding is None:
        return ()
    layers = [linear for linear in (folding.value, folding.output) if linear is not None]
    weights = [weight for linear in layers for weight in (linear.weight, linear.bias) if weight is not None]
    size = sum(_full_bytes(fake(weight)) for weight in weights)
    folded = (f"rotation of values folded into {len(weights)} weights: {size:,} bytes of rotated copies",)
    return (folded if weights else ()) + tuple(f"values are rotated at each step: {why}" for why in folding.reasons)


def _notes(specs: list[KVSpec]) -> tuple[str, ...]:
    """What a plan says of layers that were to share codes and do not."""
    return tuple(f"{s.role} codes of its own: {s.reason}" for s in specs if is_denied(s.partner, s.reason))

"""Quantized buffers for hand-written steps, and a backend that keeps the graphs before and after the passes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from dynamo_graphs import fresh
from states import layers_of
from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx import XQuantConfig, ops
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler.backend import compile_graph
from xquant_fx.compiler.options import parse
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.passes.graph import fake_mode
from xquant_fx.passes.trace import fake, source_of

sdpa = torch.nn.functional.scaled_dot_product_attention
SHAPE = (1, 2, 48, 8)  # [B, H, N, D]
# Unequal bits: an op that takes the keys' for the values' must not go unseen.
CONFIG = XQuantConfig.preset("xquant-1bit").replace(k_bits=4, v_bits=2, k_group_size=4, residual_length=4)
STORES = (ops.STORE, ops.STORE_BORROWED)

Layers = list[tuple[QuantizedKV, QuantizedKV]]


#: Layers that are all equal.
ALONE = CONFIG.replace(share_keys_from=None, share_values_from=None)


def quantized_layers(config: XQuantConfig = CONFIG, shape: tuple[int, ...] = SHAPE, number: int = 2) -> Layers:
    """Empty keys and values of layers; two pair by default."""
    return [tuple(QuantizedKV.of(s) for s in layer) for layer in layers_of(config, shape, torch.float32, number)]


class Rewrites:
    """A backend that keeps every graph as Dynamo made it (``given``) and as Inductor would get it (``made``)."""

    def __init__(self, **options: Any) -> None:
        self.options, self.given, self.before, self.made, self.inputs = options or None, [], [], [], []

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Any:
        def compiler(graph, example_inputs, request, settings):
            self.made.append(graph)
            self.inputs.append(example_inputs)
            return graph.forward

        self.given.append(gm)
        self.before.append(str(gm.graph))
        return compile_graph(gm, inputs, parse(None, self.options), compiler)


def count(gm: GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def attentions(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is sdpa]


def check_rewritten(gm: GraphModule, stores: int, loads: int = 0, fused: int = 0) -> None:
    """Nothing of the quantized buffers is left, and every attention reads after its store, dequantized or fused."""
    assert (count(gm, *STORES), count(gm, ops.LOAD), count(gm, ops.DECODE)) == (stores, loads, fused)
    assert not any(isinstance(fake(node), QuantizedKV) for node in gm.graph.nodes)
    for node in (n for n in gm.graph.nodes if n.target is ops.LOAD):
        with fake_mode(gm.graph):
            found = node.target(**{k: fake(v) if isinstance(v, Node) else v for k, v in node.kwargs.items()})
        said = fake(node)  # not computed by the op
        assert (said.shape, said.stride(), said.dtype) == (found.shape, found.stride(), found.dtype)
        assert said.device == found.device
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    fused_nodes = [n for n in gm.graph.nodes if n.target is ops.DECODE]
    scales = [(n, DecodeArguments.of(n).k_scale) for n in fused_nodes]
    scales += [(n, DecodeArguments.of(n).v_scale) for n in fused_nodes]
    for attention in attentions(gm):
        for operand in attention.args[1:3]:
            load = source_of(operand, {}).root
            assert load.target is ops.LOAD
            scales.append((load, LoadArguments.of(load).scale))
    for reader, scale in scales:
        stored = [n for n in gm.graph.nodes if n.target in STORES and StoreArguments.of(n).scale is scale]
        assert [order[n] < order[reader] for n in stored] == [True] * len(stored)


def assign(keys, values, k, v, pos):
    keys[:, :, pos] = k
    values[:, :, pos] = v


def two_layers(q, k, v, layers, pos, append=assign):
    for keys, values in layers:
        append(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k, v = k + q, v - q
    return q


def run_both(
    function, sizes: list[int], seen: Rewrites, config=CONFIG, dynamic: bool = False, number: int = 2, **kwargs
) -> tuple[list[Tensor], list[Tensor]]:
    """Steps of ``sizes`` tokens, with the passes and eagerly, on two caches."""
    torch.manual_seed(0)
    mine, outs, at = quantized_layers(config, number=number), ([], []), 0
    theirs, compiled = copy.deepcopy(mine), torch.compile(function, backend=seen, dynamic=dynamic)
    with torch.no_grad():
        for tokens in sizes:
            args, pos = fresh(tokens), torch.arange(at, at + tokens)
            outs[0].append(compiled(*args, mine, pos, **kwargs))
            outs[1].append(function(*args, theirs, pos, **kwargs))
            at += tokens
    for ours, other in zip(sum(mine, ()), sum(theirs, ()), strict=True):
        for name, tensor in ours.state.owned.items():
            torch.testing.assert_close(tensor, other.state.owned[name], rtol=0, atol=1e-6, msg=f"{ours!r} {name}")
    return outs

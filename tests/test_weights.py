"""Adapted and quantized weights: the attentions are found, and layers whose weights are computed are left alone."""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import decode_sites, tiny
from stepping import interpreted, relative_error, run_steps
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig, ops
from xquant_fx.kernels.linear_rows.cpu_call import is_faster_here

IDS = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(3))


class LoRA(nn.Module):
    """``y = W x + B A x``, as PEFT spells it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * 2.0


class Int8(nn.Module):
    """8-bit weights with one scale per output channel, dequantized where they are used."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (base.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


def changed(kind: type[nn.Module]) -> nn.Module:
    model = tiny("llama")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kind(child))
    return model.eval()


@pytest.mark.parametrize("kind", [LoRA, Int8])
@pytest.mark.parametrize("make", [StaticCache, DynamicCache])
def test_attentions_are_found(kind, make):
    model = changed(kind)
    lengths = {"max_cache_len": 32} if make is StaticCache else {}
    assert [site.reason for site in decode_sites(model, make(config=model.config, **lengths))] == ["", ""]


@pytest.mark.parametrize("kind, plain", [(LoRA, 1 + 2 * (7 * 3 - 3)), (Int8, 1)])
def test_layers_of_few_rows(kind, plain):
    """Of LoRA all three products are plain linear layers, of which q, k, v are one call, and gate, up one; of computed
    weights none, which leaves the head."""
    model, calls = changed(kind), []
    cache = XQuantCache(model.config, 32, XQuantConfig.preset("full"))
    step = torch.compile(model.forward, backend=interpreted(calls), dynamic=False)
    mine = run_steps([(model.forward, 8), *[(step, 1)] * 4], IDS, cache)
    theirs = run_steps(
        [(model.forward, 8), *[(model.forward, 1)] * 4], IDS, StaticCache(model.config, max_cache_len=32)
    )
    assert relative_error(mine, theirs) < 1e-5
    (graph,) = (made.graph for made in calls)
    replaced = sum(node.target is ops.LINEAR_ROWS for node in graph.nodes)
    assert replaced == (plain if is_faster_here() else 0)

"""Adapted and quantized weights: the attentions are found, and layers whose weights are computed are left alone.

Spelt out in plain torch, which always runs; by torchao, bitsandbytes and PEFT, where they are installed.
"""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import decode_sites, tiny
from rewrites import count
from stepping import interpreted, relative_error, run_steps
from torch import Tensor, nn
from torch._dynamo.utils import counters
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


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_int8_activations(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_int4(model):
    quantization = pytest.importorskip("torchao.quantization")
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")
    quantization.quantize_(model.model, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    return model


def bitsandbytes_weights(model, make):
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child).to("cpu"))
    return model


def bitsandbytes_8(model):
    bnb = pytest.importorskip("bitsandbytes")

    def make(base):
        layer = bnb.nn.Linear8bitLt(base.in_features, base.out_features, False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(base.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer

    return bitsandbytes_weights(model, make)


def bitsandbytes_4(model):
    bnb = pytest.importorskip("bitsandbytes")

    def make(base):
        layer = bnb.nn.Linear4bit(base.in_features, base.out_features, False, torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(base.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        return layer

    return bitsandbytes_weights(model, make)


def peft_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).get_base_model()


def peft_merged(model):
    model = peft_lora(model)
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    return model


@pytest.mark.parametrize(
    "change, rows",
    [
        (torchao_int8, 1),
        (torchao_int8_activations, 1),
        (torchao_int4, 3),  # 48 channels make no groups of 32: such layers stay as they are
        (bitsandbytes_8, 1),
        (bitsandbytes_4, 1),
        (peft_lora, 1 + 2 * 7 * 3),
        (peft_merged, 1 + 2 * 7),
    ],
)
def test_weights_of_other_packages(change, rows):
    """In bfloat16. ``linear_rows`` takes the head and what of an adapter is plain; quantized weights have kernels."""
    model, calls = change(tiny("llama").to(torch.bfloat16)).requires_grad_(False), []
    counters.clear()
    step = torch.compile(model.forward, backend=interpreted(calls), dynamic=False)
    steps = [(model.forward, 8), *[(step, 1)] * 4]
    mine = run_steps(steps, IDS, XQuantCache(model.config, 32))
    theirs = run_steps([(model.forward, tokens) for _, tokens in steps], IDS, StaticCache(model.config, 32))
    assert relative_error(mine, theirs) < 2e-2, "rounding to bfloat16 in another order"
    assert count(calls[-1], ops.DECODE) == 2
    assert counters["xquant"]["linear_rows"] == (rows if is_faster_here() else 0)

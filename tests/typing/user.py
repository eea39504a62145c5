"""Every public name as a user writes it: a type checker finds nothing to say."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

import xquant_fx
from xquant_fx import (
    PRESETS,
    ArgumentError,
    CacheStateError,
    ConfigError,
    NotRewrittenError,
    Plan,
    UnsupportedWriteError,
    XQuantCache,
    XQuantConfig,
    XQuantError,
    decode_attention,
    explain,
    make_plan,
    memory_report,
    quantize,
    xquant_backend,
)
from xquant_fx.quality import agreement, kl_divergence


def caches(config: PreTrainedConfig) -> list[XQuantCache]:
    names: list[str] = sorted(PRESETS)
    settings = XQuantConfig(k_bits=2, v_bits=(2, 1), share_values_from=0.5, scale_dtype=torch.float16)
    plan: Plan = make_plan(settings.replace(v_bits=1), 4)
    Path("plan.json").write_text(plan.to_json())
    again = Plan.from_json(Path("plan.json").read_text())
    return [
        XQuantCache(config, max_cache_len=1024, config=XQuantConfig.preset(names[0])),
        XQuantCache(config, 1024, settings),
        XQuantCache(config, 1024, config=again, padding_mask=torch.ones(1, 4)),
    ]


def generate(ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained("examples/model").eval()
    compiled = torch.compile(model, backend=xquant_backend, options={"preset": "kivi-2"})
    cache = caches(model.config)[0]
    found = explain(compiled, ids, past_key_values=cache, strict=True)
    reasons: list[str] = [site.reason for site in found.sites]
    bits: float = memory_report(cache).bits_per_element
    out: Tensor = decode_attention(ids.float(), cache, 0, softcap=0.0, window=4)
    codes: Tensor = quantize(out, bits=2, group_size=4, dim=-1).codes
    share: float = agreement(ids[0], codes[0]).share
    print(reasons, bits, share, kl_divergence(out, out), xquant_fx.__version__)


def careful(ids: Tensor) -> str:
    try:
        generate(ids)
    except (ArgumentError, ConfigError) as error:
        value: ValueError = error
        return str(value)
    except (CacheStateError, UnsupportedWriteError, NotRewrittenError) as error:
        base: XQuantError = error
        return str(base)
    return ""

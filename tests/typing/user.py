"""Every public name, used as the README does. Not run: type checkers must find nothing wrong (test_types.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typing_extensions import assert_type

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
    __version__,
    anatomy_report,
    auto_plan,
    auto_report,
    decode_attention,
    explain,
    longbench_report,
    make_plan,
    memory_report,
    needle_report,
    quality_report,
    quantize,
    sweep_report,
    task_report,
    xquant_backend,
)
from xquant_fx.evaluate.quality import Reading
from xquant_fx.evaluate.tasks.report import Running
from xquant_fx.evaluate.windows import cut_windows
from xquant_fx.quality import agreement, kl_divergence, teacher_forced_logits, top1_agreement


def first_lines() -> None:
    tokenizer = AutoTokenizer.from_pretrained("examples/model")
    # To pyright the class that transformers returns has no ``generate``.
    model: Any = AutoModelForCausalLM.from_pretrained("examples/model").eval()
    model.compile(backend="xquant")
    ids = tokenizer(Path("examples/prompt.txt").read_text(), return_tensors="pt").input_ids
    cache = XQuantCache(model.config, max_cache_len=1024)
    model.generate(ids, past_key_values=cache, max_new_tokens=100, do_sample=False)
    report = memory_report(cache)
    print(report, report.ratio + report.bits_per_element, sum(report.parts.values()))
    print(explain(model, ids, past_key_values=XQuantCache(model.config, max_cache_len=1024)))
    logits = teacher_forced_logits(model, ids, 8, past_key_values=cache)
    print(kl_divergence(logits, logits), top1_agreement(logits, logits), agreement(ids[0], ids[0]).first_difference)


def loop(q: Tensor, k: Tensor, v: Tensor, cache: XQuantCache) -> Tensor:
    cache.update(k, v, 0)
    cache.crop(-1)
    cache.reset()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.set_padding_mask(None)
    out = decode_attention(q, cache, 0, softcap=0.0, mask=None, scale=0.5, window=0, sink_logits=None)
    assert_type(out, Tensor)
    return out


def settings() -> XQuantConfig:
    config = XQuantConfig(
        k_bits=2, v_bits=(2, 2, 1, 1), share_values_from=4, residual_length=64, k_group_size=64, sink_tokens=4
    )
    plan = make_plan(config, 4)
    assert_type(Plan.from_json(plan.to_json()), Plan)
    print(plan, plan.layers[0].key.bits + 1, sorted(PRESETS), __version__.split("."))
    assert_type(XQuantConfig.from_json(config.to_json()), XQuantConfig)
    return XQuantConfig.preset("kivi-2").replace(sink_tokens=4)


def measures(model: Any, tokenizer: Any, text: str) -> float:
    windows = cut_windows(tokenizer, text, tokens=1536, count=4)
    settings: dict[str, XQuantConfig | Plan] = {
        "kivi-2": XQuantConfig.preset("kivi-2"),
        "plan": make_plan(XQuantConfig(), 8),
    }
    report = quality_report(model, windows, settings, reading=Reading(prompt=1024, stride=2), out="results.json")
    print(report, report["kivi-2"].size.true_bits, report.to_dict())
    chosen: Plan = auto_plan(model, bits=1.7, text=text, tokenizer=tokenizer, verbose=False)
    print(auto_report(model, max_kl=0.02, config=XQuantConfig()).measured_kl, chosen.model)
    print(needle_report(model, tokenizer, text, settings, lengths=[512], depths=[0.5], trials=1).found["kivi-2"])
    print(anatomy_report(model, windows[:1], settings["plan"], prompt=1024).worst)
    swept = sweep_report(model, windows, XQuantConfig(), {"residual_length": [128, 256], "sink_tokens": [0, 4]})
    print(swept, swept.front, swept.refused, swept.report.qualities[0].summary.kl)
    tasks = task_report(model, tokenizer, ["gsm8k"], settings, running=Running(limit=10), data="datasets")
    print(tasks["kivi-2"].scores, tasks["kivi-2"].quantized)
    print(longbench_report(model, tokenizer, ["hotpotqa"], settings, data="data.zip", out="results").scores)
    return report["kivi-2"].summary.kl


def errors(model: torch.nn.Module, x: Tensor) -> Tensor:
    step = torch.compile(model, backend=xquant_backend, options={"preset": "kivi-2"})
    try:
        step(x)
    except (ArgumentError, CacheStateError, ConfigError, NotRewrittenError, UnsupportedWriteError) as error:
        caught: XQuantError = error
        print(caught)
    return quantize(x, bits=2, group_size=32, dim=-1, eta=0.0).dequantize()

"""What is done to a cache: rows, copies, files, prompts, tokens taken back, steps that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from life_caches import IDS, MAX_LEN, Life
from torch import Tensor

from xquant_fx import XQuantCache, XQuantConfig

SIDES = ("keys", "values")
Scenario = Callable[[Life], list[Tensor]]


class DoesNotApply(Exception):
    """The scenario means nothing for this kind of cache."""


def _turns(life: Life) -> list[Tensor]:
    cache, out = life.begin(IDS[:1, :20])
    return [out] + [life.step(IDS[:1, at:to], cache) for at, to in ((20, 27), (27, 28), (28, 45), (45, 46), (46, 47))]


def _reset(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    cache.reset()
    cache, out = life.begin(IDS[1:2, :15], cache)
    return [out, *(life.step(IDS[1:2, at : at + 1], cache) for at in range(15, 30))]


def _on_rows(change: Callable[[Any, Tensor], object], rows: list[int]) -> Scenario:
    def scenario(life: Life) -> list[Tensor]:
        cache, _ = life.begin(IDS[:, :20])
        index = torch.tensor(rows)
        change(cache, index)
        return [life.step(IDS[index, at : at + 1], cache) for at in range(20, 24)]

    return scenario


def _crop(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    life.step(IDS[1:2, :5], cache)
    cache.crop(-5)
    return [life.step(IDS[:1, at : at + 1], cache) for at in range(20, 36)]


def _too_far(life: Life) -> list[Tensor]:
    if life.mode == "plain":
        return []
    two_bits = XQuantConfig.preset("kivi-2").replace(k_group_size=8, residual_length=8)
    cache, _ = life.begin(IDS[:1, :40], XQuantCache(life.model.config, MAX_LEN, two_bits))
    life.step(IDS[:1, 40:41], cache)
    cache.crop(-30)
    raise AssertionError("nothing said that more tokens were taken back than can be")


def _padding(life: Life) -> list[Tensor]:
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[0, :9], mask[2, :3] = 0, 0
    cache, out = life.begin(IDS[:, :20], attention_mask=mask[:, :20])
    return [out, *(life.step(IDS[:, at : at + 1], cache, attention_mask=mask[:, : at + 1]) for at in range(20, 24))]


def _too_long(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    return [life.step(IDS[:1, :60], cache)]


def _chunks(life: Life) -> list[Tensor]:
    cache, out = life.begin(IDS[:1, :9])
    return [out, *(life.step(IDS[:1, at : at + 9], cache) for at in range(9, 45, 9))]


def _copied(copied: Callable[[Any], Any]) -> Scenario:
    def scenario(life: Life) -> list[Tensor]:
        cache, _ = life.begin(IDS[:1, :20])
        other = copied(cache) if life.mode != "plain" else copy.deepcopy(cache)
        pairs = [(life.step(IDS[:1, t : t + 1], cache), life.step(IDS[1:2, t : t + 1], other)) for t in range(20, 32)]
        return [logits for pair in pairs for logits in pair]

    return scenario


def _two(life: Life) -> list[Tensor]:
    (one, _), (two, _) = life.begin(IDS[:1, :20]), life.begin(IDS[1:2, :25])
    pairs = [(life.step(IDS[:1, t : t + 1], one), life.step(IDS[1:2, t + 5 : t + 6], two)) for t in range(20, 32)]
    return [logits for pair in pairs for logits in pair]


def _inference_mode(life: Life) -> list[Tensor]:
    with torch.inference_mode():
        cache, out = life.begin(IDS[:1, :20])
        inside = life.step(IDS[:1, 20:21], cache)
    return [out.clone(), inside.clone(), *(life.step(IDS[:1, at : at + 1], cache) for at in range(21, 36))]


def _to_cpu(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    for layer in [cache] if life.kind == "XQuantCache" and life.mode != "plain" else cache.layers:
        layer.to("cpu") if layer is cache else (layer.offload(), layer.prefetch())
    return [life.step(IDS[:1, at : at + 1], cache) for at in range(20, 24)]


def _saved(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    if life.kind == "XQuantCache" and life.mode != "plain":
        saved, cache = safetensors.torch.save(cache.state_dict()), life.new()
        cache.load_state_dict(safetensors.torch.load(saved))
    elif life.mode != "plain":
        sides = {f"{i}.{side}": getattr(layer, side) for i, layer in enumerate(cache.layers) for side in SIDES}
        saved = safetensors.torch.save({name: side.dequantize() for name, side in sides.items()})
        tensors, cache = safetensors.torch.load(saved), life.new()
        for index in range(len(cache.layers) or 2):
            cache.update(*(tensors[f"{index}.{side}"][:, :, :20] for side in SIDES), index)
    return [life.step(IDS[:1, at : at + 1], cache) for at in range(20, 24)]


def _other_batch(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    return [life.step(IDS[:2, 20:21], cache)]


def _other_dtype(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    life.model.to(torch.bfloat16)
    return [life.step(IDS[:1, 20:21], cache)]


def _gradients(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    with torch.enable_grad():
        return [life.step(IDS[:1, 20:21], cache).detach()]


def _interrupted(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    hook = life.model.model.layers[1].register_forward_pre_hook(_stop)
    torch._dynamo.reset()
    try:
        life.step(IDS[:1, 20:21], cache)
    except KeyboardInterrupt:
        hook.remove()
    torch._dynamo.reset()
    cache.reset()
    cache, out = life.begin(IDS[1:2, :15], cache)
    return [out, life.step(IDS[1:2, 15:16], cache)]


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def generated(own_cache: bool = False, **how: Any) -> Scenario:
    """``generate(**how)``, with a cache that is passed in unless it is to make its ``own_cache``."""

    def scenario(life: Life) -> list[Tensor]:
        more = {**how, **({} if own_cache else life.cache_argument()), "return_dict_in_generate": True}
        if life.mode == "plain":
            more.pop("cache_implementation", None)
        prompt = IDS[:1, :6].repeat(1, 4)
        out = life.for_generate().generate(prompt, max_new_tokens=16, do_sample=False, **more)
        life.made = [out.past_key_values]
        return [torch.nn.functional.one_hot(out.sequences, 64).double()]

    return scenario


def escape(way: Callable[[Tensor], object]) -> Scenario:
    """A way past torch's ops to the memory of a layer's keys, which has to be an error."""

    def scenario(life: Life) -> list[Tensor]:
        cache, _ = life.begin(IDS[:1, :20])
        if life.mode != "plain":
            way(cache.layers[0].keys)
            raise AssertionError("nothing said that there is no memory of keys")
        return []

    return scenario


def does_not_apply(*kinds: str) -> Callable[[Scenario], Scenario]:
    """A scenario that means nothing for these kinds of caches."""

    def decorate(scenario: Scenario) -> Scenario:
        def applied(life: Life) -> list[Tensor]:
            if life.mode != "plain" and life.kind in kinds:
                raise DoesNotApply
            return scenario(life)

        return applied

    return decorate


DONE_TO_IT: dict[str, Scenario] = {
    "several turns": _turns,
    "generate()": generated(),
    "beam search": generated(num_beams=3),
    "prompt lookup": generated(prompt_lookup_num_tokens=4),
    "the prompt in chunks, generate(prefill_chunk_size=7)": generated(prefill_chunk_size=7),
    "the prompt in chunks, by steps": _chunks,
    "reset(), another prompt": _reset,
    "reorder_cache": _on_rows(lambda cache, rows: cache.reorder_cache(rows), [2, 0, 0]),
    "batch_select_indices": _on_rows(lambda cache, rows: cache.batch_select_indices(rows), [2, 0]),
    "batch_repeat_interleave": _on_rows(lambda cache, rows: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "crop": _crop,
    "crop(-30) at 2 bits, rollback_tokens=20": does_not_apply("StaticCache", "DynamicCache")(_too_far),
    "left padding of different lengths": _padding,
    "copy.deepcopy, two continuations": _copied(copy.deepcopy),
    "cache.fork(), two continuations": does_not_apply("StaticCache", "DynamicCache")(
        _copied(lambda cache: cache.fork())
    ),
    "two caches in turn": _two,
    "inference_mode, and then not": _inference_mode,
    "moved away and back": _to_cpu,
    "saved by safetensors, and loaded": _saved,
    "reset() after Ctrl-C in the middle of a step": _interrupted,
    "a step under enable_grad": _gradients,
    "more tokens than it holds": _too_long,
    "a step of another batch": _other_batch,
    "a step of another dtype": _other_dtype,
}

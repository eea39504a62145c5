"""What runs on a cache: ways to generate, threads, parts of a model that are compiled, ways to compile them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from life_caches import FIELDS, IDS, Life
from life_scenarios import Scenario, does_not_apply, escape, generated
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import create_causal_mask

TOKENS = range(20, 26)


def steps(life: Life, cache: Any, tokens: range = TOKENS, row: int = 0) -> list[Tensor]:
    """Logits of single tokens."""
    return [life.step(IDS[row : row + 1, at : at + 1], cache) for at in tokens]


def prompt_and_steps(life: Life, tokens: range = TOKENS) -> list[Tensor]:
    """Logits of the last token of a prompt, and of single tokens after it."""
    cache, out = life.begin(IDS[:1, :20])
    return [out, *steps(life, cache, tokens)]


# Ways to generate.


def _assisted(life: Life) -> list[Tensor]:
    torch.manual_seed(1)
    draft = LlamaForCausalLM(LlamaConfig(**FIELDS | {"num_hidden_layers": 1})).eval()
    draft.generation_config.assistant_confidence_threshold = 0.0  # all 20 of them, and not as many as it is sure of
    return generated(assistant_model=draft)(life)


class _Stream(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        self.tokens.append(torch.tensor([0]))


def _streamed(life: Life) -> list[Tensor]:
    stream = _Stream()
    thread = threading.Thread(target=generated(streamer=stream), args=(life,))
    thread.start()
    thread.join()
    return [torch.cat(stream.tokens)]


def _pipeline(life: Life) -> list[Tensor]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, "w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    run = pipeline("text-generation", model=life.for_generate(), tokenizer=tokenizer)
    text = " ".join(f"w{i}" for i in IDS[0, :20].tolist())
    (out,) = run(text, max_new_tokens=12, do_sample=False, **life.cache_argument())
    return [torch.tensor([int(word) for word in out["generated_text"].replace("w", " ").split()])]


# Threads.


def _at_once(*work: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What each gives, in a thread of its own, all begun at once; the first error is raised."""
    bar, found, errors = threading.Barrier(len(work)), dict[int, list[Tensor]](), list[BaseException]()

    def run(number: int) -> None:
        try:
            bar.wait()
            with torch.no_grad():
                found[number] = work[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [logits for number in sorted(found) for logits in found[number]]


def _two_threads(life: Life) -> list[Tensor]:
    caches = [life.begin(IDS[row : row + 1, :20])[0] for row in (0, 1)]
    return _at_once(lambda: steps(life, caches[0]), lambda: steps(life, caches[1], row=1))


def _one_cache_of_two(life: Life) -> list[Tensor]:
    if life.mode == "plain":
        return []
    cache, _ = life.begin(IDS[:1, :20])
    steps(life, cache, range(20, 22))  # which compiles: a thread that waits for the compiler meets nobody
    _at_once(lambda: steps(life, cache, range(22, 40)), lambda: steps(life, cache, range(22, 40), row=1))
    raise AssertionError("two threads appended to one cache, and nobody was told")


# Parts of a model.


def _layers(life: Life) -> list[Tensor]:
    if life.mode != "plain":
        for layer in life.model.model.layers:
            layer.forward = life.compile(layer.forward)
        life.compiled = life.model.forward
    return prompt_and_steps(life)


def _inner(life: Life) -> list[Tensor]:
    if life.mode != "plain":
        life.model.model.forward = life.compile(life.model.model.forward)
        life.compiled = life.model.forward
    return prompt_and_steps(life)


def _stages(life: Life) -> list[Tensor]:
    """Two compiled stages, each with one layer; the first makes the mask and the rotary embedding."""
    body, head = life.model.model, life.model.lm_head

    def first(ids: Tensor, cache: Any) -> tuple[Tensor, Any, Any]:
        x = body.embed_tokens(ids)
        where = (torch.arange(ids.shape[1]) + cache.get_seq_length())[None]
        mask = create_causal_mask(body.config, x, None, past_key_values=cache, position_ids=where)
        rotary = body.rotary_emb(x, position_ids=where)
        return body.layers[0](x, mask, where, cache, position_embeddings=rotary), mask, (where, rotary)

    def second(x: Tensor, mask: Any, places: Any, cache: Any) -> Tensor:
        out: Tensor = head(body.norm(body.layers[1](x, mask, places[0], cache, position_embeddings=places[1])))
        return out

    def whole(one: Any, two: Any) -> Any:
        def forward(ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
            return SimpleNamespace(logits=two(*one(ids, past_key_values), past_key_values))

        return forward

    life.compiled = whole(life.compile(first), life.compile(second))
    life.model.forward = whole(first, second)
    return prompt_and_steps(life)


# Ways to compile.


def compiled_by(**how: Any) -> Scenario:
    """Single tokens, a chunk and single tokens again, by ``torch.compile(..., **how)``."""

    def scenario(life: Life) -> list[Tensor]:
        life.compiled = life.compile(life.model.forward, **how)
        cache, out = life.begin(IDS[:1, :20])
        return [out, *steps(life, cache), life.step(IDS[:1, 26:31], cache), *steps(life, cache, range(31, 35))]

    return scenario


def _limit(life: Life) -> list[Tensor]:
    """Steps of more shapes than may be compiled: the others run in eager code, and torch warns."""
    life.compiled = life.compile(life.model.forward, dynamic=False)
    cache, out = life.begin(IDS[:1, :20])
    with torch._dynamo.config.patch(recompile_limit=2):
        return [out, *(life.step(IDS[:1, at : at + 2 + at % 5], cache) for at in (20, 23, 28, 32, 35, 37))]


def _training(life: Life) -> list[Tensor]:
    life.model.train()
    return prompt_and_steps(life)


RUN_BY: dict[str, Scenario] = {
    "assisted generation, a draft model's 20 tokens": _assisted,
    "a streamer, in a thread": _streamed,
    'pipeline("text-generation")': _pipeline,
    'generate(cache_implementation="static")': does_not_apply("XQuantCache", "DynamicCache")(
        generated(own_cache=True, cache_implementation="static")
    ),
    "generate() makes the cache": does_not_apply("XQuantCache", "StaticCache")(generated(own_cache=True)),
    "two threads, a cache each, one compiled model": _two_threads,
    "two threads, one cache": _one_cache_of_two,
    "each layer compiled by itself": _layers,
    "model.model compiled": _inner,
    "a pipeline of two compiled stages": _stages,
    "training mode": _training,
    "fullgraph=True": compiled_by(fullgraph=True),
    "dynamic=True": compiled_by(dynamic=True),
    "dynamic=False": compiled_by(dynamic=False),
    "more shapes than recompile_limit": _limit,
    "keys.data_ptr()": escape(lambda keys: keys.data_ptr()),
    "to_dlpack(keys)": escape(lambda keys: torch.utils.dlpack.to_dlpack(keys)),
    "keys.numpy()": escape(lambda keys: keys.numpy()),
    "keys.share_memory_()": escape(lambda keys: keys.share_memory_()),
    "keys.pin_memory()": escape(lambda keys: keys.pin_memory()),
}

"""The life of a cache: what comes of each thing that is done to one, with three caches, in eager code and compiled.

Each scenario does it on a small Llama at 16 bits, and its logits are compared with those of a plain ``DynamicCache``.
Compiled steps are rewritten graphs that run op by op. A ``StaticCache`` and a ``DynamicCache`` are taken over by one
compiled step before anything is done; "eager" means the steps after that.

    .venv/bin/python benchmarks/life_of_a_cache.py  # writes docs/life.json and docs/life.md
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conformance import DOCS, FULL, Watching
from forked import in_process, in_words
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xquant_fx import XQuantCache

MAX_LEN = 64
KINDS = ("XQuantCache", "StaticCache", "DynamicCache")
MODES = ("eager", "compiled")
EXACT = 1e-4
FIELDS: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
IDS = torch.randint(3, 64, (3, MAX_LEN), generator=torch.Generator().manual_seed(1))


class Life:
    """A model, and how caches are made and stepped: of one kind, plain, in eager code or compiled."""

    def __init__(self, kind: str, mode: str) -> None:
        torch.manual_seed(0)
        self.kind, self.mode = kind, mode
        self.model: Any = LlamaForCausalLM(LlamaConfig(**FIELDS)).eval()
        torch._dynamo.reset()
        backend = Watching() if kind == "XQuantCache" else Watching(config=FULL)
        backend.looks = False
        self.compiled: Any = torch.compile(self.model.forward, backend=backend)

    def new(self) -> Any:
        """An empty cache."""
        if self.kind == "XQuantCache":
            return XQuantCache(self.model.config, MAX_LEN, FULL)
        if self.kind == "StaticCache":
            return StaticCache(self.model.config, max_cache_len=MAX_LEN)
        return DynamicCache(config=self.model.config)

    def begin(self, ids: Tensor, cache: Any = None, **more: Any) -> tuple[Any, Tensor]:
        """A cache that holds ``ids``, and the last token's logits [B, 1, V]. The backend has seen it."""
        cache = self.new() if cache is None else cache
        self.model(ids[:, :-1], past_key_values=cache, use_cache=True, **{k: v[:, :-1] for k, v in more.items()})
        first = self.model.forward if self.mode == "plain" or self._stays_eager() else self.compiled
        return cache, first(ids[:, -1:], past_key_values=cache, use_cache=True, **more).logits

    def step(self, ids: Tensor, cache: Any, **more: Any) -> Tensor:
        """Logits of more tokens."""
        call = self.compiled if self.mode == "compiled" else self.model.forward
        logits: Tensor = call(ids, past_key_values=cache, use_cache=True, **more).logits
        return logits

    def _stays_eager(self) -> bool:
        return self.mode == "eager" and self.kind == "XQuantCache"


def _turns(life: Life) -> list[Tensor]:
    cache, out = life.begin(IDS[:1, :20])
    return [out] + [life.step(IDS[:1, at:to], cache) for at, to in ((20, 27), (27, 28), (28, 45), (45, 46), (46, 47))]


def _reset(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    cache.reset()
    cache, out = life.begin(IDS[1:2, :15], cache)
    return [out, *(life.step(IDS[1:2, at : at + 1], cache) for at in range(15, 30))]


def _on_rows(change: Callable[[Any, Tensor], object], rows: list[int]) -> Callable[[Life], list[Tensor]]:
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


def _copies(life: Life) -> list[Tensor]:
    cache, _ = life.begin(IDS[:1, :20])
    other = copy.deepcopy(cache)
    pairs = [(life.step(IDS[:1, t : t + 1], cache), life.step(IDS[1:2, t : t + 1], other)) for t in range(20, 32)]
    return [logits for pair in pairs for logits in pair]


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
        tensors, cache = {name: tensor.clone() for name, tensor in cache.state_dict().items()}, life.new()
        cache.load_state_dict(tensors)
    elif life.mode != "plain":
        pairs = [(layer.keys.dequantize(), layer.values.dequantize()) for layer in cache.layers]
        cache = life.new()
        for index, (keys, values) in enumerate(pairs):
            cache.update(keys[:, :, :20], values[:, :, :20], index)
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


def _generated(**how: Any) -> Callable[[Life], list[Tensor]]:
    def scenario(life: Life) -> list[Tensor]:
        if life.mode == "compiled":
            life.model.forward = life.compiled
        prompt = IDS[:1, :6].repeat(1, 4)
        more = {"past_key_values": life.new()} if life.mode != "plain" else {}
        out: Tensor = life.model.generate(prompt, max_new_tokens=16, do_sample=False, **more, **how)
        return [torch.nn.functional.one_hot(out, 64).double()]

    return scenario


SCENARIOS: dict[str, Callable[[Life], list[Tensor]]] = {
    "several turns": _turns,
    "generate()": _generated(),
    "beam search": _generated(num_beams=3),
    "prompt lookup": _generated(prompt_lookup_num_tokens=4),
    "the prompt in chunks, generate(prefill_chunk_size=7)": _generated(prefill_chunk_size=7),
    "the prompt in chunks, by steps": _chunks,
    "reset(), another prompt": _reset,
    "reorder_cache": _on_rows(lambda cache, rows: cache.reorder_cache(rows), [2, 0, 0]),
    "batch_select_indices": _on_rows(lambda cache, rows: cache.batch_select_indices(rows), [2, 0]),
    "batch_repeat_interleave": _on_rows(lambda cache, rows: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "crop": _crop,
    "left padding of different lengths": _padding,
    "copy.deepcopy, two continuations": _copies,
    "two caches in turn": _two,
    "inference_mode, and then not": _inference_mode,
    "moved away and back": _to_cpu,
    "saved and loaded": _saved,
    "reset() after Ctrl-C in the middle of a step": _interrupted,
    "a step under enable_grad": _gradients,
    "more tokens than it holds": _too_long,
    "a step of another batch": _other_batch,
    "a step of another dtype": _other_dtype,
}


def outcome(name: str, kind: str, mode: str) -> dict[str, Any]:
    """ "right", "wrong" with the relative error, or the error's words."""
    scenario = SCENARIOS[name]
    with torch.no_grad():
        try:
            right = torch.cat([each.double().flatten() for each in scenario(Life("DynamicCache", "plain"))])
        except Exception as error:
            right = in_words(error)
        try:
            got = torch.cat([each.double().flatten() for each in scenario(Life(kind, mode))])
        except Exception as error:  # whatever is raised is what a person would read
            return {"error": in_words(error)}
    if isinstance(right, str) or got.shape != right.shape:
        return {"wrong": f"a DynamicCache without the backend: {right if isinstance(right, str) else right.shape}"}
    error = float((got - right).norm() / right.norm())
    return {"right": True} if error < EXACT else {"wrong": f"off by {error:.1e}"}


def page(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table."""
    columns = [f"{kind}, {mode}" for kind in KINDS for mode in MODES]
    lines = [f"| what is done | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    notes: list[str] = []
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(row.get(column, {}), notes) for column in columns)} |")
    told = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    intro = __doc__.split("\n\n    .venv")[0].strip().replace("``", "`")
    head, *rest = intro.split("\n\n")
    return "\n".join(["# The life of a cache", "", head, "", *rest, "", *lines, "", "Errors:", "", *told, ""])


def _cell(found: dict[str, Any], notes: list[str]) -> str:
    if "error" not in found:
        return "right" if "right" in found else f"**wrong: {found['wrong']}**" if found else ""
    if found["error"] not in notes:
        notes.append(found["error"])
    return f"error {notes.index(found['error']) + 1}"


def main() -> None:
    """Live through all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="words of the scenarios to live through anew")
    parser.add_argument("--folder", type=Path, default=DOCS)
    parser.add_argument("--seconds", type=float, default=300, help="limit for one scenario")
    args = parser.parse_args()
    path = args.folder / "life.json"
    rows = json.loads(path.read_text()) if path.exists() and args.only else {}
    torch.set_num_threads(1)
    outcome("reset(), another prompt", "StaticCache", "compiled")  # what is imported here is not imported again
    chosen = [name for name in SCENARIOS if not args.only or any(word in name for word in args.only)]
    for name in tqdm(chosen, unit=" scenarios"):
        for kind in KINDS:
            for mode in MODES:
                rows.setdefault(name, {})[f"{kind}, {mode}"] = in_process(outcome, args.seconds, name, kind, mode)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        (args.folder / "life.md").write_text(page(rows))
    print((args.folder / "life.md").read_text())


if __name__ == "__main__":
    main()

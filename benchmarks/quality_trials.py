"""Schemes that the product does not have, in the place of one side of a preset, on a real model.

    make models
    python benchmarks/quality_trials.py --text rover.txt reference.txt
    python benchmarks/quality_trials.py --text rover.txt --only "before RoPE" trellis

A trial stands for the keys or the values of a preset in the exact one-pass simulation of decode. What steps see in
full precision, and when, is the preset's; what they read back is that of a plain torch quantizer
(trial_quantizers.py). KL is that of ``xquant eval``, and the differences are paired over windows. Written to
benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import where, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from trial_list import TRIALS, Trial
from trial_quantizers import Seen
from trial_windows import Windows, chosen_windows, same_windows

from xquant_fx import XQuantConfig
from xquant_fx.evaluate.attention import Form, Side, attend, plain
from xquant_fx.evaluate.measures import Measured, Summary, measure, paired, summarize
from xquant_fx.evaluate.models import attending, load
from xquant_fx.evaluate.simulate import Prefilled, reference_logits, simulated_logits
from xquant_fx.evaluate.size import size_of
from xquant_fx.evaluate.windows import cut_windows
from xquant_fx.kernels.schemes import SCHEMES


class TrialPass:
    """An attention function of transformers, as that of evaluate/simulate.py: a trial's quantizers, no cache."""

    def __init__(self, window: Prefilled, trial: Trial, windows: Windows) -> None:
        self.window, self.trial, self.windows = window, trial, windows
        self.config = XQuantConfig.preset(trial.base)
        self.rope = rotary(window.model, window.ids)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, **rest: Any
    ) -> tuple[Tensor, None]:
        layer, new = module.layer_idx, query.shape[2]
        keys, values = (self._side(role, layer, x, new) for role, x in (("key", key), ("value", value)))
        return attend(query, keys, values, Form(scaling, mask)).transpose(1, 2).contiguous(), None

    def _side(self, role: str, layer: int, x: Tensor, new: int) -> Side:
        config, residual = self.config, self.windows[role][layer]
        limit = SCHEMES[config.scheme(role)].quantized_limit
        limits = limit(torch.arange(self.window.prompt, x.shape[2]), config.k_group_size, residual)
        n = int(limits[-1])
        if n <= config.sink_tokens:
            return plain(x, new)
        first = max(limit(self.window.prompt, config.k_group_size, residual), config.k_group_size)
        seen = Seen(x[:, :, :n].float(), config.sink_tokens, first, config.k_group_size)
        if role == "key":
            cos, sin = self.rope
            seen = dataclasses.replace(seen, energy=self._energy(layer, x), rope=(cos[:n], sin[:n]))
        read = getattr(self.trial, role)(seen)
        return Side(x, torch.cat([x[:, :, : config.sink_tokens], read[:, :, config.sink_tokens :]], 2), limits)

    def _energy(self, layer: int, key: Tensor) -> Tensor:
        square = self.window.queries[layer].float().square().mean(2)
        return square.unflatten(1, (key.shape[1], -1)).mean(2)


def rotary(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) [T, D] of a model with one rotary embedding for all layers, as Llama has it."""
    positions = torch.arange(ids.shape[1])[None]
    cos, sin = model.get_decoder().rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    return cos[0], sin[0]


@torch.no_grad()
def trial_logits(window: Prefilled, keep: Tensor, trial: Trial, windows: Windows | None = None) -> Tensor:
    """Logits [B, len(keep), V] at ``keep`` as decode steps with the trial's quantizers would give them."""
    windows = windows or same_windows(trial, window.model.config.num_hidden_layers)
    with attending(window.model, TrialPass(window, trial, windows)):
        return window.rest(keep)


def measured(window: Prefilled, keep: Tensor, args: argparse.Namespace, windows: dict[str, Windows]) -> Iterator[Any]:
    """(name, what it does to one window, true bits) of each preset and trial."""
    full, targets = reference_logits(window, keep)[0], window.ids[0, keep + 1]
    trials = chosen(args)
    for base in dict.fromkeys(trial.base for trial in trials):
        logits, cache = simulated_logits(window, keep, XQuantConfig.preset(base))
        yield base, measure(full, logits[0], targets, keep), size_of(cache).true_bits
        for trial in (t for t in trials if t.base == base):
            logits = trial_logits(window, keep, trial, windows.get(trial.name))
            bits = trial.true_bits(window.model.config)
            yield trial.name, measure(full, logits[0], targets, keep), bits


def chosen(args: argparse.Namespace) -> list[Trial]:
    """The trials whose names have a word of ``--only``."""
    return [t for t in TRIALS if not args.only or any(word in t.name for word in args.only)]


def read_texts(tokenizer: Any, args: argparse.Namespace) -> list[Tensor]:
    """Windows [1, T] of all texts."""
    cut = [cut_windows(tokenizer, Path(text).read_text(), args.window, args.windows) for text in args.text]
    return [ids[None] for windows in cut for ids in windows]


@torch.no_grad()
def run(model: Any, texts: list[Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each preset and trial."""
    keep = torch.arange(args.prompt, args.window - 1, args.stride)
    windows = {t.name: chosen_windows(model, t) for t in chosen(args) if t.chooses_windows}
    found: dict[str, list[Measured]] = {}
    bits: dict[str, float] = {}
    for ids in tqdm(texts):
        for name, each, true_bits in measured(Prefilled.of(model, ids, args.prompt), keep, args, windows):
            found.setdefault(name, []).append(each)
            bits[name] = true_bits
    summaries = {name: summarize(each) for name, each in found.items()}
    base_of = {t.name: t.base for t in TRIALS}
    rows = [row_of(name, bits[name], found, summaries, base_of.get(name)) for name in found]
    return [row | {"windows": windows[row["name"]]} if row["name"] in windows else row for row in rows]


def row_of(
    name: str, bits: float, found: dict[str, list[Measured]], summaries: dict[str, Summary], base: str | None
) -> dict[str, Any]:
    """What was found of one preset or trial, beside its preset."""
    ours = summaries[name]
    row = {
        "name": name, "base": base, "true_bits": bits, "kl": ours.kl, "kl_error": ours.kl_error,
        "kl_windows": ours.kl_windows, "same_top": ours.same_top, "perplexity": ours.perplexity,
    }  # fmt: skip
    if base is not None:
        more, error = paired(ours, summaries[base])
        row |= {"more": more, "more_error": error, "ratio": ours.kl / summaries[base].kl}
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """Presets, and below each what was tried in its place."""
    made = Table(title="KL in nats; more: paired difference to the preset above")
    for column in ("", "true bits", "KL", "more", "times", "same top, %"):
        made.add_column(column, justify="left" if not column else "right")
    for row in rows:
        more = f"{row['more']:+.4f} ± {row['more_error'] or 0:.4f}" if row["base"] else ""
        made.add_row(
            f"  {row['name']}" if row["base"] else row["name"], f"{row['true_bits']:.3f}",
            f"{row['kl']:.4f} ± {row['kl_error'] or 0:.4f}", more, f"{row['ratio']:.2f}" if row["base"] else "",
            f"{100 * row['same_top']:.1f}",
        )  # fmt: skip
    return made


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/smollm2-135m-instruct", help="folder of a Llama model")
    parser.add_argument("--text", nargs="+", required=True, help="plain texts, UTF-8")
    parser.add_argument("--windows", type=int, default=2, help="of each text")
    parser.add_argument("--window", type=int, default=1536, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=1024, help="of them in full precision first")
    parser.add_argument("--stride", type=int, default=8, help="measure every so many positions")
    parser.add_argument("--only", nargs="+", help="trials with one of these words in their names")
    parser.add_argument("--name", default="quality-trials", help="of the results file")
    args = parser.parse_args()
    model, tokenizer = load(args.model, torch.float32)
    rows = run(model, read_texts(tokenizer, args), args)
    Console(width=120).print(table(rows))
    args.device = "cpu"
    write(args.name, {"rows": rows, **where(args)})
    print(f"written to benchmarks/results/{args.name}.json")


if __name__ == "__main__":
    main()

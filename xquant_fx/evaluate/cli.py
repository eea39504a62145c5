"""The command ``xquant``: ``eval``, ``needle`` and ``anatomy`` of a model's quantized cache, and ``plan`` for one.

``tasks`` and ``longbench`` are in ``tasks/cli.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xquant_fx.errors import ArgumentError, ConfigError, XQuantError
from xquant_fx.evaluate.arguments import add_goal, add_settings, load_model, load_settings, of_model
from xquant_fx.evaluate.tasks.cli import add_tasks


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="xquant", description="Measure what a quantized KV cache does to a model.")
    commands = top.add_subparsers(dest="command", required=True)
    evaluate = _command(commands, "eval", run_eval, "KL, perplexity and top-1 of next tokens against full precision")
    _add_windows(evaluate)
    evaluate.add_argument("--stride", type=int, default=2, help="measure every so many positions (default: 2)")
    evaluate.add_argument("--windows", type=int, default=4, help="evenly spaced over the text (default: 4)")
    evaluate.add_argument("--steps", action="store_true", help="real decode steps; default: the same in one pass")
    evaluate.add_argument("--compile", action="store_true", help="compile the real steps")
    evaluate.add_argument("--sweep", nargs="+", action="append", default=[], metavar="FIELD=V,V,...",
                          help="other values for fields of the preset or config: all combinations of the fields after "
                          "one --sweep; several --sweep one after the other")  # fmt: skip
    evaluate.add_argument(
        "--plot", metavar="FILE.png", help="KL against bits, and against depth or (--sweep) all bytes"
    )
    needle = _command(commands, "needle", run_needle, "find a pass key in long text, over lengths and depths")
    needle.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="tokens (default: 512 1024)")
    needle.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 to 1")
    needle.add_argument("--trials", type=int, default=4, help="pass keys per length and depth (default: 4)")
    needle.add_argument("--plot", metavar="FILE.png", help="heat maps")
    needle.add_argument("--results", metavar="FOLDER", help="all answers, in the file layout of kvpress")
    _add_windows(_command(commands, "anatomy", run_anatomy, "errors of keys, values and attention, by layer and head"))
    _add_plan(of_model(commands, "plan", run_plan, "choose the bits of each layer on a model, for a budget"))
    add_tasks(commands)
    return top


def _command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    command = of_model(commands, name, run, about)
    command.add_argument("--text", required=True, metavar="FILE", help="plain text to read, UTF-8")
    command.add_argument("--out", metavar="FILE.json", help="all numbers; eval goes on with what is in it")
    add_settings(command)
    return command


def _add_plan(command: argparse.ArgumentParser) -> None:
    add_goal(command, required=True)
    command.add_argument("--text", metavar="FILE", help='plain text, or "sampled": by the model; default: built in')
    command.add_argument("--config", metavar="FILE.json", help="XQuantConfig.to_json, for all but bits")
    command.add_argument("--no-sharing", action="store_true", help="do not try whether layers may share codes")
    command.add_argument("-o", "--out", metavar="plan.json", help="where the plan goes; --config reads it")


def _add_windows(command: argparse.ArgumentParser) -> None:
    command.add_argument("--window", type=int, default=1536, help="tokens read at a time (default: 1536)")
    command.add_argument("--prompt", type=int, default=1024, help="of them in full precision first (default: 1024)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 and a message where its arguments break a rule."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (XQuantError, OSError) as error:
        print(f"xquant {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any, str, list[Any]]:
    """(model, tokenizer, text, settings)."""
    text = Path(args.text).read_text(encoding="utf-8")
    model, tokenizer, settings = load_settings(args)
    return model, tokenizer, text, settings


def run_eval(args: argparse.Namespace) -> None:
    """``xquant eval``."""
    from xquant_fx.evaluate.plots import plot_quality
    from xquant_fx.evaluate.quality import Reading, quality_report
    from xquant_fx.evaluate.sweep import parse_grid

    reading = Reading(args.prompt, args.stride, args.steps, args.compile)
    grids = [parse_grid(words) for words in args.sweep]
    model, tokenizer, text, settings = _load(args)
    windows = _windows(args, tokenizer, text, args.windows)
    if grids:
        return _run_sweep(args, model, windows, settings, reading, grids)
    report = quality_report(model, windows, settings, reading=reading, out=args.out, progress=True)
    print(report)
    if args.plot:
        plot_quality(report, args.plot)


def _windows(args: argparse.Namespace, tokenizer: Any, text: str, count: int) -> Any:
    from xquant_fx.evaluate.windows import cut_windows

    try:
        return cut_windows(tokenizer, text, args.window, count).to(args.device)
    except ArgumentError as error:
        given = f"--window {args.window} --prompt {args.prompt}"
        raise ArgumentError(f"{error} ({given}: for a short text give less of both)") from error


def _run_sweep(
    args: argparse.Namespace, model: Any, windows: Any, settings: list[Any], reading: Any, grids: list[Any]
) -> None:
    from xquant_fx.evaluate.plots import plot_sweep
    from xquant_fx.evaluate.sweep_report import sweep_report

    if len(settings) != 1:
        raise ConfigError(f"a sweep starts from one preset or config, got {[setting.name for setting in settings]}")
    report = sweep_report(model, windows, settings[0], *grids, reading=reading, out=args.out, progress=True)
    print(report)
    if args.plot:
        plot_sweep(report, args.plot)


def run_needle(args: argparse.Namespace) -> None:
    """``xquant needle``."""
    from xquant_fx.evaluate.needle import needle_report
    from xquant_fx.evaluate.plots import plot_needle

    model, tokenizer, text, settings = _load(args)
    given: dict[str, Any] = dict(lengths=args.lengths, depths=args.depths, trials=args.trials)
    report = needle_report(model, tokenizer, text, settings, **given, results=args.results, progress=True)
    print(report)
    _write(args.out, report.to_dict())
    if args.plot:
        plot_needle(report, args.plot)


def run_anatomy(args: argparse.Namespace) -> None:
    """``xquant anatomy``."""
    from xquant_fx.evaluate.anatomy import anatomy_report

    model, tokenizer, text, settings = _load(args)
    ids = _windows(args, tokenizer, text, 1)
    found = {setting.name: anatomy_report(model, ids, setting.config, prompt=args.prompt) for setting in settings}
    for name, each in found.items():
        print(f"{name}\n{each}")
    _write(args.out, {name: each.to_dict() for name, each in found.items()})


def run_plan(args: argparse.Namespace) -> None:
    """``xquant plan``."""
    from xquant_fx.evaluate.auto import auto_plan
    from xquant_fx.evaluate.calibration import SAMPLED
    from xquant_fx.evaluate.settings import Setting

    base: Any = None if args.config is None else Setting.of_file(args.config).config
    text = args.text if args.text in (None, SAMPLED) else Path(args.text).read_text(encoding="utf-8")
    model, tokenizer = load_model(args)
    given: dict[str, Any] = dict(text=text, tokenizer=tokenizer, config=base, sharing=not args.no_sharing)
    plan = auto_plan(model, bits=args.bits, max_kl=args.max_kl, **given)
    if args.out:
        Path(args.out).write_text(plan.to_json() + "\n", encoding="utf-8")


def _write(path: str | None, content: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

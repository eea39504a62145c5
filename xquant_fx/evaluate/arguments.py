"""What several commands take: a model, settings, a budget."""

from __future__ import annotations

import argparse
from typing import Any

from xquant_fx.errors import ConfigError
from xquant_fx.plan.presets import PRESETS

DTYPES = ("float32", "bfloat16", "float16")
#: In the place of a preset's name: the plan that is chosen on the model.
AUTO = "auto"
#: What is measured where neither a preset nor a file is named: the default of ``XQuantConfig``.
DEFAULT = "xquant-2.2"


def of_model(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A new command that takes a model."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    command.set_defaults(run=run)
    command.add_argument("model", help="folder or Hub id of a Hugging Face model")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--device", default="cpu")
    return command


def add_settings(command: argparse.ArgumentParser) -> None:
    """Presets, files, and a budget for "auto"."""
    command.add_argument("--preset", nargs="+", action="extend", default=[], choices=[*sorted(PRESETS), AUTO],
                         metavar="NAME", help='a preset, or "auto": the plan for --bits or --max-kl')  # fmt: skip
    command.add_argument("--config", nargs="+", action="extend", default=[], metavar="FILE.json",
                         help=f"XQuantConfig.to_json or Plan.to_json; default of both: --preset {DEFAULT}")  # fmt: skip
    add_goal(command, required=False)


def add_goal(command: argparse.ArgumentParser, required: bool) -> None:
    """A budget for a plan."""
    goal = command.add_mutually_exclusive_group(required=required)
    goal.add_argument("--bits", type=float, help="of a plan: most true bits per element")
    goal.add_argument("--max-kl", type=float, help="of a plan: largest mean KL in nats")


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    import torch

    from xquant_fx.evaluate.models import load

    return load(args.model, getattr(torch, args.dtype), args.device)


def load_settings(args: argparse.Namespace) -> tuple[Any, Any, list[Any]]:
    """(model, tokenizer, settings); raises ConfigError where arguments break a rule, before it loads the model."""
    from xquant_fx.evaluate.settings import Setting

    if AUTO not in args.preset and (args.bits, args.max_kl) != (None, None):
        raise ConfigError("--bits and --max-kl are the budget of --preset auto, which is not among the presets")
    presets = args.preset or ([] if args.config else [DEFAULT])
    files = [Setting.of_file(path) for path in args.config]
    fixed = [None if name == AUTO else Setting.of_preset(name) for name in presets]
    model, tokenizer = load_model(args)
    return model, tokenizer, [*(each or _chosen(args, model, tokenizer) for each in fixed), *files]


def _chosen(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """The setting "auto", chosen on the built-in text, not on what is measured then."""
    from xquant_fx.evaluate.auto import auto_plan
    from xquant_fx.evaluate.settings import Setting

    if args.bits is None and args.max_kl is None:
        raise ConfigError("--preset auto needs a budget: --bits or --max-kl, got neither")
    return Setting(AUTO, auto_plan(model, bits=args.bits, max_kl=args.max_kl, tokenizer=tokenizer))

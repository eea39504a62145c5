"""The commands ``xquant tasks`` and ``xquant longbench``."""

from __future__ import annotations

import argparse
from typing import Any

from xquant_fx.evaluate.arguments import add_settings, load_settings, of_model

#: Tasks of LongBench, one of each kind in English.
SOME = ["qasper", "hotpotqa", "gov_report", "trec", "passage_retrieval_en", "lcc"]


def add_tasks(commands: Any) -> None:
    """Add both to the command line."""
    tasks = of_model(commands, "tasks", run_tasks, "tasks of lm-evaluation-harness, TruthfulQA and GSM8K among them")
    tasks.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="as `lm-eval ls tasks` prints them")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each item (default: the task's)")
    tasks.add_argument("--batch-size", type=int, default=8, help="choices, or prompts to go on with (default: 8)")
    tasks.add_argument("--context-steps", type=_steps, default=1, metavar="N", help="tokens at the end of a context "
                       'that are decode steps, as the choices that are scored, or "all" (default: 1)')  # fmt: skip
    tasks.add_argument("--steps", action="store_true", help="score by real decode steps; default: the same in one pass")
    tasks.add_argument("--compile", action="store_true", help="compile the steps of generation")
    tasks.add_argument("--chat-template", action="store_true", help="put items into the tokenizer's chat template")
    _add_common(tasks, "datasets as the Hub's files, in folders of its ids, as in openai/gsm8k/main/test.jsonl")
    long = of_model(commands, "longbench", run_longbench, "LongBench: questions about long texts, with its prompts")
    long.add_argument("--tasks", nargs="+", default=SOME, metavar="NAME",
                      help=f"such as hotpotqa, or hotpotqa_e of LongBench-E (default: {' '.join(SOME)})")  # fmt: skip
    long.add_argument("--max-length", type=int, metavar="N", help="tokens of a prompt, its middle cut out (default: "
                      "as many as the model has positions for)")  # fmt: skip
    long.add_argument(
        "--whole-prompt", action="store_true", help="prefill the question, too; default: it reads the cache"
    )
    long.add_argument("--no-chat-template", action="store_true", help="prompts as they are")
    long.add_argument("--compile", action="store_true", help="compile the steps")
    _add_common(long, "LongBench's data.zip, or a folder with its files, such as hotpotqa.jsonl")


def _add_common(command: argparse.ArgumentParser, files: str) -> None:
    command.add_argument("--data", metavar="FOLDER", help=f"{files}; default: from the Hub")
    command.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    command.add_argument("--out", metavar="FOLDER", help="all answers and numbers; goes on with what is in it")
    add_settings(command)


def _steps(text: str) -> int | None:
    return None if text == "all" else int(text)


def run_tasks(args: argparse.Namespace) -> None:
    """``xquant tasks``."""
    from xquant_fx.evaluate.tasks.report import Running, task_report

    running = Running(args.limit, args.num_fewshot, args.batch_size, args.context_steps, args.steps, args.compile,
                      args.chat_template)  # fmt: skip
    model, tokenizer, settings = load_settings(args)
    print(task_report(model, tokenizer, args.tasks, settings, running=running, data=args.data, out=args.out))


def run_longbench(args: argparse.Namespace) -> None:
    """``xquant longbench``."""
    from xquant_fx.evaluate.tasks.longbench import Reading, longbench_report

    reading = Reading(args.max_length, args.limit, args.whole_prompt, not args.no_chat_template, args.compile)
    model, tokenizer, settings = load_settings(args)
    given = dict(data=args.data, reading=reading, out=args.out, progress=True)
    print(longbench_report(model, tokenizer, args.tasks, settings, **given))

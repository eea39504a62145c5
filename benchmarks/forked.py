"""Work on one architecture after the other, each in a process of its own that may fail or take too long."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import re
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[..., dict[str, Any]]


def in_words(error: Exception) -> str:
    """An error on one line, the same in every run."""
    return re.sub("0x[0-9a-f]+", "0x..", " ".join(f"{type(error).__name__}: {error}".split()))[:200]


def in_process(work: Work, seconds: float, *args: Any, threads: int = 1) -> dict[str, Any]:
    """``work(*args)`` in a forked process of ``threads`` threads that may take ``seconds``; or {"error": ...}."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, args, threads, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else {"error": f"no answer in {seconds:.0f} s"}
    except EOFError:
        return {"error": "the process died"}
    finally:
        child.kill()
        child.join()


def _child(work: Work, args: tuple[Any, ...], threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    gc.disable()  # the process does not live long
    logging.disable(logging.CRITICAL)
    try:
        with torch.no_grad():
            pipe.send(work(*args))
    except Exception as error:  # whatever a model's code raises becomes its record
        pipe.send({"error": in_words(error)})

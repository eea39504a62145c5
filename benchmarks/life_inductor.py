"""Ways of Inductor, which builds the code of each, and two processes that share a model."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import warnings
from typing import Any

import torch
from life_caches import Life
from life_programs import prompt_and_steps
from life_scenarios import Scenario
from torch import Tensor
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from xquant_fx import xquant_backend


def built_by(settings: dict[str, Any] | None = None, mode: str | None = None) -> Scenario:
    """Single tokens by the backend itself, in a mode and with settings of Inductor's."""

    def scenario(life: Life) -> list[Tensor]:
        backend = functools.partial(xquant_backend, mode=mode, options=life.options)  # torch.compile takes one of both
        functools.update_wrapper(backend, xquant_backend)  # errors name it
        life.compiled = life.compile(life.model.forward, backend=backend, dynamic=False)
        with inductor_config.patch({"compile_threads": 1, **(settings or {})}):
            return prompt_and_steps(life, range(20, 23))

    return scenario


def _tensor_parallel(life: Life) -> list[Tensor]:
    """Two processes, each with half of the heads and a cache of these, by transformers' own plan and gloo."""
    if life.mode == "plain":
        return prompt_and_steps(life)
    context, queue = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        life.model.save_pretrained(folder)
        ranks = [context.Process(target=_rank, args=(rank, folder, life, queue)) for rank in range(2)]
        for process in ranks:
            process.start()
        found = [queue.get() for _ in ranks]
        for process in ranks:
            process.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return [torch.tensor(each) for each in found[0]]


def _rank(rank: int, folder: str, life: Life, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    warnings.simplefilter("ignore")  # what from_pretrained says of tp_plan, in some versions
    disable_progress_bar()
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=2)
        life.model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        life.compiled = life.compile(life.model.forward)
        with torch.no_grad():
            logits = prompt_and_steps(life)
        assert not life.in_full_precision(), "caches of tensor parallel models stay in full precision"
        queue.put([each.tolist() for each in logits])
    except Exception as error:
        queue.put(error)


BY_INDUCTOR: dict[str, Scenario] = {
    'mode="reduce-overhead", on the CPU': built_by(mode="reduce-overhead"),
    "Inductor's cpp_wrapper": built_by({"cpp_wrapper": True}),
    "freezing by Inductor": built_by({"freezing": True}),
    "tensor parallel, two processes with gloo": _tensor_parallel,
}

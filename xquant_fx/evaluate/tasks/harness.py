"""``XQuantLM``: a model of lm-evaluation-harness, of the name "xquant", whose KV cache is quantized.

What it adds to the harness's own Hugging Face model: log likelihoods come from ``continuations.py``, and generation
gets an ``XQuantCache``. Tokenizing, chat templates, batches, stop words and scores are the harness's.

Relied on: ``HFLM._loglikelihood_tokens`` and ``HFLM._model_generate`` (lm-eval 0.4.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.models import cache_argument
from xquant_fx.evaluate.settings import Setting
from xquant_fx.evaluate.tasks.answers import ROOM, compiling
from xquant_fx.evaluate.tasks.continuations import Share, Through, continuation_logits
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan

#: (the strings that the harness keeps answers by, or None; context; continuation), the last two as token ids.
Request = tuple[Any, list[int], list[int]]


@register_model("xquant")
class XQuantLM(HFLM):
    """A causal Hugging Face model over an ``XQuantCache``.

    Args:
        pretrained: folder, Hub id or a model, as of ``HFLM``; so are all ``arguments`` that are not named here.
        preset: name of a preset.
        config: a config, a plan, or a file that ``to_json`` of one wrote. Without this and a preset: full precision.
        context_steps: see ``Through``; "all" stands for None.
        steps: real decode steps for log likelihoods, which some models need.
        compiled: compile the steps of generation with the backend "xquant".

    Raises:
        ArgumentError: both a preset and a config, or no number for the batch size.
        ConfigError: no such preset, or the file holds none.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        preset: str | None = None,
        config: XQuantConfig | Plan | str | None = None,
        context_steps: int | str | None = 1,
        steps: bool = False,
        compiled: bool = False,
        **arguments: Any,
    ) -> None:
        if preset is not None and config is not None:
            raise ArgumentError(f"a cache has one setting: preset or config, got {preset!r} and {config!r}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, **{"device": device, **arguments})
        if not str(self.batch_size).isdigit():
            raise ArgumentError(f"batch_size must be a number, got {self.batch_size!r}")
        if preset is not None:
            config = XQuantConfig.preset(preset)
        setting = Setting.of_file(config).config if isinstance(config, str) else config
        self.through = Through(setting, None if context_steps in ("all", None) else int(context_steps), steps)
        self.share = Share()
        self.compiled = compiled

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log likelihood of the continuation, whether greedy decoding writes it), in the order of the requests.

        Those of one context are one batch. Contexts are cut on the left to what the model holds.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for context, indices in self._by_context(requests).items():
            for begin in range(0, len(indices), int(self.batch_size)):
                some = indices[begin : begin + int(self.batch_size)]
                for i, score in zip(some, self._scores(context, [requests[i][2] for i in some]), strict=True):
                    found[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                    bar.update()
        bar.close()
        return found

    def _by_context(self, requests: list[Request]) -> dict[tuple[int, ...], list[int]]:
        """Context to the numbers of its requests."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            room = max(self.max_length + 1 - len(continuation), 1)
            groups.setdefault(tuple(context[-room:]), []).append(i)
        return groups

    def _scores(self, context: Sequence[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        logits = continuation_logits(self.model, context, continuations, self.through, self.share)
        scores = []
        for row, each in zip(logits, continuations, strict=True):
            tokens, log_p = torch.tensor(each, device=row.device), row.float().log_softmax(-1)
            likelihood = log_p.gather(1, tokens[:, None]).sum().item()
            scores.append((likelihood, torch.equal(log_p.argmax(-1), tokens)))
        return scores

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Generate with a quantized cache; the prompt is prefilled in one piece."""
        if self.through.config is None:
            return super()._model_generate(context, max_length, stop, **kwargs)
        room = -(-max_length // ROOM) * ROOM
        mask = kwargs.get("attention_mask")
        cache = XQuantCache(self.model.config, max_cache_len=room, config=self.through.config, padding_mask=mask)
        given = {**cache_argument(self.model, cache), "disable_compile": True, **kwargs}
        with compiling(self.model, self.compiled):
            out: Tensor = super()._model_generate(context, max_length, stop, **given)
        for row in range(len(out)):
            padding = 0 if mask is None else int((mask[row] == 0).sum())
            self.share.add(cache, torch.arange(context.shape[1], out.shape[1] - 1) - padding)
        return out

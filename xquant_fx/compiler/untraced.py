"""Calls of compiled models that Dynamo is not asked about: first prompts of caches, and chunks of quantized ones.

They run uncompiled (``backend.py``, ``chunks.py``), and to find that out Dynamo would trace the whole model, first
prompts for each number of tokens anew, until as many graphs as it keeps are prompts (``recompile_limit``). The cache
knows it beforehand (``xquant_fx/cache/prompts.py``). So such a call runs as if there were no ``torch.compile`` around
it, by the kernels of compiled models. A function whose call does more than that (a whole loop of steps) is found out by
its first call, and traced from then on. Under ``fullgraph=True`` everything is traced, as was asked for.

Relied on: ``eval_frame._callback_from_stance``, by which a compiled function asks, each time that it is called, who is
to see its frames (None: nobody), and the variables ``self``, ``args``, ``kwargs`` and ``cleanups`` of
``compile_wrapper`` there. Without them all is traced. Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._dynamo import eval_frame

from xquant_fx.cache.prompts import AsGuessed, uncompiled
from xquant_fx.compiler.compiled_prompts import mark_tokens
from xquant_fx.compiler.new_caches import Untraced, look
from xquant_fx.compiler.tracing_time import Backend, innermost, settings_of
from xquant_fx.compiler.trial import Asked
from xquant_fx.kernels.cpu.at_hand import wanted
from xquant_fx.kernels.layout import STEP_TOKENS

log = logging.getLogger(__name__)

#: Set once torch has come with a graph, or a call was left untraced.
was_called = threading.Event()

_NAME = "_callback_from_stance"
#: The variables of ``compile_wrapper``.
_VARIABLES = ("self", "args", "kwargs", "cleanups")
#: Ids [B, q], or embeddings [B, q, D].
_NEW_TOKENS = ("decoder_input_ids", "input_ids", "inputs_embeds", "hidden_states")
#: Backends, with what makes of the mode and the options that ``torch.compile`` was given what is asked of each.
_backends: list[tuple[Backend, Callable[..., Asked]]] = []
#: Compiled functions, as torch keeps them, of which a call was something else than it was taken for.
_misjudged = weakref.WeakSet[Any]()


def leave_prompts_untraced(backend: Backend, asked_of: Callable[..., Asked]) -> None:
    """From now on, do so in functions that are compiled by ``backend``.

    ``asked_of`` says what it is asked for, of the mode and the options that ``torch.compile`` was given.
    """
    _backends.append((backend, asked_of))
    torchs: Callable[[Any], Any] | None = vars(eval_frame).get(_NAME)
    if torchs is None or hasattr(torchs, "_of_xquant_fx"):
        return

    @functools.wraps(torchs)
    def callback_of_call(callback: Any) -> Any:
        chosen = torchs(callback)
        if chosen in (None, False):
            return chosen
        backend = innermost(chosen)  # which need not be hashable
        asked_of = next((each for known, each in _backends if known is backend), None)
        if asked_of is None:
            return chosen
        asked = functools.partial(_asked, asked_of, chosen)
        return None if _is_left_untraced(sys._getframe(1).f_locals, asked) else chosen

    callback_of_call._of_xquant_fx = True  # type: ignore[attr-defined]
    vars(eval_frame)[_NAME] = callback_of_call


def _is_left_untraced(call: Mapping[str, Any], asked: Callable[[], Asked]) -> bool:
    """Whether the call that has these variables is to run untraced; it is prepared to, then."""
    if not all(name in call for name in _VARIABLES):
        return False
    args, kwargs = call["args"], call["kwargs"]
    new, given = _new_tokens(args, kwargs), (*kwargs.values(), *args)
    is_compiled = new[1] > STEP_TOKENS and asked().request.compile_prompts
    if is_compiled:
        mark_tokens(given, new[1])
    if call["self"].fullgraph or call["self"] in _misjudged:
        return False
    # What is being handled already, where this is called in an ``except``.
    outer, inside = sys.exc_info()[1], contextlib.ExitStack()
    guessed = () if is_compiled else given
    as_guessed = next((told for each in guessed if (told := uncompiled(each, new[1])) is not None), None)
    if as_guessed is None:
        seen = look(call["self"], given, new, asked)
        if not isinstance(seen, Untraced):
            if seen is not None:
                call["cleanups"].append(lambda: seen(sys.exc_info()[1] is not outer))
            return False
        as_guessed = seen.as_guessed
        inside.callback(seen.end)
        _cut_masks(kwargs, seen.widths, new[1])
    log.info("a prompt of a cache, or a chunk of a quantized one: it runs uncompiled, and is not traced")
    was_called.set()
    inside.callback(_unless_it_failed, outer, functools.partial(_judge, call["self"], as_guessed))
    inside.enter_context(wanted())
    call["cleanups"].append(inside.close)
    return True


def _cut_masks(kwargs: dict[str, Any], widths: Collection[int], tokens: int) -> None:
    """Masks [.., N] that are as wide as one of ``widths``, for a prompt's ``tokens``: ``generate()`` makes them before
    it calls. ``kwargs`` are those of the call alone."""

    def cut(mask: Any) -> Any:
        wide = isinstance(mask, Tensor) and mask.dim() > 1 and mask.shape[-1] in widths and mask.shape[-1] > tokens
        return mask[..., :tokens] if wide else mask

    masks = kwargs.get("attention_mask")
    if masks is not None and widths:
        by_kind = isinstance(masks, Mapping)  # of layers
        kwargs["attention_mask"] = {kind: cut(mask) for kind, mask in masks.items()} if by_kind else cut(masks)


def _asked(asked_of: Callable[..., Asked], compiler: Any) -> Asked:
    """What the backend is asked for that Dynamo calls by ``compiler``."""
    given = settings_of(compiler)
    return asked_of(given.get("mode"), given.get("options"))


def _unless_it_failed(outer: BaseException | None, then: Callable[[], Any]) -> None:
    """Behind a call, which was made while ``outer`` was handled: if it failed, nobody knows what it was."""
    if sys.exc_info()[1] is outer:
        then()


def _judge(function: Any, as_guessed: AsGuessed) -> None:
    """After a call that ran untraced: was it what it was taken for?"""
    if not as_guessed():
        log.info("this compiled function does more than one prompt or chunk: from now on it is traced")
        _misjudged.add(function)


def _new_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """For how many sequences a call brings how many tokens, by the names that transformers has for these, or the first
    tensor; zeros: nobody knows. Of hidden states, which a part of a model takes, none are whole sequences."""
    first = next((each for each in args if isinstance(each, Tensor)), None)
    name = next((name for name in _NEW_TOKENS if kwargs.get(name) is not None), None)
    given = first if name is None else kwargs[name]
    if not isinstance(given, Tensor) or given.dim() < 2:
        return 0, 0
    is_whole = name != "hidden_states" if name is not None else not given.is_floating_point()
    return given.shape[0] if is_whole else 0, given.shape[1]

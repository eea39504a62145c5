"""The metrics of LongBench (Bai et al., arXiv 2308.14508), each of an answer and one of the true answers: 0 to 1."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from xquant_fx.errors import ArgumentError

#: (answer, true answer, all classes of a task that classifies, or none) to a score.
Metric = Callable[[str, str, Sequence[str]], float]

#: What a Chinese text is rid of, beside ASCII punctuation, before its words are compared.
CHINESE_PUNCTUATION = (
    "\uff01\uff1f\uff61\u3002\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c\uff0d\uff0f\uff1a\uff1b"
    "\uff1c\uff1d\uff1e\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff62\uff63\uff64"
    "\u3001\u3003\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c\u301d"
    "\u301e\u301f\u3030\u303e\u303f\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027\ufe4f."
)


def qa_f1(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles (as SQuAD normalizes)."""
    return _f1(_words(answer), _words(truth))


def qa_f1_zh(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words that jieba cuts, without punctuation."""
    return _f1(_chinese_words(answer), _chinese_words(truth))


def rouge(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L, by the package `rouge`; 0 where one of the texts has no words."""
    scorer = _package("rouge").Rouge(metrics=["rouge-l"])
    try:
        return float(scorer.get_scores([answer], [truth], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):  # an empty text, and one that it cannot cope with: 0 in LongBench, too
        return 0.0


def rouge_zh(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """The same over words that jieba cuts."""
    return rouge(" ".join(_cut(answer)), " ".join(_cut(truth)))


def classification(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """1 / the number of classes that the answer names, if the true one is among them."""
    named = [name for name in classes if name in answer]
    for (
        name
    ) in named:  # over the list while it shrinks, so a name after one that goes is not looked at: so is the original
        if name in truth and name != truth:
            named.remove(name)
    return 1.0 / len(named) if truth in named else 0.0


def retrieval(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the paragraph's."""
    return _share_of_numbers(answer, re.findall(r"Paragraph (\d+)", truth)[0])


def retrieval_zh(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """The same for Chinese paragraphs."""
    return _share_of_numbers(answer, re.findall(r"段落(\d+)", truth)[0])


def count(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the true one."""
    return _share_of_numbers(answer, str(truth))


def code_sim(answer: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that is no comment and no fence, in whole percent, as fuzzywuzzy's ratio."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, truth).ratio()) / 100


def _f1(answer: list[str], truth: list[str]) -> float:
    same = sum((Counter(answer) & Counter(truth)).values())
    return 2 * same / (len(answer) + len(truth)) if same else 0.0


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _chinese_words(text: str) -> list[str]:
    dropped = set(string.punctuation + CHINESE_PUNCTUATION)
    words = ("".join(c for c in "".join(word.lower().split()) if c not in dropped) for word in _cut(text))
    return [word for word in words if word]


def _cut(text: str) -> list[str]:
    return list(_package("jieba").cut(text, cut_all=False))


def _share_of_numbers(answer: str, truth: str) -> float:
    numbers = re.findall(r"\d+", answer)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ArgumentError(f"this task is scored with {name}: pip install 'xquant-fx[tasks]'") from error

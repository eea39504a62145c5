"""Tasks of lm-evaluation-harness through a quantized cache; skipped without lm-eval, which the dev extra leaves out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from states import range_config
from transformers import AutoTokenizer

from xquant_fx import XQuantCache, task_report
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate import cli
from xquant_fx.evaluate.tasks.continuations import Share, Through, continuation_logits
from xquant_fx.evaluate.tasks.local_data import data_files, local_datasets
from xquant_fx.evaluate.tasks.report import QUANTIZED, Running, TaskReport, TaskResult

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "model"
SHORT = range_config(residual_length=32, k_group_size=32, share_values_from=None)
#: Questions of our own, in the fields of the Hub's files.
CHOICES = [
    ("Can a stone float on water?", ["No, a stone sinks", "Yes, every stone does", "Only at night"]),
    ("Do fish need water?", ["Yes, they do", "No, they breathe dust", "Only on Sundays"]),
]
PROBLEMS = [
    (f"Tom has {n} apples and buys {n + 1}. How many has he?", f"{n} + {n + 1} = {2 * n + 1}.\n#### {2 * n + 1}")
    for n in range(3, 9)
]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the datasets of TruthfulQA and GSM8K, as the Hub lays them out."""
    pytest.importorskip("lm_eval")
    import datasets

    folder = tmp_path_factory.mktemp("data")
    targets = [{"choices": choices, "labels": [1, 0, 0]} for _, choices in CHOICES]
    rows = [{"question": q, "mc1_targets": t, "mc2_targets": t} for (q, _), t in zip(CHOICES, targets, strict=True)]
    home = folder / "truthfulqa" / "truthful_qa" / "multiple_choice"
    home.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(str(home / "validation-00000-of-00001.parquet"))
    problems = [{"question": q, "answer": a} for q, a in PROBLEMS]
    write(folder / "gsm8k" / "main" / "train.jsonl", problems)
    write(folder / "gsm8k" / "main" / "test.jsonl", problems[:2])
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def model_of(trained, **given):
    pytest.importorskip("lm_eval")
    from xquant_fx.evaluate.tasks.harness import XQuantLM

    return XQuantLM(trained[0], tokenizer=AutoTokenizer.from_pretrained(MODEL), batch_size=4, **given)


def requests(*args) -> list:
    return [SimpleNamespace(args=each) for each in args]


CONTEXT = "It was a dark night, and the old captain walked along the deck. " * 3
PAIRS = [(CONTEXT, " He looked at the sea."), (CONTEXT, " He slept"), ("A ship", " sank"), ("", "The sea")]


def test_full_precision_is_the_harness(trained):
    ours = model_of(trained)
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(trained[0], tokenizer=AutoTokenizer.from_pretrained(MODEL), batch_size=4)
    for (a, greedy), (b, same) in zip(
        *(lm.loglikelihood(requests(*PAIRS), True) for lm in (ours, theirs)), strict=True
    ):
        assert (a, greedy) == (pytest.approx(b, abs=1e-3), same)
    rolling = [lm.loglikelihood_rolling(requests((CONTEXT,)), True)[0] for lm in (ours, theirs)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-2)
    until = requests((CONTEXT, {"until": ["\n"], "max_gen_toks": 8}))
    assert ours.generate_until(until, True) == theirs.generate_until(until, True)
    assert ours.share.mean is None


def test_log_likelihoods_are_those_of_the_continuations(trained):
    lm = model_of(trained, config=SHORT)
    scores = lm.loglikelihood(requests(*PAIRS), True)
    context, tail = lm._encode_pair(*PAIRS[0])
    (logits,) = continuation_logits(trained[0], context, [tail], Through(SHORT), Share())
    log_p = logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum().item()
    assert scores[0] == (pytest.approx(log_p, abs=1e-3), False)
    full = model_of(trained).loglikelihood(requests(*PAIRS), True)
    assert abs(scores[0][0] - full[0][0]) > 0.01  # much of the context was read quantized
    assert scores[2] == pytest.approx(full[2], abs=1e-3)  # a short one is in its window
    assert 0.2 < lm.share.mean < 0.9
    steps = model_of(trained, config=SHORT, steps=True).loglikelihood(requests(*PAIRS), True)
    assert [a for a, _ in steps] == pytest.approx([a for a, _ in scores], abs=1e-2)
    every = model_of(trained, config=SHORT, context_steps="all").loglikelihood(requests(*PAIRS), True)
    assert abs(every[0][0] - scores[0][0]) > 1e-3


def test_contexts_are_cut_on_the_left(trained):
    lm = model_of(trained, max_length=20)
    ids = list(range(5, 45))
    assert lm._by_context([(None, ids, [1, 2]), (None, ids[-19:], [7, 8])]) == {tuple(ids[-19:]): [0, 1]}


def test_generation_has_the_cache(trained):
    """Each of a batch of prompts of different length is answered as it is alone: by greedy decoding with a cache."""
    lm = model_of(trained, config=SHORT)
    prompts = [CONTEXT, CONTEXT + "Then the captain"]
    found = lm.generate_until(requests(*((p, {"until": ["\n\n"], "max_gen_toks": 8}) for p in prompts)), True)
    for text, prompt in zip(found, prompts, strict=True):
        ids = lm.tokenizer(prompt, return_tensors="pt").input_ids
        cache = XQuantCache(lm.model.config, max_cache_len=300, config=SHORT)
        out = lm.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).startswith(text) and text
    assert 0.5 < lm.share.mean < 1


def test_the_harness_knows_the_name(trained, tmp_path):
    model_of(trained)
    from lm_eval.api.registry import get_model

    (tmp_path / "mine.json").write_text(SHORT.to_json())
    found = get_model("xquant").create_from_arg_string(
        f"pretrained={MODEL},config={tmp_path / 'mine.json'},context_steps=all,dtype=float32", {"batch_size": 2}
    )
    assert found.through == Through(SHORT, None)
    assert get_model("xquant").create_from_arg_string(f"pretrained={MODEL},preset=kivi-2").through.config.k_bits == 2
    with pytest.raises(ArgumentError, match="preset or config, got 'kivi-2' and"):
        model_of(trained, preset="kivi-2", config=SHORT)


def test_report(trained, data, tmp_path, monkeypatch):
    tokenizer, out = AutoTokenizer.from_pretrained(MODEL), tmp_path / "out"
    given = dict(running=Running(limit=2, num_fewshot=2), data=str(data), out=str(out))
    tasks = ["truthfulqa_mc1", "gsm8k"]
    pytest.importorskip("lm_eval")
    from xquant_fx.evaluate.tasks.harness import XQuantLM

    generate, asked = XQuantLM._model_generate, []
    monkeypatch.setattr(
        XQuantLM, "_model_generate",
        lambda self, context, max_length, *a, **k: asked.append(1)
        or generate(self, context, context.shape[1] + 4, *a, **k),
    )  # fmt: skip
    report = task_report(trained[0], tokenizer, tasks, {"short": SHORT}, **given)
    assert list(report["short"].scores) == [
        "truthfulqa_mc1: acc", "gsm8k: exact_match (strict-match)", "gsm8k: exact_match (flexible-extract)",
    ]  # fmt: skip
    assert 0 <= report["short"].scores["truthfulqa_mc1: acc"].value <= 1
    assert report["full precision"].same == {"truthfulqa_mc1": 1.0, "gsm8k": 1.0}
    assert report["full precision"].quantized is None and 0.5 < report["short"].quantized < 1
    assert "truthfulqa_mc1: same answers, %" in str(report)
    assert json.loads((out / "tasks.json").read_text()) == json.loads(json.dumps(report.to_dict()))

    monkeypatch.setattr(XQuantLM, "_scores", None)  # nothing is asked again
    count = len(asked)
    assert task_report(trained[0], tokenizer, tasks, {"short": SHORT}, **given) == report
    assert len(asked) == count
    with pytest.raises(TypeError, match="NoneType"):  # another setting is
        task_report(trained[0], tokenizer, tasks[:1], {"short": SHORT.replace(k_bits=4)}, **given)


def test_files_of_a_dataset(tmp_path):
    for name in ("o/d/c/train.jsonl", "o/d/c/test-0-of-2.jsonl", "o/d/c/test-1-of-2.jsonl", "e/a.parquet", "e/b.json"):
        write(tmp_path / name, [{}])
    home = tmp_path / "o" / "d" / "c"
    assert data_files(tmp_path, "o/d", "c") == (
        "json", {"test": [str(home / f"test-{i}-of-2.jsonl") for i in (0, 1)], "train": [str(home / "train.jsonl")]},
    )  # fmt: skip
    assert data_files(tmp_path / "o", "x/d", "c") == data_files(tmp_path, "o/d", "c")
    assert data_files(home.parent, "x/c", None) == data_files(home.parent, "c", "other")
    with pytest.raises(ArgumentError, match=r"must be of one kind, got \['a.parquet', 'b.json'\]"):
        data_files(tmp_path, "o/e", None)
    with pytest.raises(ArgumentError, match=r"'openai/gsm8k' must be under .*, as .parquet or .jsonl; looked in"):
        data_files(tmp_path, "openai/gsm8k", "main")


def test_datasets_come_from_the_folder(data):
    import datasets

    before = datasets.load_dataset
    with local_datasets(data):
        assert datasets.load_dataset("openai/gsm8k", "main", split="test")[1]["question"] == PROBLEMS[1][0]
        (split,) = datasets.load_dataset("truthfulqa/truthful_qa", "multiple_choice").values()
        assert split[0]["mc1_targets"]["choices"] == CHOICES[0][1]
        with pytest.raises(ArgumentError, match="'a/b' must be under"):
            datasets.load_dataset("a/b")
    assert datasets.load_dataset is before


def test_report_says_where_nothing_was_quantized():
    results = [TaskResult("full precision", {}, {}, None), TaskResult("xquant-2.2", {}, {}, 0.0)]
    text = str(TaskReport("title", results))
    assert "Nothing was quantized yet where ['xquant-2.2'] were read: contexts are shorter than their windows." in text
    assert QUANTIZED in text
    assert "Nothing" not in str(TaskReport("title", [results[0], TaskResult("a", {}, {}, 0.1)]))


def test_command(data, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    args = ["tasks", "examples/model", "--tasks", "truthfulqa_mc1", "--preset", "xquant-2.2", "--limit", "1"]
    assert cli.main([*args, "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "truthfulqa_mc1: acc" in printed and "examples/model, float32: 1 items of each, 1 token(s)" in printed
    assert cli.main([*args, "--data", "tests"]) == 2
    assert "'truthfulqa/truthful_qa' must be under tests" in capsys.readouterr().err
    assert cli.main(["tasks", "examples/model", "--tasks", "truthfulqa_mc3"]) == 2
    assert "got ['truthfulqa_mc3']; alike are ['truthfulqa_mc" in capsys.readouterr().err


def test_without_lm_eval(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ArgumentError, match=r"tasks need lm-eval: pip install 'xquant-fx\[tasks\]'"):
        task_report(trained[0], None, ["gsm8k"], {"a": SHORT})

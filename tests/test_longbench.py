"""LongBench: its metrics by hand, its prompts, its files, and a run that is gone on with, laid out as kvpress does."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import pytest
import yaml
from states import range_config
from transformers import AutoTokenizer

from xquant_fx import longbench_report
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate import cli
from xquant_fx.evaluate.tasks import longbench, longbench_data, longbench_metrics
from xquant_fx.evaluate.tasks.kvpress import Evaluation, ResultFolder
from xquant_fx.evaluate.tasks.longbench import Reading, score
from xquant_fx.evaluate.tasks.longbench_data import TASKS, Prompts, prompts, read_items, task_of

pytest_plugins = ["plain_torch"]

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "model"
TEXT = (ROOT / "LICENSE").read_text()
SHORT = range_config(residual_length=16, k_group_size=16, share_values_from=None)
CLASSES = ["Date", "Date of birth", "Place"]


def item(i: int, **fields) -> dict:
    """An item as LongBench's files hold it."""
    return {
        "input": "Who may use the work?", "context": TEXT[500 * i : 500 * i + 800], "answers": ["anyone", "You"],
        "length": 120, "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": f"id-{i}", **fields,
    }  # fmt: skip


def write(path: Path, *items: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in items))


@pytest.mark.parametrize(
    ("metric", "answer", "truth", "expected"),
    [
        ("qa_f1", "The cat, sat", "a CAT sat down.", 0.8),  # 2 words of 2 and of 3
        ("qa_f1", "a dog", "the", 0.0),
        ("qa_f1", "no no", "no", 2 / 3),
        ("count", "There are 3, not 4 or 3.", "3", 2 / 3),
        ("count", "three", "3", 0.0),
        ("retrieval", "Paragraph 12 or 1", "Paragraph 1", 0.5),
        ("retrieval_zh", "段落7", "段落7", 1.0),
        ("classification", "It is a Date of birth", "Date of birth", 1.0),  # "Date" is a part of the true name
        ("classification", "Date or Place", "Place", 0.5),
        ("classification", "neither", "Place", 0.0),
        ("code_sim", "# first\n\nreturn x", "return x", 0.0),  # the empty line is a line, too
        ("code_sim", "\n```python\nreturn xy\n", "return x", 0.94),
        ("code_sim", "// all\n# comments", "x", 0.0),
    ],
)
def test_metric_by_hand(metric, answer, truth, expected):
    assert getattr(longbench_metrics, metric)(answer, truth, CLASSES) == pytest.approx(expected)


def test_rouge_and_chinese():
    pytest.importorskip("rouge")
    assert longbench_metrics.rouge("the cat sat", "the cat slept") == pytest.approx(2 / 3, abs=1e-6)
    assert longbench_metrics.rouge("", "the cat") == 0.0
    pytest.importorskip("jieba")
    assert longbench_metrics.qa_f1_zh("北京\uff0c是首都。", "北京是首都") == 1.0
    assert 0 < longbench_metrics.rouge_zh("北京是首都", "上海是城市") < 1


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    with pytest.raises(ArgumentError, match="this task is scored with rouge: pip install"):
        longbench_metrics.rouge("a", "b")


def row(answer: str, *truths: str, length: int = 100, classes=()) -> dict:
    return {
        "predicted_answer": answer,
        "answers": json.dumps(truths),
        "all_classes": json.dumps(classes),
        "length": length,
    }


def test_scores():
    assert score("hotpotqa", [row("red cat", "dog", "red"), row("x", "y")]) == 33.33  # the best of both: 2 / 3; 0
    assert score("trec", [row("\nPlace\nDate", "Place", classes=CLASSES)]) == 100.0  # the first line counts
    assert score("hotpotqa", [row("\nno\nred", "red")]) == 66.67  # all lines
    by_length = [row("red", "red", length=n) for n in (10, 3999)] + [row("x", "red", length=8000)]
    assert score("hotpotqa_e", by_length) == {"0-4k": 100.0, "8k+": 0.0}


def test_tasks_are_those_with_prompts():
    assert list(prompts()) == list(TASKS) and len(TASKS) == 21
    assert all("{context}" in form for form in prompts().values())
    assert task_of("lcc_e") is TASKS["lcc"]
    with pytest.raises(ArgumentError, match=r"a task of LongBench must be one of .*, got 'nq'"):
        task_of("nq")


def test_files(tmp_path, monkeypatch):
    write(tmp_path / "a" / "trec.jsonl", item(0))
    write(tmp_path / "b" / "data" / "trec.jsonl", item(1))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", json.dumps(item(2)))
    places = [tmp_path / "a", tmp_path / "b", tmp_path / "data.zip"]
    assert [read_items(str(place), "trec")[0]["_id"] for place in places] == ["id-0", "id-1", "id-2"]
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: str(places[2]) if a == longbench_data.HUB else 1
    )
    assert read_items(None, "trec")[0]["_id"] == "id-2"
    for place in (tmp_path, tmp_path / "data.zip"):
        with pytest.raises(ArgumentError, match=r"LongBench's lcc.jsonl must lie in .*, or in its folder data"):
            read_items(str(place), "lcc")
    write(tmp_path / "lcc.jsonl", {"input": "", "context": "", "length": 1, "answers": []})
    with pytest.raises(ArgumentError, match=r"item 0 of lcc lacks \['all_classes'\]"):
        read_items(str(tmp_path), "lcc")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_prompts_are_cut_in_the_middle(tokenizer):
    given, whole = Prompts(tokenizer, 10_000), Prompts(tokenizer, 60)
    long, short = given.of("hotpotqa", item(0)), whole.of("hotpotqa", item(0))
    text = prompts()["hotpotqa"].format(**item(0))
    assert long.ids == tokenizer(text)["input_ids"]
    assert tokenizer.decode(long.ids[long.context :]).startswith("\n\nAnswer the question")  # what follows the context
    cut = tokenizer(text)["input_ids"]
    assert tokenizer.decode(short.ids, skip_special_tokens=True) == tokenizer.decode(
        cut[:30], skip_special_tokens=True
    ) + tokenizer.decode(cut[-30:], skip_special_tokens=True)
    assert len(short.ids) - 1 == short.context  # the question has lost its beginning: its last token is left
    with pytest.raises(ArgumentError, match="max_length must be 2 tokens or more, got 1"):
        Prompts(tokenizer, 1)


def test_chat_template(tokenizer):
    chat = AutoTokenizer.from_pretrained(MODEL)
    chat.chat_template = "{% for m in messages %}<<{{ m.content }}>>{% endfor %}"
    text = chat.decode(Prompts(chat, 10_000).of("hotpotqa", item(0)).ids)
    assert text.startswith("<<Answer the question") and text.endswith("Answer:>>")
    for prompt in (
        Prompts(chat, 10_000).of("trec", item(0)),
        Prompts(chat, 10_000, chat=False).of("hotpotqa", item(0)),
    ):
        assert "<<" not in chat.decode(prompt.ids)


@pytest.fixture(scope="module")
def run(trained, tokenizer, tmp_path_factory):
    """(arguments of a run, its folder)."""
    folder = tmp_path_factory.mktemp("longbench")
    write(folder / "hotpotqa.jsonl", item(0), item(1))
    write(folder / "passage_count.jsonl", item(0, answers=["3"]))
    given = dict(data=str(folder), reading=Reading(limit=1), out=str(folder / "out"))
    return (trained[0], tokenizer, ["hotpotqa", "passage_count"], {"short": SHORT}), given, folder / "out"


def test_report(run, monkeypatch, no_compiler):
    args, given, out = run
    report = longbench_report(*args, **given)
    assert list(report.scores) == ["full precision", "short"]
    assert list(report.scores["short"]) == ["hotpotqa", "passage_count"]
    assert report.same["full precision"] == 1.0 and report.quantized["full precision"] == 0.0
    assert 0.5 < report.quantized["short"] < 1
    text = str(report)
    assert "examples/model, float32: 1 items of each" in text and "average" in text and "read quantized" in text

    ratio = f"{1 - (2 + 16 / 16 * 2 + 1 + 32 / 32) / 2 / 16:.2f}"  # head_dim 32: keys 2 + 2 bits, values 1 + 1
    names = {path.name for path in out.iterdir()}
    assert names == {
        "longbench__hotpotqa__examples--model__no_press__0.00__fraction0.500",
        "longbench__passage_count__examples--model__no_press__0.00",
        f"longbench__hotpotqa__examples--model__short__{ratio}__fraction0.500",
        f"longbench__passage_count__examples--model__short__{ratio}",
    }
    (folder,) = out.glob("*hotpotqa*short*")
    assert json.loads((folder / "metrics.json").read_text()) == report.scores["short"]["hotpotqa"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["press_name"] == "short" and config["data_dir"] == "hotpotqa" and not config["query_aware"]
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [each["_id"] for each in rows] == ["id-0"]
    assert 0 < float(rows[0]["compression_ratio"]) < float(ratio)
    assert int(rows[0]["context_tokens"]) < int(rows[0]["prompt_tokens"]) - 20

    # Nothing is answered again, but what is missing is.
    ran = []
    answer = longbench.write_answer
    monkeypatch.setattr(longbench, "write_answer", lambda *a: ran.append(a) or answer(*a))
    assert longbench_report(*args, **given) == report
    assert ran == []
    (folder / "predictions.csv").write_text((folder / "predictions.csv").read_text().replace("id-0", "id-9"))
    longbench_report(*args, **given)
    assert [each[3] for each in ran] == [SHORT]
    whole = dict(reading=Reading(limit=1, whole_prompt=True, max_length=100))
    longbench_report(*args[:2], ["passage_count"], {"short": SHORT}, **{**given, **whole})
    assert any(path.name.endswith("__max_context100__query_aware") for path in out.iterdir())
    assert ran[-1][2] == len(ran[-1][1]) - 1 <= 100


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    def results(key):
        return ResultFolder(tmp_path, Evaluation("d", "", "a/b", "x y", 0.5, key, "{}"))

    first = results("1")
    assert first.folder == tmp_path / "d__a--b__x-y__0.50"
    first.add({"_id": "i", "predicted_answer": 'two\nlines, and "quotes"', "answers": ["a"]})
    assert results("2").folder == first.folder / "1"
    assert results("3").folder == first.folder / "2"
    again = results("1")
    assert again.folder == first.folder and again.rows == first.rows
    assert again.find("i")["answers"] == '["a"]' and again.find("j") is None
    assert ResultFolder(None, Evaluation("d", "", "m", "p", 0.5, "1", "{}")).folder is None


def test_commands(monkeypatch, capsys, tmp_path, no_compiler):
    monkeypatch.chdir(ROOT)
    write(tmp_path / "passage_count_e.jsonl", item(0, answers=["3"]))
    args = ["examples/model", "--preset", "kivi-2"]
    more = [
        "--tasks",
        "passage_count_e",
        "--data",
        str(tmp_path),
        "--max-length",
        "150",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(["longbench", *args, *more]) == 0
    assert "passage_count_e 0-4k" in capsys.readouterr().out
    (folder,) = (tmp_path / "out").glob("longbench-e__passage_count__examples--model__kivi-2__*__max_context150")
    assert set(json.loads((folder / "metrics.json").read_text())) == {"0-4k"}
    assert cli.main(["longbench", *args, "--tasks", "lcc", "--data", str(tmp_path)]) == 2
    assert "lcc.jsonl must lie in" in capsys.readouterr().err

    needle = ["--text", "LICENSE", "--lengths", "150", "--depths", "0", "0.5", "--trials", "1"]
    assert cli.main(["needle", *args, *needle, "--results", str(tmp_path / "needle")]) == 0
    names = sorted(path.name for path in (tmp_path / "needle").iterdir())
    assert names[0].startswith("passkey__150__examples--model__kivi-2__0.8") and names[1].endswith("__no_press__0.00")
    scores = json.loads((tmp_path / "needle" / names[0] / "metrics.json").read_text())
    assert set(scores) == {"passkey_depth0", "passkey_depth50"} and set(scores["passkey_depth0"]) == {"string_match"}

"""Tests of the shipped example model and of the script that trains it."""

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL = EXAMPLES / "model"
PASSAGE = (
    "The rain had stopped before we came to the village, and the road lay white under the moon. "
    '"You will be tired," said my aunt, taking off her gloves; "sit down by the fire, and I will '
    'ask Martha to bring us some tea." I did as I was told, for I had walked a long way, and had '
    "eaten nothing since the morning. The clock upon the stairs struck nine. Neither of us spoke "
    "for some minutes; and when at last she turned to me, I saw that there were tears in her eyes."
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are too small for more, and the script sets its own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_model", EXAMPLES / "train_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_geometry(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 8
    assert 1 <= config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim >= 32
    assert config.max_position_embeddings >= 1024


def test_weights_are_one_small_file() -> None:
    weights = list(MODEL.glob("*.safetensors"))
    assert [file.name for file in weights] == ["model.safetensors"]
    assert weights[0].stat().st_size <= 8 * 2**20


@pytest.mark.parametrize("text", [PASSAGE, "  two  spaces\n\n\ttab ,don't", "caf\u00e9 \u2014 \u00a33 \U0001f600", ""])
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_and_model_agree(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id


def test_predicts_unseen_english(
    script: ModuleType, tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM
) -> None:
    tokens_per_byte = len(tokenizer(PASSAGE).input_ids) / len(PASSAGE)
    uniform = math.log2(len(tokenizer)) * tokens_per_byte
    bits = script.bits_per_byte(model, tokenizer, PASSAGE, 1024)
    assert 1.0 < bits < 2.6 < uniform


def test_predicts_to_the_end_of_its_context(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    context = model.config.max_position_embeddings
    ids = tokenizer(PASSAGE, return_tensors="pt").input_ids.repeat(1, 8)[:, :context]
    assert ids.shape[1] == context
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert nats[-200:].mean() < nats[:200].mean() + 0.3


def test_reported_numbers_match(script: ModuleType) -> None:
    metrics = json.loads((MODEL / "metrics.json").read_text())
    assert set(metrics["bits_per_byte"]) == set(script.HELD_OUT)
    card = (MODEL / "README.md").read_text()
    for title, bits in metrics["bits_per_byte"].items():
        assert f"| {title} | {bits:.3f} | " in card


@pytest.fixture
def novels(tmp_path: Path) -> Path:
    folder = tmp_path / "novels"
    folder.mkdir()
    for title, copies in (("first", 12), ("second", 1)):
        text = f"{title}\r\n\r\n" + (PASSAGE + "\r\n") * copies
        (folder / f"{title}.txt").write_text(text, encoding="utf-8-sig", newline="")
    return folder


def test_smoke_run(script: ModuleType, novels: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = ["--smoke", "--held-out", "second", "--max-steps", "3", "--minutes", "1"]
    script.main(["--data", str(novels), "--out", str(out), *options])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 3
    assert metrics["novels"] == 1
    assert list(metrics["bits_per_byte"]) == ["second"]
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert "| second |" in (out / "README.md").read_text()


def test_learning_rate_ends_annealed(script: ModuleType) -> None:
    assert script.learning_rate(1.0, 0.0) == 0.0
    assert script.learning_rate(1.0, script.WARMUP_SHARE) == 1.0
    assert script.learning_rate(1.0, 1.5) == pytest.approx(0.0)


def test_missing_data_is_reported(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data"):
        script.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_held_out_must_exist(script: ModuleType, novels: Path) -> None:
    with pytest.raises(SystemExit, match="hold out"):
        script.read_novels(novels, ["third"])


def test_too_little_text_is_reported(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="too few"):
        next(script.batches(torch.arange(100), 64))


def test_batches_cover_the_stream_once(script: ModuleType) -> None:
    stream = torch.arange(100 * 64)
    source = script.batches(stream, 64)
    ids = torch.cat([next(source) for _ in range(4)])  # 99 or 100 windows, 32 to a batch
    assert ids.shape[0] in (99, 100)
    assert len(ids.unique()) == ids.numel()


def test_unwrap_joins_fixed_width_paragraphs(script: ModuleType) -> None:
    wrapped = 'CHAPTER I\n\nIt was a dark and\nstormy night. "Who\nis  there?"\n"A friend."\n'
    assert script.unwrap(wrapped).splitlines() == [
        "CHAPTER I",
        'It was a dark and stormy night. "Who is there?"',
        '"A friend."',
    ]
    assert script.unwrap("") == ""

"""Train the small language model in ``examples/model`` from public-domain novels.

The model exists so that the demo and the tests can show real text offline. It is a Llama with
grouped-query attention, small enough to train on one CPU thread in under an hour::

    python examples/train_model.py --data DIR
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"
HELD_OUT = ("Forster_Angels_1905", "Stevenson_Treasure_1883")
PROMPT = "The old man looked up from the fire, and said"

FULL = {"vocab": 1024, "width": 192, "ffn": 512, "layers": 8, "context": 1024, "short": 256}
SMOKE = {"vocab": 320, "width": 64, "ffn": 96, "layers": 2, "context": 64, "short": 32}
HEAD_DIM = 32
LOCAL = 64  # a short context to measure in: the difference is what the long one is used for
TOKENS_PER_STEP = 2048
SHORT_SHARE = 0.6  # of the time; short sequences are twice as fast, full ones come last
WARMUP_SHARE = 0.02

CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# A small language model of English novels

A Llama of {layers} layers, width {width}, {parameters:,} parameters in bfloat16, grouped-query
attention, head_dim {head_dim}, a context of {context} tokens and a byte-level BPE vocabulary of
{vocab}. It shows real text and real activations offline; do not use it for anything in earnest.
Sample from it: at temperature 0 it soon repeats itself.

It saw {tokens:,} tokens of {novels} English novels in the public domain ({unique_tokens:,} tokens
in all, each paragraph on one line) in {steps:,} steps and {minutes:.0f} minutes on one CPU thread.
These novels were kept out of the tokenizer and the training:

| held out, bits per byte | context {context} | context {local} |
|---|---|---|
{rows}

That is the bits the stored weights need for the whole novel, in windows that overlap by half,
over its UTF-8 bytes; the last two columns differ by what the model makes of the longer context.
To train again (the time sets the schedule, so the weights will differ):

    python examples/train_model.py --data DIR --minutes {minutes:.0f}

A continuation at temperature 0.8:

{sample}

Licence: Apache 2.0 for the weights; the text they were trained on is in the public domain.
"""


def unwrap(text: str) -> str:
    """Give every paragraph one line: some of the novels are broken at a fixed width."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    lengths = sorted(len(line) for line in lines if line) or [0]
    width = lengths[int(0.95 * (len(lengths) - 1))]
    joined = ""
    for line, following in pairwise([*lines, ""]):
        word = following.split(" ")[0]
        # Fixed-width novels have no long lines; a break there is real only if it came early.
        forced = width < 90 and len(line) + 1 + len(word) > width - 2
        broken = word and (forced or line[-1:].islower() or line.endswith(","))
        joined += line + (" " if broken else "\n" if line else "")
    return joined.rstrip("\n")


def read_novels(folder: Path, held_out: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the training and the held-out novels of a folder of text files, by title."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(f"no .txt files in {folder}: give the folder of novels with --data")
    texts = {file.stem: unwrap(file.read_text(encoding="utf-8-sig")) for file in files}
    missing = sorted(set(held_out) - texts.keys())
    if missing or len(held_out) == len(texts):
        raise SystemExit(f"cannot hold out {held_out} of {sorted(texts)}")
    return texts, {title: texts.pop(title) for title in held_out}


def train_tokenizer(texts: list[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every text round-trips through it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
    )


def build_model(size: dict[str, int], end: int) -> LlamaForCausalLM:
    """Create an untrained Llama with three query heads to a key-value head, or two if tiny."""
    heads = size["width"] // HEAD_DIM
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["width"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=HEAD_DIM,
        max_position_embeddings=size["context"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 wastes the first minutes at this width
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    return LlamaForCausalLM(config)


def batches(stream: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Yield shuffled windows of the token stream for ever, cut anew for every pass."""
    rows = max(1, TOKENS_PER_STEP // length)
    if len(stream) < 2 * length:
        raise SystemExit(f"{len(stream)} tokens are too few to train on rows of {length}")
    while True:
        offset = int(torch.randint(length, ()))
        usable = (len(stream) - offset) // length * length
        windows = stream[offset : offset + usable].view(-1, length)
        for picked in torch.randperm(len(windows)).split(rows):
            yield windows[picked]


def learning_rate(peak: float, elapsed: float) -> float:
    """Warm up, then follow a cosine down to zero; ``elapsed`` is the share of the time used."""
    if elapsed < WARMUP_SHARE:
        return peak * elapsed / WARMUP_SHARE
    done = min(1.0, (elapsed - WARMUP_SHARE) / (1 - WARMUP_SHARE))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Take one step on a batch of token ids and return its mean loss in nats."""
    with torch.autocast("cpu", torch.bfloat16):  # 1.3 times as fast as float32 with AVX-512
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: LlamaForCausalLM, stream: torch.Tensor, short: int, args: argparse.Namespace) -> dict[str, float]:
    """Train until the time is used up; the schedule ends annealed on any machine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    budget, start, elapsed = 60 * args.minutes, time.monotonic(), 0.0
    steps, seen, loss, source = 0, 0, 0.0, batches(stream, short)
    # For short rows the plain attention trains faster on a CPU than the fused one.
    model.train().set_attn_implementation("eager")
    bar = tqdm(total=round(budget), unit="s", mininterval=5)
    while elapsed < 1 and steps < args.max_steps:
        if elapsed > SHORT_SHARE and model.config._attn_implementation == "eager":
            model.set_attn_implementation("sdpa")
            source = batches(stream, model.config.max_position_embeddings)
        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, elapsed)
        ids = next(source)
        loss += (train_step(model, optimizer, ids) - loss) / min(steps + 1, 100)
        steps, seen = steps + 1, seen + ids.numel()
        elapsed = (time.monotonic() - start) / budget
        bar.set_postfix(loss=f"{loss:.3f}", tokens=f"{seen / 1e6:.2f}M", refresh=False)
        bar.update(min(bar.total, round(elapsed * budget)) - bar.n)
    bar.close()
    return {"steps": steps, "tokens": seen, "loss": loss, "minutes": elapsed * args.minutes}


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> float:
    """Return the bits per UTF-8 byte of the text, each token seeing half a context or more."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, verbose=False).input_ids]])
    nats, done = 0.0, 1
    while done < ids.shape[1]:
        end = min(done + context // 2, ids.shape[1])
        window, targets = ids[:, max(0, end - context) : end - 1], ids[0, done:end]
        logits = model(window, logits_to_keep=end - done, use_cache=False).logits[0]
        nats += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        done = end
    return nats / math.log(2) / len(text.encode())


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int) -> str:
    """Continue the prompt at temperature 0.8."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": length}
    return tokenizer.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)


def write_card(folder: Path, metrics: dict, text: str) -> None:
    """Write the measurements and the model card that reports them."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    local = metrics["bits_per_byte_local"]
    rows = [f"| {title} | {bits:.3f} | {local[title]:.3f} |" for title, bits in metrics["bits_per_byte"].items()]
    quoted = "\n".join(f"> {line}\n>" for line in text.splitlines())
    card = CARD.format(rows="\n".join(rows), sample=quoted, head_dim=HEAD_DIM, local=LOCAL, **metrics)
    (folder / "README.md").write_text(card)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "novels")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "model")
    parser.add_argument("--held-out", nargs="+", default=HELD_OUT, help="file names, no suffix")
    parser.add_argument("--minutes", type=float, default=50, help="time to train for")
    parser.add_argument("--max-steps", type=int, default=10**9, help="stop earlier, unannealed")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the script")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, store, reload and measure the model."""
    args = parse_args(argv)
    size = SMOKE if args.smoke else FULL
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    novels, held_out = read_novels(args.data, args.held_out)
    tokenizer = train_tokenizer(list(novels.values()), size["vocab"], size["context"])
    encoded = [tokenizer(text + END, verbose=False).input_ids for text in novels.values()]
    model = build_model(size, tokenizer.eos_token_id)
    stream = torch.tensor([token for ids in encoded for token in ids])
    metrics = train(model, stream, size["short"], args)

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # Measure what was stored: the weights as rounded to bfloat16.
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    for name, context in (("bits_per_byte", size["context"]), ("bits_per_byte_local", LOCAL)):
        metrics[name] = {title: bits_per_byte(model, tokenizer, text, context) for title, text in held_out.items()}
    metrics |= {"novels": len(novels), "unique_tokens": len(stream)}
    metrics |= {"parameters": model.num_parameters(), "seed": args.seed, **size}
    write_card(args.out, metrics, sample(model, tokenizer, size["context"] // 5))
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()

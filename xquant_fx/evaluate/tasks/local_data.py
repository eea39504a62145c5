"""Datasets of the Hub from a folder, in the Hub's own files, so that benchmarks run without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xquant_fx.errors import ArgumentError

#: Ending of a file to the builder of `datasets` that reads it.
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@contextmanager
def local_datasets(folder: str | Path | None) -> Iterator[None]:
    """While the block runs, ``datasets.load_dataset`` reads Hub ids from ``folder``; None: from the Hub, as always.

    A dataset ``owner/name`` is looked for in ``folder/owner/name`` and ``folder/name``; a configuration in the folder
    of its name in there, or in there. The part of a file's name before the first "-" or "." is its split, as in
    ``openai/gsm8k/main/test-00000-of-00001.parquet`` or ``gsm8k/main/test.jsonl``.

    Raises:
        ArgumentError: a dataset that is asked for is not in the folder.
    """
    if folder is None:
        yield
        return
    import datasets

    before = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **given: Any) -> Any:
        builder, files = data_files(Path(folder), path, name or given.get("data_dir"))
        return before(builder, data_files=files, split=given.get("split"))

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = before


def data_files(folder: Path, dataset: str, config: str | None) -> tuple[str, dict[str, list[str]]]:
    """(builder, split to its files) of a dataset and configuration under ``folder``.

    Raises:
        ArgumentError: none is found, or files of several kinds.
    """
    homes = [folder / dataset, folder / dataset.rsplit("/", 1)[-1]]
    places = [place for home in homes for place in ((home / config, home) if config else (home,))]
    for place in places:
        found = sorted(p for p in place.glob("*") if p.suffix in BUILDERS)
        if not found:
            continue
        kinds = {BUILDERS[p.suffix] for p in found}
        if len(kinds) > 1:
            raise ArgumentError(f"the files of a dataset must be of one kind, got {[p.name for p in found]} in {place}")
        splits: dict[str, list[str]] = {}
        for path in found:
            splits.setdefault(re.split(r"[-.]", path.name)[0], []).append(str(path))
        return kinds.pop(), splits
    looked = ", ".join(map(str, places))
    raise ArgumentError(f"{dataset!r} must be under {folder}, as .parquet or .jsonl; looked in {looked}")

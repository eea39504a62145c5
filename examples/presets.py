"""What each preset really takes: fill a cache with random keys and values and count every byte.

    python examples/presets.py
    python examples/presets.py --tokens 8192 --head-dim 64
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from xquant_fx import PRESETS, XQuantCache, XQuantConfig, memory_report
from xquant_fx.reports.memory import MemoryReport

LAYERS = 4  # a cache of twice as many layers takes twice the bytes and the same bits per element


def filled(config: XQuantConfig, tokens: int, head_dim: int) -> MemoryReport:
    """Report on a cache that was made for ``tokens`` tokens and holds as many."""
    model_config = LlamaConfig(
        num_hidden_layers=LAYERS, num_attention_heads=1, num_key_value_heads=1, head_dim=head_dim, hidden_size=head_dim
    )
    cache = XQuantCache(model_config, max_cache_len=tokens, config=config)
    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, 1, tokens, head_dim, dtype=torch.bfloat16).unbind()
        cache.update(keys, values, layer)
    return memory_report(cache)


def main(argv: list[str] | None = None) -> None:
    """Print one row a preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args(argv)
    title = f"{args.tokens} tokens, head_dim {args.head_dim}, bfloat16"
    table = Table("preset", "bits per element", "times smaller", "codes alone", title=title, title_justify="left")
    for name in PRESETS:
        report = filled(XQuantConfig.preset(name), args.tokens, args.head_dim)
        codes = 8 * report.codes / report.elements
        table.add_row(name, f"{report.bits_per_element:.2f}", f"{report.ratio:.1f}", f"{codes:.2f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()

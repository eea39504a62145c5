"""Benchmarks through a quantized cache: lm-evaluation-harness, LongBench, and results in the layout of kvpress."""

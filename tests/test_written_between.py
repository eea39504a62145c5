"""Buffers that compiled code reads and uncompiled code writes to: such caches are told of, cross attention is not."""

from __future__ import annotations

import logging

import pytest
import torch
from stepping import interpreted

from xquant_fx import warn_once

sdpa = torch.nn.functional.scaled_dot_product_attention


def out_of_cat(buffer, at, x):
    torch.cat([buffer[:, :, :at], x], dim=2, out=buffer[:, :, : at + 1])


def out_of_add(buffer, at, x):
    torch.add(x, 0, out=buffer[:, :, at : at + 1])


@torch._dynamo.disable
def uncompiled(buffer, at, x):
    buffer[:, :, at : at + 1] = x


def once(buffer, at, x):
    """As the first step of a prompt writes what is read by cross attention."""
    if at == 0:
        uncompiled(buffer, at, x)


def run(write, steps=5, **options):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)

    def step(q, k, v, keys, values, at):
        write(keys, at, k)
        write(values, at, v)
        return sdpa(q, keys, values)

    mine, theirs = ([torch.zeros(1, 2, 16, 8) for _ in range(2)] for _ in range(2))
    compiled = torch.compile(step, backend=interpreted(**options))
    with torch.no_grad():
        for at in range(steps):
            x = torch.randn(3, 1, 2, 1, 8, generator=generator).unbind()
            assert torch.equal(compiled(*x, *mine, at), step(*x, *theirs, at))


@pytest.mark.parametrize("write, told", [(out_of_cat, True), (out_of_add, True), (uncompiled, True), (once, False)])
def test_what_is_written_between_steps(write, told, caplog):
    warn_once.forget()
    with caplog.at_level(logging.WARNING, "xquant_fx"):
        run(write)
    assert ("written between its steps" in caplog.text) == told
    if not told:
        run(write, strict=True)
        return
    with pytest.raises(Exception, match=r"strict=True: 2 KV cache\(s\) are not quantized"):
        run(write, strict=True)

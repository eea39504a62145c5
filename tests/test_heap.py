"""Memory that a prompt's layers free one after the other is not given back in between, and zeros take none."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xquant_fx.cache.heap import with_zeros

#: Prints how many blocks malloc maps from the system, outside its heap, for a tensor of 20 MB, and for one of 31 later.
#: What malloc has learned is a process's.
PROGRAM = """
import ctypes, torch
from xquant_fx.cache.heap import keep_freed_memory
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks e f g h i j".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
def mapped(size):
    before = info().hblks
    block = torch.empty(size << 20, dtype=torch.uint8)
    return info().hblks - before
print(mapped(20))
with torch.device("meta"):  # whatever device tensors are made on elsewhere
    keep_freed_memory()
print(mapped(31))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc tells what it maps from 2.33 on")
def test_blocks_of_many_megabytes_come_from_the_heap() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "0"]


@pytest.mark.parametrize("tokens", [20, 30, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_behind_tokens(tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 20, 16).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    whole = with_zeros(x, tokens)
    assert torch.equal(whole, torch.nn.functional.pad(x, (0, 0, 0, tokens - 20))) and whole.dtype == dtype
    assert whole is x or whole.data_ptr() != x.data_ptr()
    whole += 1  # it is an ordinary tensor
    assert bool((whole[:, :, 20:] == 1).all())


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much is in memory there")
def test_many_zeros_behind_tokens_take_no_memory() -> None:
    x = torch.ones(1, 1, 16, 64)
    before = resident()
    whole = with_zeros(x, 1 << 20)
    assert whole.nbytes == 1 << 28 and resident() - before < 1 << 24
    del whole

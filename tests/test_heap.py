"""Memory that a prompt's layers free one after the other is not given back to the system in between."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

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

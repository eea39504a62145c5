"""Memory of temporaries: what a prompt's layers free stays with the process until the next layer asks for it, and zeros
behind the tokens of a cache take none.

Each layer allocates and frees the same tens of MB. glibc gives free memory at the end of its heap back to the system
from a threshold on, which is twice the largest block that was mapped and freed so far (``mallopt(3)``,
M_MMAP_THRESHOLD): the next layer then meets fresh pages, which the system fills with zeros, one fault each. Caches that
allocate layer by layer hold the end of the heap without knowing it. Ours lies together, below all that.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from xquant_fx.tracing import is_transformed

#: Bytes of the largest block that glibc learns from, 32 MiB, but for its header.
LARGEST = (32 << 20) - (1 << 16)
#: Bytes from which on zeros are asked of the system, which gives pages of them as they are touched.
MANY_ZEROS = 1 << 20


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of free memory from now on; nothing elsewhere.

    As any program that frees a tensor of 32 MB does. The block is not touched, so it takes no memory.
    """
    with torch.inference_mode(False):
        torch.empty(LARGEST, dtype=torch.uint8, device="cpu")  # whatever torch.set_default_device says


def with_zeros(x: Tensor, tokens: int) -> Tensor:
    """``x`` [B, H, n, D] with zeros behind it, [B, H, tokens, D]; ``x`` itself if there are as many.

    On a CPU many zeros are read from where there is no memory: a cache with room for 32,768 tokens that holds 1,000 is
    dequantized as fast as one with room for 2,000.
    """
    batch, heads, held, dim = x.shape
    if held == tokens:
        return x
    zeros = batch * heads * (tokens - held) * dim * x.element_size()
    if x.device.type != "cpu" or zeros < MANY_ZEROS or is_transformed(x) or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.nn.functional.pad(x, (0, 0, 0, tokens - held))
    size = batch * heads * tokens * dim * x.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=x.dtype).view(batch, heads, tokens, dim)
    whole[:, :, :held] = x
    return whole

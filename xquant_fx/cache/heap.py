"""What a prompt's layers free stays with the process until the next layer asks for it.

Each layer allocates and frees the same tens of MB. glibc gives free memory at the end of its heap back to the system
from a threshold on, which is twice the largest block that was mapped and freed so far (``mallopt(3)``,
M_MMAP_THRESHOLD): the next layer then meets fresh pages, which the system fills with zeros, one fault each. Caches that
allocate layer by layer hold the end of the heap without knowing it. Ours lies together, below all that.
"""

from __future__ import annotations

import torch

#: Bytes of the largest block that glibc learns from, 32 MiB, but for its header.
LARGEST = (32 << 20) - (1 << 16)


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of free memory from now on; nothing elsewhere.

    As any program that frees a tensor of 32 MB does. The block is not touched, so it takes no memory.
    """
    with torch.inference_mode(False):
        torch.empty(LARGEST, dtype=torch.uint8, device="cpu")  # whatever torch.set_default_device says

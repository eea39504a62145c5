"""Tensors whose memory several caches share, page by page, until one of them writes to a page.

Their bytes lie in a file of memory (``memfd_create``) that nobody writes any more. Each cache maps it privately: it
reads the file's pages, and a first write to one makes a copy of that page which is its own. The system does so, whoever
writes: nothing that is done to one cache is seen by another, kernels meet plain tensors, and no graph is compiled anew.

Relied on, Linux alone: private mappings of a ``memfd`` by ``torch.from_file``, and ``/proc/self/pagemap``, which tells
the pages of a mapping that are no longer the file's (Linux, Documentation/admin-guide/mm/pagemap.rst). Checked on torch
2.11 and 2.13.
"""

from __future__ import annotations

import functools
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

PAGE = mmap.PAGESIZE
#: Bytes of the smallest tensor that is shared; smaller ones are copied.
LEAST = 2 * PAGE
#: Bits of an entry of ``pagemap``: the page is in memory, is swapped out, is that of a file.
PRESENT, SWAPPED, OF_FILE = 63, 62, 61


class Frozen:
    """A file of memory that holds the bytes of ``tensors``, each from a page of its own on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        pages = [-(-tensor.nbytes // PAGE) for tensor in tensors]
        self.offsets = [PAGE * sum(pages[:i]) for i in range(len(pages))]
        self.size = PAGE * sum(pages)
        self.descriptor = os.memfd_create("xquant")
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, self.size)
        there = self.mapped(shared=True)
        for tensor, offset in zip(tensors, self.offsets, strict=True):
            _copy_pages(tensor, there[offset : offset + tensor.nbytes])

    def mapped(self, shared: bool = False) -> Tensor:
        """Its bytes, uint8: what is written to them goes to the file if ``shared``, else to pages of one's own."""
        path = f"/proc/self/fd/{self.descriptor}"
        return torch.from_file(path, shared=shared, size=self.size, dtype=torch.uint8)

    @property
    def pages(self) -> int:
        """Pages that take memory: those that were zeros throughout take none until somebody reads them."""
        return os.fstat(self.descriptor).st_blocks * 512 // PAGE


def _copy_pages(source: Tensor, target: Tensor) -> None:
    """Copy bytes but for pages of zeros, which a new file holds already."""
    flat = source.reshape(-1).view(torch.uint8)
    whole = flat.numel() // PAGE * PAGE
    pages = flat[:whole].view(-1, PAGE)
    (used,) = (pages.view(torch.int64) != 0).any(1).nonzero(as_tuple=True)
    target[:whole].view(-1, PAGE)[used] = pages[used]
    target[whole:] = flat[whole:]


class View:
    """A private mapping of a file."""

    def __init__(self, file: Frozen) -> None:
        self.file, self.bytes = file, file.mapped()

    def tensors(self, like: Iterable[Tensor]) -> list[Tensor]:
        """What the file was made from, each with a storage of its own, as graphs and ``safetensors`` want it."""
        buffer, made = self.bytes.numpy(), []
        for tensor, offset in zip(like, self.file.offsets, strict=True):
            flat = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            made.append(flat.resize_(tensor.shape))
            _views[made[-1]] = self
        return made

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors of this mapping, all of them."""
        begin = self.bytes.data_ptr()
        return [tensor.data_ptr() - begin for tensor in tensors] == self.file.offsets

    @property
    def own(self) -> Tensor:
        """Whether each page was written to since: bool [pages]."""
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            read = os.pread(descriptor, 8 * (self.file.size // PAGE), 8 * (self.bytes.data_ptr() // PAGE))
        finally:
            os.close(descriptor)
        entries = torch.frombuffer(bytearray(read), dtype=torch.int64)
        there = (entries >> PRESENT | entries >> SWAPPED) & 1
        return (there & ~(entries >> OF_FILE)).bool()

    def pages_of(self, tensor: Tensor) -> slice:
        """The pages that ``tensor`` lies in: none if its memory is another by now (``share_memory_``, ``set_``)."""
        begin = tensor.data_ptr() - self.bytes.data_ptr()
        if begin not in self.file.offsets:
            return slice(0)
        return slice(begin // PAGE, -(-(begin + tensor.nbytes) // PAGE))

    def copied(self) -> View:
        """Another mapping with the same contents."""
        new, own = View(self.file), self.own
        new.bytes.view(-1, PAGE)[own] = self.bytes.view(-1, PAGE)[own]
        return new


#: The mapping that a tensor lies in; it lives as long as one of its tensors does.
_views: WeakIdKeyDictionary = WeakIdKeyDictionary()


def can_be_shared(tensor: Tensor) -> bool:
    """Whether :func:`share` takes it."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= LEAST


def is_shared(tensor: Tensor) -> bool:
    """Whether it lies in pages that others may share."""
    view: View | None = _views.get(tensor)
    return view is not None and view.pages_of(tensor) != slice(0)


@torch.inference_mode(False)
@torch.no_grad()
def share(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Two sets of tensors with these contents, of equal shapes and dtypes, which share what neither writes to.

    The first is to take the place of ``tensors``, or is these; the other is for a copy. Only where ``why_not()`` is "".
    """
    view: View | None = _views.get(tensors[0])
    if view is not None and view.holds(tensors) and 2 * int(view.own.sum()) <= view.file.pages:
        return list(tensors), view.copied().tensors(tensors)
    file = Frozen(tensors)
    return View(file).tensors(tensors), View(file).tensors(tensors)


def shared_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of ``tensors`` that lie in pages which they did not write to since they were shared."""
    found: dict[int, tuple[View, list[Tensor]]] = {}
    for tensor in tensors:
        if (view := _views.get(tensor)) is not None:
            found.setdefault(id(view), (view, []))[1].append(tensor)
    total = 0
    for view, held in found.values():
        own = view.own
        total += sum(int((~own[view.pages_of(tensor)]).sum()) for tensor in held)
    return PAGE * total


@functools.cache
def why_not() -> str:
    """Why memory cannot be shared so on this system, in words; "" if it can."""
    if not hasattr(os, "memfd_create"):
        return "memory is shared on Linux alone"
    try:
        (mine,), (other,) = share([torch.ones(LEAST, dtype=torch.uint8)])
        other[0] = 2
        seen = _views[mine].own.tolist(), _views[other].own.tolist(), int(mine[0])
    except (OSError, RuntimeError) as error:
        return f"this system shares no memory: {error}"
    told = seen == ([False, False], [True, False], 1)
    return "" if told else "/proc/self/pagemap does not tell which pages were written"

"""Who else sees a tensor's memory. Relied on: ``Tensor._is_view``. Checked on torch 2.11, 2.13 and 2.14."""

from __future__ import annotations

from torch import Tensor


def is_view(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a view of another one."""
    return bool(tensor._is_view())


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, or two fake ones, lie in one storage."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata

"""Where the sums of a program go, for ``combine_kernel`` to merge."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_part(part, stats, index, valid_rows, sums, V_DIM: tl.constexpr):
    """Sums of a split to places ``index`` [ROWS]: unnormalized output, top and total of each row."""
    top, total, acc = sums
    d = tl.arange(0, acc.shape[0])
    # Rows with no token in this split have total 0, and their part is not read either.
    in_bounds = (d < V_DIM)[:, None] & (valid_rows & (total != 0))[None, :]
    tl.store(part + index[None, :] * V_DIM + d[:, None], acc, mask=in_bounds)
    tl.store(stats + index * 2, top, mask=valid_rows)
    tl.store(stats + index * 2 + 1, total, mask=valid_rows)

"""Moving a state to tensors for more tokens, or fewer: what both can hold stays as it is, codes included."""

from __future__ import annotations

from xquant_fx.cache.state import KVState
from xquant_fx.kernels.packing import planes_of_both
from xquant_fx.plan.spec import KVSpec


def enlarge(state: KVState, max_len: int) -> None:
    """Move ``state`` to tensors with room for ``max_len`` tokens.

    So do those that borrow its codes: a step that breaks off between the two layers leaves them alike.
    """
    respec(state, state.spec.with_room(max_len))
    for upper in state.borrowers:
        enlarge(upper, max_len)


def respec(state: KVState, spec: KVSpec) -> None:
    """Move ``state`` to the tensors of ``spec``, which differ in how many tokens there is room for.

    Of codes that start over under ``spec`` no quantized token may be past the first round yet.
    """
    state.group.settle()
    state.spec = spec
    for name, (shape, dtype) in spec.tensor_shapes().items():
        old = state.owned[name]
        if tuple(old.shape) != shape:
            state.owned[name] = new = old.new_zeros(shape, dtype=dtype)
            is_packed_along_tokens = name == "codes" and spec.quantized and old.shape[2] != shape[2]
            planes = planes_of_both(spec.bits, new, old) if is_packed_along_tokens else [(new, old)]
            for target, source in planes:
                both = tuple(slice(0, min(sizes)) for sizes in zip(target.shape, source.shape, strict=True))
                target[both] = source[both]
    state.group.collected.clear()

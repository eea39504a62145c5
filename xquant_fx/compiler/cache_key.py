"""Make Inductor's caches miss when our sources or settings change, or the processor.

Both the FX graph cache and AOTAutograd's cache hash the uuid of the custom passes that Inductor is configured with, but
not the bodies of ops such as ours. So a pass that does nothing carries a hash of our sources; passes that the user set
run as before and their uuids are part of ours. Nor do they hash what the processor can: C++ for vectors of 16 numbers
would be compiled for 8 where a folder goes to another machine, or ``ATEN_CPU_CAPABILITY`` is set, and give anything.
Relied on: Inductor's ``post_grad_custom_pre_pass``, one pass or (from torch 2.13 on) several. Checked on torch 2.11,
2.13 and 2.14.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from xquant_fx.kernels.cpu.kept_call import machine

_InferenceAware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())


@functools.cache
def source_hash() -> bytes:
    """Hash of every source file of the package."""
    root = Path(__file__).parents[1]
    folders = (root, root / "passes", root / "kernels")  # links, in a checkout, which rglob does not follow
    files = sorted({p.resolve() for d in folders for kind in ("*.py", "*.cpp", "*.h") for p in d.rglob(kind)})
    return get_hash_for_files(tuple(str(f) for f in files))


class KeyPass(CustomGraphPass):
    """Changes nothing; its uuid covers our sources, the machine, ``settings`` and the user's own passes."""

    def __init__(self, settings: str, others: tuple[Any, ...] = ()) -> None:
        self.settings, self.others = settings, others

    def __call__(self, graph: Any) -> None:
        for other in self.others:
            if isinstance(other, _InferenceAware):  # a graph with a quantized cache has no backward
                other(graph, is_inference=True)
            else:
                other(graph)

    def uuid(self) -> Any:
        """What the caches hash; None (do not cache) if one of the user's passes has none."""
        others = tuple(other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others)
        return (source_hash(), str(machine()), self.settings, *others) if all(others) else None


def cache_key_patch(settings: str) -> dict[str, Any]:
    """Inductor config patch that carries the key."""
    set_by_user = inductor_config.post_grad_custom_pre_pass
    if not isinstance(set_by_user, list | tuple):
        set_by_user = () if set_by_user is None else (set_by_user,)
    return {"post_grad_custom_pre_pass": KeyPass(settings, tuple(set_by_user))}

"""Dynamo's frames: whether a graph is a part of the user's function, and having it traced anew.

Relied on: ``gm.compile_subgraph_reason``, ``torch_dynamo_resume`` in the names of frames,
``torch._dynamo.utils.orig_code_map``, ``eval_frame.reset_code``. Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import sys

from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.utils import orig_code_map
from torch.fx import GraphModule


def is_partial(gm: GraphModule) -> bool:
    """Whether a graph break made this graph a part of the user's function."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None:
        return False
    frames = [frame.name for frame in reason.user_stack]
    return bool(reason.graph_break) or any(name.startswith("torch_dynamo_resume") for name in frames)


def forget_compiled_frame() -> bool:
    """Have Dynamo trace the function whose compiled code is calling us anew at its next call.

    torch 2.11 does not guard on the class of a module's buffers: it would not notice that they are
    quantized now. Relied on: ``convert_frame.orig_code_map``, ``eval_frame.reset_code``.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = orig_code_map.get(frame.f_code)
        if code is not None:
            reset_code(code)
            return True
        frame = frame.f_back
    return False

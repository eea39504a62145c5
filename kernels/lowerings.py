"""Inductor lowerings: C++ kernels of ours become part of the module that Inductor generates.

Private torch APIs, all of them here: ``register_lowering``, ``ir.ExternKernel`` and ``ExternKernelOut``,
``ir.MutationOutput``, ``V.graph``, the wrapper's ``define_kernel`` and ``src_to_kernel``. Checked on
torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from xquant_fx.errors import ConfigError
from xquant_fx.kernels.cpu import build as cpu_build
from xquant_fx.kernels.cpu.any_room import rooms
from xquant_fx.kernels.cpu.one_call import add_hook
from xquant_fx.kernels.decode_attention import cpu_call as attention
from xquant_fx.kernels.decode_attention import cpu_source as cpu_attention
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.linear_rows import cpu_call as linear
from xquant_fx.kernels.linear_rows import cpu_source as cpu_linear
from xquant_fx.kernels.linear_rows.arguments import LinearArguments
from xquant_fx.kernels.quantize_store import cpu_call as append
from xquant_fx.kernels.quantize_store import cpu_source as cpu_store
from xquant_fx.kernels.quantize_store.arguments import StoreArguments


def contiguous(x: Any) -> Any:
    """An IR tensor as one block of memory; computed once for all who read it, such as the mask of all layers."""
    x.realize()  # or each of them would compute it into a buffer of its own
    return ir.ExternKernel.require_contiguous(x)


def sizes(x: Any) -> tuple[int, ...]:
    """Static sizes of an IR tensor."""
    return tuple(V.graph.sizevars.guard_int(size) for size in x.get_size())


class Told(int):
    """A size that a kernel is told at each call: dimension ``dim`` of ``tensor``, which may be another one then."""

    tensor: Any
    dim: int

    @classmethod
    def of(cls, size: int, tensor: Any, dim: int) -> Told:
        """The ``size`` of the example."""
        told = cls(size)
        told.tensor, told.dim = tensor, dim
        return told

    def __str__(self) -> str:
        """In the wrapper's Python."""
        return f"{self.tensor.codegen_reference()}.size({self.dim})"


def sizes_told(x: Any) -> tuple[int, ...]:
    """The same; of an input that may have another room than its example (``cpu/any_room.py``), as ``Told``."""
    found, of_graph = sizes(x), rooms()
    if of_graph is None or x.get_name() not in {V.graph.graph_input_names[i] for i in of_graph.inputs}:
        return found
    return tuple(Told.of(size, x, dim) for dim, size in enumerate(found))


def dtype(x: Any) -> torch.dtype:
    """Dtype of an IR tensor."""
    return x.get_dtype()


def begin(types: tuple[str, ...], code: str) -> None:
    """Let the compiler begin with a kernel while Inductor goes on with the graph; ``define`` names it the same."""
    if not V.graph.cpp_wrapper:
        cpu_build.begin_kernel(types, f"\n{code}")


def _itemsizes() -> dict[str, int]:
    """Bytes of an element of each tensor that the graph is given, by its name in the wrapper."""
    given = V.graph.graph_inputs.items()
    dtypes = {name: each.maybe_get_dtype() for name, each in given if hasattr(each, "maybe_get_dtype")}
    return {name: dtype.itemsize for name, dtype in dtypes.items() if dtype is not None}


def define(wrapper: Any, name: str, types: tuple[str, ...], code: str) -> str:
    """Put a kernel's source into the generated module, once; returns what it is called there."""
    if V.graph.cpp_wrapper:
        raise ConfigError("the kernels for quantized KV caches need Inductor's Python wrapper: turn cpp_wrapper off")
    if code not in wrapper.src_to_kernel:
        add_hook(wrapper, _itemsizes())
        called = wrapper.src_to_kernel[code] = f"cpp_{name}_{wrapper.next_kernel_suffix()}"
        body = f"async_compile.cpp_pybinding({list(types)!r}, r'''\n{code}''')"
        declaration = code[code.rfind('extern "C"') :].split("{", 1)[0] + ";\n"
        wrapper.define_kernel(called, body, gpu=False, cpp_definition=declaration)
    return wrapper.src_to_kernel[code]


def write_call(wrapper: Any, op: CppOut | CppInPlace, tensors: list[Any]) -> None:
    """Put a call of the kernel of ``op`` into the generated module: with ``tensors``, then its numbers."""
    name = define(wrapper, op.kernel, op.types, op.code)
    args = [*(x.codegen_reference() for x in tensors), *map(str, op.numbers)]
    wrapper.writeline(f"{name}({', '.join(args)})")


class CppOut(ir.ExternKernelOut):
    """A call of a C++ kernel that writes one new tensor, its last argument but for numbers."""

    def __init__(
        self,
        layout: ir.Layout,
        inputs: list[Any],
        name: str,
        types: tuple[str, ...],
        code: str,
        numbers: tuple[int, ...] = (),
    ) -> None:
        super().__init__(layout, inputs)
        begin(types, code)
        self.kernel, self.types, self.code, self.numbers = name, types, code, numbers

    def codegen(self, wrapper: Any) -> None:
        """Define the kernel if it is new, and call it."""
        write_call(wrapper, self, [*self.inputs, self])


@register_lowering(torch.ops.xquant.decode_attention_cpu.default, type_promotion_kind=None)
def decode_attention_cpu(*args: Any, **kwargs: Any) -> Any:
    """One C++ kernel in the generated module."""
    a: Any = DecodeArguments(*args, **kwargs).mapped(contiguous)  # of Inductor's buffers
    types, code = cpu_attention.source(attention.problem_of(a, sizes, dtype), cpu_build.isa())
    numbers = tuple(attention.sizes_given(a, sizes_told))
    shape = (*sizes(a.q)[:3], sizes(a.v_ring)[3])
    layout = ir.FixedLayout(a.q.get_device(), a.q.get_dtype(), list(shape), ir.FlexibleLayout.contiguous_strides(shape))
    return ir.TensorBox.create(
        CppOut(layout, list(a.tensors.values()), "xquant_decode_attention", types, code, numbers)
    )


@register_lowering(torch.ops.xquant.linear_rows.default, type_promotion_kind=None)
def linear_rows(*args: Any, **kwargs: Any) -> Any:
    """One C++ kernel for all sizes in the generated module."""
    a: Any = LinearArguments(*args, **kwargs).mapped(contiguous)  # of Inductor's buffers
    problem, numbers = linear.problem_of(a, sizes, dtype), linear.sizes_given(a, sizes)
    types, code = cpu_linear.source(problem, cpu_build.isa())
    layout = ir.FixedLayout(a.x.get_device(), a.x.get_dtype(), [problem.rows * sum(numbers[1:])], [1])
    return ir.TensorBox.create(CppOut(layout, a.tensors, "xquant_linear_rows", types, code, tuple(numbers)))


class CppInPlace(ir.ExternKernel):
    """A call of a C++ kernel that changes some of its arguments and returns nothing."""

    def __init__(
        self,
        inputs: list[Any],
        mutated: list[Any],
        name: str,
        types: tuple[str, ...],
        code: str,
        numbers: tuple[int, ...] = (),
    ) -> None:
        begin(types, code)
        self.device = inputs[0].get_device()
        none = ir.NoneLayout(device=self.device)
        super().__init__(None, none, self.unwrap_storage(inputs))
        self.kernel, self.types, self.code, self.numbers = name, types, code, numbers
        changed: list[Any] = list(self.unwrap_storage(mutated))
        self.mutation_outputs = [ir.MutationOutput(none, x, self) for x in changed]
        self.name = V.graph.register_buffer(self)
        V.graph.register_operation(self)

    def get_outputs(self) -> list[Any]:
        """The changed tensors, for the scheduler."""
        return [self, *self.mutation_outputs]

    def should_allocate(self) -> bool:
        """Nothing to allocate."""
        return False

    def get_device(self) -> Any:
        """Where it runs."""
        return self.device

    def get_unbacked_symbol_defs(self) -> Any:
        """It makes no sizes."""
        return OrderedSet()

    def codegen(self, wrapper: Any) -> None:
        """Define the kernel if it is new, and call it."""
        write_call(wrapper, self, [*self.inputs])


def _of_some_length(a: StoreArguments) -> StoreArguments:
    """``a``, by which it shows whether codes start over: of any length, those do that have not room for all tokens."""
    if isinstance(a.max_len, int):
        return a
    has_room_for_all = any(isinstance(size, Told) for size in sizes_told(a.codes))
    return a.replace(max_len=0 if has_room_for_all else sys.maxsize)


def append_cpu(*args: Any, **kwargs: Any) -> None:
    """One C++ kernel in the generated module; the stored tensors are changed in place."""
    new = ("x", "pos")
    a = StoreArguments(*args, **kwargs).mapped(contiguous, new)
    a = a.mapped(ir.ExternKernel.realize_input, set(a.tensor_names()) - set(new))
    types, code = cpu_store.source(append.problem_of(_of_some_length(a), sizes, dtype), cpu_build.isa())
    written = [a.tensors[name] for name in a.written(a.overload) if name in a.tensors]
    numbers = tuple(append.sizes_given(a, sizes_told))
    CppInPlace(list(a.tensors.values()), written, "xquant_append", types, code, numbers)


for _overload in (torch.ops.xquant.append_cpu.default, torch.ops.xquant.append_cpu.borrowed):
    register_lowering(_overload, type_promotion_kind=None)(append_cpu)

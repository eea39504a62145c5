"""Kernels by one call: what is read of a generated wrapper, what is refused, and that a step stays the same."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
from dynamo_graphs import fresh
from rewrites import ALONE, quantized_layers, two_layers
from torch import Tensor
from torch._dynamo.utils import counters

from xquant_fx.kernels.cpu.one_call import joined
from xquant_fx.kernels.cpu.one_call_source import Kernels, source
from xquant_fx.kernels.cpu.one_unit import UnitCompile, may_be_joined
from xquant_fx.kernels.cpu.wrapper_code import NotReadError, Size, WrapperCode, read_wrapper

WRAPPER = """
def call(self, args):
    arg0_1, arg1_1, arg2_1 = args
    args.clear()
    s7 = arg2_1
    assert_size_stride(arg0_1, (4, 8), (8, 1), 'input')
    buf0 = empty_strided_cpu((4, 8), (8, 1), torch.float32)
    cpp_a(arg0_1, buf0)
    buf1 = reinterpret_tensor(buf0, (2, 8), (8, 1), 16)  # alias
    buf2 = empty_strided_cpu((100, ), (1, ), torch.bfloat16)
    cpp_b(buf1, buf2, 576)
    del buf1
    buf3 = buf0; del buf0  # reuse
    cpp_a(reinterpret_tensor(arg1_1, (8, 4), (4, 1), 0), buf3, s7)
    del buf3
    buf4 = empty_strided_cpu((32, ), (1, ), torch.float32)
    buf5 = empty_strided_cpu((2, 3), (3, 1), torch.int64)
    cpp_c(buf4, buf5)
    return (reinterpret_tensor(buf5, (3, 2), (1, 3), 0), arg0_1, None, 1 + s7, 40, )
"""


def function(text: str) -> ast.FunctionDef:
    found = ast.parse(text).body[0]
    assert isinstance(found, ast.FunctionDef)
    return found


def addresses(code: WrapperCode) -> list[str]:
    """What each kernel gets, in words of the C++ source."""
    kernels = Kernels(sorted({call.name for call in code.calls}), {})
    _, text = source(code, kernels, [*code.allocated, "arg0_1", "arg1_1"], ["arg2_1"])
    return re.findall(r"kernels\[(.*)\);", text)


def test_what_is_read() -> None:
    code = read_wrapper(function(WRAPPER))
    assert code.arguments == ["arg0_1", "arg1_1", "arg2_1"]
    assert addresses(code) == [
        "0])(t1 + 0, scratch + 0",
        "1])(scratch + 64, scratch + 128, 576L",  # 16 floats behind the first; 128 bytes are the first's
        "0])(t2 + 0, scratch + 0, n0",  # the first by its new name
        "2])(scratch + 0, t0 + 0",  # the first is gone: its memory is used again; the other is returned
    ]
    assert code.scratch == 128 + 256
    assert list(code.allocated.values()) == ["empty_strided_cpu((2, 3), (3, 1), torch.int64)"]
    (memory,) = code.allocated
    assert [place and place.python for place in code.results] == [
        f"reinterpret_tensor({memory}, (3, 2), (1, 3), 0)", "arg0_1", None, "1 + arg2_1", "40",
    ]  # fmt: skip


def test_sizes_of_arguments() -> None:
    """Which a kernel is told at each call; of what is computed there are none."""
    text = "def call(args):\n    arg0_1, arg1_1 = args\n    cpp_a(arg0_1, arg1_1.size(3))\n    return (arg1_1, )\n"
    code = read_wrapper(function(text))
    assert code.calls[0].args[1] == Size("arg1_1", 3)
    types, made = source(code, Kernels(["cpp_a"], {}), ["arg0_1"], ["arg1_1.size(3)"])
    assert types[-1] == "int64_t" and "(t0 + 0, n0)" in made
    part = text.replace("arg1_1.size", "reinterpret_tensor(arg1_1, (4, ), (1, ), 0).size")
    with pytest.raises(NotReadError, match=r"a size of reinterpret_tensor\(arg1_1"):
        read_wrapper(function(part))


@pytest.mark.parametrize(
    "statement",
    [
        "extern_kernels.mm(arg0_1, arg1_1, out=buf0)",
        "buf0 = torch.ops.aten.sort.default(arg0_1)",
        "buf0 = empty_strided_cpu((s0, 8), (8, 1), torch.float32)",
        "buf0 = reinterpret_tensor(arg0_1, (2, ), (1, ), 2)",  # of how many bytes?
        "cpp_a(arg0_1, 0.5)",
        "cpp_a(arg0_1, s0 + 1)",
        "buf0 = empty_strided_cpu((arg0_1, 8), (8, 1), torch.float32)",
        "partition0_args = [arg0_1]",
        "if arg0_1: cpp_a(arg0_1)",
        "return arg0_1",
    ],
)
def test_what_is_refused(statement: str) -> None:
    with pytest.raises(NotReadError):
        read_wrapper(function(f"def call(args):\n    arg0_1, arg1_1 = args\n    {statement}\n"))


KERNEL = """
#include <cstdint>
template <class T> static T changed(T x) { return x %s; }
extern "C"  void  kernel(const float* in, float* out, const int64_t n) {
    #pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) out[i] = changed(in[i]);
}
"""


def unit_kernels(b: str = "* 2") -> dict[str, Any]:
    """Two kernels as a generated module has them, with a helper of one name in each."""
    compiler, types = UnitCompile(), ["const float*", "float*", "const int64_t"]
    return {f"cpp_{name}": compiler.cpp_pybinding(types, KERNEL % ends) for name, ends in (("a", "+ 1"), ("b", b))}


def unit_module() -> dict[str, Any]:
    """What a generated module has besides its wrapper."""
    return {**unit_kernels(), "empty_strided_cpu": torch._C._dynamo.guards._empty_strided_cpu, "torch": torch}


# A wrapper as Inductor generates it, which calls both kernels: read, not run, so no docstring is in it.
def unit_wrapper(args):  # type: ignore[no-untyped-def]
    (arg0_1,) = args
    args.clear()
    buf0 = empty_strided_cpu((3,), (1,), torch.float32)  # noqa: F821
    cpp_a(arg0_1, buf0, 3)  # noqa: F821
    buf1 = empty_strided_cpu((3,), (1,), torch.float32)  # noqa: F821
    cpp_b(buf0, buf1, 3)  # noqa: F821
    del buf0
    return (buf1,)


def test_kernels_of_one_source() -> None:
    counters.clear()
    module = unit_module()
    (found,) = joined(unit_wrapper, module)([torch.arange(3.0)])
    assert counters["xquant"] == {"one_call": 1} and found.tolist() == [2, 4, 6]
    assert all(kernel.alone is None for name, kernel in module.items() if name.startswith("cpp_"))


def test_the_method_of_a_runner() -> None:
    """Which Inductor's module has in the place of a function where it may part a graph (for CUDA graphs)."""

    class Runner:
        def call(self, args):  # type: ignore[no-untyped-def]
            return (self, args)

    counters.clear()
    runner = Runner()
    Runner.call = joined(Runner.call, unit_module())  # type: ignore[method-assign]
    assert runner.call([1]) == (runner, [1])
    assert [name[:23] for name in counters["xquant"]] == ["kernels called one by o"]


def test_what_checks_tensors_is_left_out() -> None:
    """Torch 2.14 checks several by one call."""
    call = "def call(args):\n    arg0_1, = args\n    {}cpp_a(arg0_1, 3)\n    return ()"
    checks = (
        "assert_size_stride(arg0_1, (1,), (1,))\n    assert_size_stride_grouped((arg0_1,), ((1,),), ((1,),), 'x')\n    "
    )
    assert addresses(read_wrapper(function(call.format(checks)))) == addresses(read_wrapper(function(call.format(""))))


def test_a_part_of_an_argument() -> None:
    """One tensor holds the weights of all layers, say."""
    text = "def call(args):\n    arg0_1, = args\n    cpp_a(reinterpret_tensor(arg0_1, (2, ), (1, ), 3))\n    return ()"
    assert addresses(read_wrapper(function(text), {"arg0_1": 2})) == ["0])(t0 + 6"]
    with pytest.raises(NotReadError, match="reinterpret_tensor"):
        read_wrapper(function(text))


@pytest.mark.parametrize("known", [True, False])
def test_constants_that_a_module_gets_after_it_is_loaded(known: bool) -> None:
    """Inductor sets them as attributes of the finished module; a name that stays unknown is no tensor."""
    counters.clear()
    module = unit_module()
    del module["cpp_b"]  # nothing calls it, and alone it would be compiled, too

    def wrapper(args):  # type: ignore[no-untyped-def]
        (_arg0_1,) = args
        args.clear()
        buf0 = empty_strided_cpu((3,), (1,), torch.float32)  # noqa: F821
        cpp_a(constant0, buf0, 3)  # noqa: F821
        return (buf0,)

    call = joined(wrapper, module)
    module.update({"constant0": torch.arange(3.0)} if known else {})
    if known:
        assert call([torch.zeros(1)])[0].tolist() == [1, 2, 3] and counters["xquant"] == {"one_call": 1}
    else:
        with pytest.raises(NameError):  # it is Python's wrapper that runs, and no more a test of ours
            call([torch.zeros(1)])
        assert counters["xquant"] == {"kernels called one by one: constant0, which is no tensor": 1}


@pytest.mark.parametrize("b", ["+ 1", pytest.param("* 2", marks=pytest.mark.slow)])
def test_a_wrapper_that_is_not_read_stays(b: str) -> None:
    """Its kernels are compiled one by one; what is one source is compiled once."""
    kernels = unit_kernels(b)

    def wrapper(args: Any) -> Any:
        return [kernels["cpp_a"](*args), kernels["cpp_b"](*args)]

    counters.clear()
    call, out = joined(wrapper, kernels), torch.zeros(3)
    for _ in range(2):
        assert call([torch.ones(3), out, 2]) == [None, None] and out.tolist() == [2, 2, 0]
    (reason,) = counters["xquant"]
    assert reason.startswith("kernels called one by one: return [") and all(k.alone for k in kernels.values())


@pytest.mark.parametrize(
    "code",
    [
        "#define N 3\n" + KERNEL,  # would be defined in the kernels behind it, too
        KERNEL + 'extern "C" void kernel(int) {}',
        "namespace xq { }\n" + KERNEL,  # ours, compiled once for many graphs
        KERNEL.replace("void  kernel", "int  kernel"),
    ],
)
def test_what_does_not_share_a_source(code: str) -> None:
    assert may_be_joined(KERNEL) and not may_be_joined(code)


def steps(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], dict[str, int]]:
    """Outputs of a few compiled steps, what the cache holds after them, and the counters."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    layers, outputs = quantized_layers(ALONE, number=6), []
    step = torch.compile(two_layers, backend="xquant", options=options, dynamic=False)
    with torch.no_grad():
        for position in range(10):
            outputs.append(step(*fresh(1), layers, torch.tensor([position])))
    stored = [tensor for layer in layers for buffer in layer for tensor in buffer.live.owned.values()]
    return outputs, stored, dict(counters["xquant"])


def test_steps_are_the_same() -> None:
    outputs, stored, counted = steps({})
    one_by_one, expected, counted_before = steps({"disable": ["one_call"]})
    assert (counted["one_call"], "one_call" in counted_before) == (1, False)
    assert counted["layers_not_compiled_again"] == 3 and "layers_not_compiled_again" not in counted_before
    again, stored_again, counted_again = steps({})  # from disk (kept_steps.py)
    assert [counted_again[name] for name in ("steps restored", "one_call", "layers_not_compiled_again")] == [1, 1, 3]
    for found, truth in zip([*outputs, *stored], [*one_by_one, *expected], strict=True):
        assert torch.equal(found, truth)
    for found, truth in zip([*again, *stored_again], [*one_by_one, *expected], strict=True):
        assert torch.equal(found, truth)
    assert len({output.data_ptr() for output in outputs}) == len(outputs)  # each step's result is its own


def test_one_tensor_of_the_weights_of_all_layers() -> None:
    """A kernel is given a place within an argument, for which the size of its elements must be known."""

    def step(q: Tensor, k: Tensor, v: Tensor, layers: Any, pos: Tensor, weights: Tensor) -> Tensor:
        return two_layers(torch.nn.functional.linear(q, weights[1]), k, v, layers, pos)

    counters.clear()
    args = (*fresh(1), quantized_layers(ALONE, number=1), torch.tensor([0]), torch.randn(2, 8, 8))
    with torch.no_grad():
        found = torch.compile(step, backend="xquant", dynamic=False)(*args)
        expected = step(*args[:3], quantized_layers(ALONE, number=1), *args[4:])
    torch.testing.assert_close(found, expected)
    assert counters["xquant"]["one_call"] == 1

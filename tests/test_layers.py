"""Equal layers are compiled once: which stretches are equal, what cannot be apart, and what wrappers in a row do."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamo_graphs import fresh, open_number
from rewrites import ALONE, Layers, Rewrites, assign, quantized_layers, sdpa
from test_one_call import unit_module, unit_wrapper
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.compiler import config as compiler_config
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xquant_fx.compiler import inductor, repeats
from xquant_fx.compiler.layers import compile_layers
from xquant_fx.compiler.repeats import pieces_of, why_not_apart
from xquant_fx.kernels.cpu.one_call import Chain, Generated, joined_chain, read_generated
from xquant_fx.kernels.cpu.one_call_source import Kernels, source
from xquant_fx.kernels.cpu.wrapper_chain import Link, chained, layout
from xquant_fx.kernels.cpu.wrapper_code import NotReadError, Number, Reader, Size
from xquant_fx.passes.trace import fake

Step = Callable[..., Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor) -> Tensor:
    for keys, values in layers:
        assign(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k, v = k + q, v - q
    return q * 2


def one_differs(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor, at: int = 5) -> Tensor:
    for i, (keys, values) in enumerate(layers):
        assign(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k, v = k + q * (3.0 if i == at else 2.0), v - q
    return q


def every_other(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor) -> Tensor:
    for i, (keys, values) in enumerate(layers):
        assign(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k = k + q if i % 2 else k * q
    return q


def other_operand(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor) -> Tensor:
    """The nodes look alike, but one subtracts the other way round."""
    for i, (keys, values) in enumerate(layers):
        assign(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k, v = k + q, (q - v if i == 3 else v - q)
    return q


def keeps_a_view(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor) -> Tensor:
    turned = q.transpose(0, 1).transpose(0, 1)
    for keys, values in layers:
        assign(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k, v = k + q, v - turned
    return q


def counts_from_storage(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor) -> Tensor:
    for keys, values in layers:
        assign(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k = k + q.as_strided(q.shape, q.stride(), 0)
    return q


def writes_back(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor) -> Tensor:
    total = k * 1
    for keys, values in layers:
        assign(keys, values, k, v, pos)
        q = sdpa(q, keys, values)
        k, total = k + q, total.add_(q)
    return total


def graph_of(step: Step, number: int = 6) -> Graph:
    seen = Rewrites()
    with torch.no_grad():
        torch.compile(step, backend=seen, dynamic=False)(
            *fresh(1), quantized_layers(ALONE, number=number), torch.arange(1)
        )
    (made,) = seen.made
    return made.graph


@pytest.mark.parametrize(
    ("step", "layers", "repeated", "forms"),
    [
        (plain, 6, 4, 3),  # but the first, which ends with an attention, and the last with what follows
        (plain, 4, 0, 1),  # of three layers behind a kernel: too few
        (lambda *args: one_differs(*args, at=5), 8, 5, 3),  # a stretch ends with an attention: behind those of 0 to 4
        (lambda *args: one_differs(*args, at=1), 8, 4, 3),
        (every_other, 10, 4, 3),
        (other_operand, 9, 3, 3),  # behind the attention of layer 4
    ],
)
def test_pieces(step: Step, layers: int, repeated: int, forms: int) -> None:
    graph = graph_of(step, layers)
    pieces = pieces_of(graph)
    found = [piece.form for piece in pieces]
    assert max([found.count(form) for form in found if found.count(form) > 1], default=0) == repeated
    assert len(set(found)) == forms
    computed = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    assert [node for piece in pieces for node in piece.nodes] == computed
    assert why_not_apart(graph, pieces) == ""


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (keeps_a_view, "no tensor of known shape and memory of its own"),
        (writes_back, "writes to what another piece computed"),
        (counts_from_storage, "counts from where a storage begins"),
    ],
)
def test_what_cannot_be_apart(step: Step, reason: str) -> None:
    graph = graph_of(step)
    pieces = pieces_of(graph)
    assert len(pieces) > 4 and reason in why_not_apart(graph, pieces)


def wrappers(*texts: str) -> list[Reader]:
    """What wrappers of one float argument, and others of a byte, do."""
    read = [Reader({"arg0_1": 4, "arg1_1": 1, "arg2_1": 1}) for _ in texts]
    for each, text in zip(read, texts, strict=True):
        (function,) = ast.parse(text).body
        assert isinstance(function, ast.FunctionDef)
        each.read_all(function)
    return read


LAYER = """
def call(args):
    arg0_1, arg1_1 = args
    buf0 = empty_strided_cpu((4, 4), (4, 1), torch.float32)
    cpp_a(arg0_1, arg1_1, buf0, 7)
    buf1 = empty_strided_cpu((2, 4), (4, 1), torch.float32)
    cpp_b(reinterpret_tensor(arg0_1, (2, ), (1, ), 2), buf0, buf1)
    del buf0
    return (reinterpret_tensor(buf1, (2, 2), (4, 1), 4), )
"""


def test_what_is_read_of_a_chain() -> None:
    links = [Link(0, ["x", "w0"], ["h0"]), Link(0, ["h0", "w1"], ["h1"]), Link(0, ["h1", "w2"], ["h2"])]
    read = wrappers(LAYER)
    code = chained(read, links, ["x", "w0", "w1", "w2"], ["h2", None, "x"])
    assert [call.name for call in code.calls] == ["cpp_a_of_0", "cpp_b_of_0"] * 3
    (returned,) = code.allocated
    given = [returned, *code.arguments]
    _, text = source(code, Kernels(["cpp_a_of_0", "cpp_b_of_0"], {}), given, [])
    assert re.findall(r"kernels\[.\]\)\((.*)\);", text) == [
        "t1 + 0, t2 + 0, scratch + 0, 7L",
        "t1 + 8, scratch + 0, scratch + 64",  # two floats into x
        "scratch + 80, t3 + 0, scratch + 0, 7L",  # what was returned begins 4 floats into its buffer
        "scratch + 88, scratch + 0, scratch + 128",
        "scratch + 144, t4 + 0, scratch + 64, 7L",  # where the first layer's result was
        "scratch + 152, scratch + 64, t0 + 0",
    ]
    assert code.scratch == 192 and [place and place.python for place in code.results] == [
        f"reinterpret_tensor({returned}, (2, 2), (4, 1), 4)", None, "x",
    ]  # fmt: skip
    assert layout(read[0].code.results[0], read[0]) == ((2, 2), (4, 1))


NUMBERED = """
def call(args):
    arg0_1, arg1_1 = args
    s5 = arg1_1
    buf0 = empty_strided_cpu((4, ), (1, ), torch.float32)
    cpp_a(arg0_1, buf0, s5, 7)
    return (buf0, )
"""


def test_numbers_of_a_chain() -> None:
    """Which are other inputs of it in each link."""
    links = [Link(0, ["x", "tokens"], ["h0"]), Link(0, ["h0", "length"], ["h1"])]
    code = chained(wrappers(NUMBERED), links, ["x", "tokens", "length"], ["h1"])
    _, text = source(code, Kernels(["cpp_a_of_0"], {}), [*code.allocated, "x"], ["length", "tokens"])
    assert re.findall(r"kernels\[.\]\)\((.*)\);", text) == [
        "t1 + 0, scratch + 0, n1, 7L",
        "scratch + 0, t0 + 0, n0, 7L",
    ]


def test_sizes_of_what_a_chain_is_given() -> None:
    text = "def call(args):\n    arg0_1, arg1_1 = args\n    buf0 = empty_strided_cpu((4, ), (1, ), torch.float32)\n"
    text += "    cpp_a(arg0_1, arg1_1.size(3))\n    return (buf0, )\n"
    links = [Link(0, ["x", "codes0"], ["h0"]), Link(0, ["x", "codes1"], ["h1"])]
    code = chained(wrappers(text), links, ["x", "codes0", "codes1"], ["h1"])
    assert [call.args[1] for call in code.calls] == [Size("codes0", 3), Size("codes1", 3)]
    with pytest.raises(NotReadError, match="a size of buf0_0_in_0"):
        chained(wrappers(text), [links[0], Link(0, ["x", "h0"], ["h1"])], ["x", "codes0"], ["h1"])


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        ("cpp_a(arg0_1, constant0)\n    return (buf0, )", "constant0, which is a constant"),
        ("return (arg0_1, )", "h0, which is no buffer"),
        ("return (3, )", "h0, which is no buffer"),
    ],
)
def test_what_is_refused_in_a_chain(statements: str, reason: str) -> None:
    allocation = "buf0 = empty_strided_cpu((4, ), (1, ), torch.float32)"
    text = f"def call(args):\n    arg0_1, = args\n    {allocation}\n    {statements}\n"
    with pytest.raises(NotReadError, match=reason):
        chained(wrappers(text), [Link(0, ["x"], ["h0"])], ["x"], ["h0"])


@pytest.mark.parametrize("readable", [True, False])
def test_a_chain_runs(readable: bool) -> None:
    """By one call; or each wrapper in its turn, where the kernels have no C++ that can be compiled."""
    counters.clear()
    module = unit_module()
    generated = Generated(unit_wrapper, module, {"arg0_1": 4})
    links = [Link(0, [f"h{i}"], [f"h{i + 1}"]) for i in range(3)]
    read = read_generated(generated)
    if not readable:
        read.code.calls[0].args[0] = read.code.calls[0].args[0]._replace(memory="constant0")  # type: ignore[union-attr]
        module["call"] = lambda args: [(args[0] + 1) * 2]
    call = joined_chain(Chain([generated], [read], links, ["h0", "n"], ["h3", Number("n + 1"), "h1"]))
    for number in (3, 4):
        last, after, first = call([torch.arange(3.0), number])
        assert last.tolist() == [14, 22, 30] and first.tolist() == [2, 4, 6] and after == number + 1
    reason = "kernels called one by one: constant0, which is a constant of one part"
    assert counters["xquant"] == ({"one_call": 1} if readable else {reason: 1})


def test_a_size_that_is_known_in_a_step_only() -> None:
    """One that shows in a stride alone, too: no hash is asked of it."""
    seen = Rewrites()

    def step(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor) -> Tensor:
        return plain(q, k, v, layers, pos)[:, :, -1] * 2

    with torch.no_grad():
        torch.compile(step, backend=seen, dynamic=True)(*fresh(9), quantized_layers(ALONE, number=6), torch.arange(9))
    (made,) = seen.made
    pieces = pieces_of(made.graph)
    assert "is no tensor of known shape" in why_not_apart(made.graph, pieces)
    with pytest.raises(TypeError, match="unhashable"):
        hash(tuple(stride for node in made.graph.nodes if fake(node) is not None for stride in fake(node).stride()))


def test_numbers_of_the_step_are_given_to_the_pieces_that_use_them() -> None:
    """As the length of a cache that grows, also as the size of a mask: the layers are compiled once all the same."""

    def step(
        q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor, length: int, mask: Tensor
    ) -> tuple[Tensor, int]:
        k = k * (length + mask.sum())
        for i, (keys, values) in enumerate(layers):
            assign(keys, values, k, v, pos)
            q = sdpa(q, keys, values)
            k, v = k + (q * length if i else q), v - q
        return q * 2, 2 * length + 3

    counters.clear()
    args, ways = fresh(1), (torch.compile(step, backend="xquant"), step)
    with torch.no_grad():
        for length in (2, 3, 5, 7):
            states = [quantized_layers(ALONE, number=7) for _ in range(2)]
            rest = torch.arange(1), length, torch.ones(4 * length + 1)
            found, expected = (way(*args, each, *rest) for way, each in zip(ways, states, strict=True))
            torch.testing.assert_close(found, expected)
            assert type(found[1]) is int
    assert counters["stats"]["unique_graphs"] == 2 and counters["xquant"]["one_call"] == 2
    assert counters["xquant"]["layers_not_compiled_again"] == 2 * 3  # all but the first two, the last and what follows


def test_layers_are_equal_if_the_same_is_known_of_their_numbers() -> None:
    """Their ranges, what Dynamo guards on, and which are one: all of it goes into what a layer is compiled to."""
    env, graph = ShapeEnv(), Graph()

    def number(name: str) -> Node:
        node = graph.placeholder(name)
        node.meta["example_value"] = open_number(env, 6, name)
        return node

    def layer(a: Node, b: Node) -> Any:
        return repeats._piece([graph.call_function(torch.arange, (a,)), graph.call_function(torch.arange, (b,))]).form

    def value(node: Node) -> Any:
        return node.meta["example_value"]

    a, b, c, d, e, f, g, h, i, j = map(number, "abcdefghij")
    free = layer(g, h)
    assert len({layer(a, c), layer(b, c), layer(c, a), layer(c, d), free}) == 1
    assert value(a) == value(b)  # from here on Dynamo guards
    assert layer(a, c) == layer(b, c) == free != layer(a, b) == layer(b, a)
    assert value(c) < 10 and value(d) < 10
    assert layer(c, g) == layer(d, g) != free
    assert value(e) % 2 == 0 and value(f) % 3 == 0
    assert len({layer(e, g), layer(f, g), layer(c, g), free}) == 4
    assert value(g) * value(h) > 7  # of two
    assert len({layer(g, c), layer(h, c), layer(a, c)}) == 3
    assert value(i) <= value(j)
    assert layer(i, j) != layer(j, i)  # of which the first is the greater one
    assert why_not_apart(graph, []) == ""
    more = graph.placeholder("more")
    more.meta["example_value"] = value(a) + 1
    assert why_not_apart(graph, []) == ""
    layer(more, c)  # is a user
    assert why_not_apart(graph, []) == "more is a number that follows from others"


def test_a_number_that_is_known_among_the_results() -> None:
    """Dynamo left it open, though the graph is for one alone."""

    def step(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor, length: int) -> tuple[Tensor, int]:
        ones = torch.ones(length) + torch.ones(2 if length == 2 else 3)
        return plain(q, k, v, layers, pos) * ones.sum(), length

    counters.clear()
    made = torch.compile(step, backend="xquant")
    with torch.no_grad():
        for length in (2, 3, 3):
            found = made(*fresh(1), quantized_layers(ALONE, number=6), torch.arange(1), length)[1]
            assert type(found) is int and found == length
    assert counters["xquant"]["layers_not_compiled_again"] == 6


@compiler_config.patch(dynamic_sources="L['length']")
def test_what_is_neither_a_tensor_nor_a_sum_keeps_the_graph_whole() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor, length: int) -> tuple[Tensor, int]:
        return plain(q, k, v, layers, pos) * length, length // 3

    counters.clear()
    made = torch.compile(step, backend="xquant")
    with torch.no_grad():
        found = [made(*fresh(1), quantized_layers(ALONE, number=6), torch.arange(1), length)[1] for length in (5, 9)]
    assert found == [1, 3] and counters["xquant"]["one_call"] == 1
    reason = "a result is neither a tensor nor a sum of numbers that are given"
    assert counters["xquant"][f"layers compiled together: {reason}"] == 1


# What was asked for is in the caches of graphs, and asked for again. Compiled kernels may come from disk.
@inductor_config.patch(fx_graph_cache=False)
@functorch_config.patch(enable_autograd_cache=False)
@compiler_config.patch(dynamic_sources="L['length']")
@pytest.mark.parametrize("asks", [True, False])
def test_what_holds_for_some_numbers_only_is_not_kept(
    asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would ask for the number where it is restored."""
    counters.clear()
    where, numbers = tmp_path / "step.json", list[torch.SymInt]()
    monkeypatch.setattr(inductor, "place_of", lambda *_: where)

    def compile_one(gm: Any, examples: list[Any]) -> Any:
        numbers.extend(each for each in examples if isinstance(each, torch.SymInt))
        assert not asks or all(each % 4 != 3 for each in numbers)
        return by_inductor(gm, examples)

    by_inductor = inductor._compile_one({})
    monkeypatch.setattr(inductor, "_compile_one", lambda _: compile_one)

    def step(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor, length: int) -> Tensor:
        return plain(q, k * length, v, layers, pos)

    torch._dynamo.reset()
    made = torch.compile(step, backend="xquant")
    with torch.no_grad():
        made(*fresh(1), quantized_layers(ALONE, number=6), torch.arange(1), 6)
    assert len(numbers) == 1 and where.exists() != asks


def test_torch_counts_what_is_written_to() -> None:
    """By a view, too; and nothing else."""

    def step(q: Tensor, k: Tensor, v: Tensor, layers: Layers, pos: Tensor, total: Tensor) -> Tensor:
        total[0].add_(1)
        return plain(q, k, v, layers, pos)

    counters.clear()
    layers, total, args = quantized_layers(ALONE, number=6), torch.zeros(2), fresh(1)
    compiled = torch.compile(step, backend="xquant", dynamic=False)
    before = [tensor._version for tensor in (total, *args)]
    with torch.no_grad():
        for position in range(2):
            compiled(*args, layers, torch.tensor([position]), total)
    assert total.tolist() == [2, 0] and counters["xquant"]["layers_not_compiled_again"] == 3
    assert [tensor._version for tensor in (total, *args)] == [before[0] + 2, *before[1:]]


def test_an_input_that_is_no_tensor_keeps_the_graph_whole() -> None:
    counters.clear()
    seen = Rewrites()
    with torch.no_grad():
        torch.compile(plain, backend=seen, dynamic=False)(*fresh(1), quantized_layers(ALONE, number=6), torch.arange(1))
    compiled: list[Any] = []
    inputs = [*seen.inputs[0][:-1], 3]
    assert compile_layers(seen.made[0], inputs, lambda *args: compiled.append(args)) is None
    assert not compiled and counters["xquant"]["layers compiled together: an input is no plain tensor"] == 1

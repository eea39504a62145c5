"""Steps that are kept on disk: restored where everything is the same, compiled where anything differs."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamo_graphs import fresh, open_number
from test_one_call import unit_module, unit_wrapper
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xquant_fx.compiler import kept_steps
from xquant_fx.compiler.cache_key import KeyPass, cache_key_patch
from xquant_fx.compiler.kept_steps import place_of
from xquant_fx.kernels.cpu import kept_call
from xquant_fx.kernels.cpu.kept_call import KeptCall, keep, may_be_kept, restored
from xquant_fx.kernels.cpu.one_call import Chain, Generated, joined_chain, read_generated
from xquant_fx.kernels.cpu.wrapper_chain import Link


def chain_of_two(keep: Callable[[KeptCall], None] | None) -> Callable[[list[Any]], Any]:
    generated = Generated(unit_wrapper, unit_module(), {"arg0_1": 4})
    links = [Link(0, [f"h{i}"], [f"h{i + 1}"]) for i in range(2)]
    return joined_chain(Chain([generated], [read_generated(generated)], links, ["h0"], ["h2", None, "h1"]), keep)


def test_a_call_is_kept_and_restored(tmp_path: Path) -> None:
    file = tmp_path / "xquant" / "a.json"
    assert restored(file) is None
    found: list[KeptCall] = []
    made = chain_of_two(found.append)
    expected = made([torch.arange(3.0)])  # it is compiled by then, and kept
    keep(found[0]._replace(spared=1), file)
    counters.clear()
    with torch.device("meta"):  # a user's default device
        call = restored(file)
    assert call is not None and call.__globals__["xquant_kernels"].is_cpu  # C++ reads it
    assert counters["xquant"] == {
        "steps restored": 1, "one_call": 1, "layers_not_compiled_again": 1,
    }  # fmt: skip
    (two, none, one) = call([torch.arange(3.0)])
    assert none is None and torch.equal(two, expected[0]) and torch.equal(one, expected[2])
    assert [each.name for each in file.parent.iterdir()] == ["a.json"]
    whole = file.read_text()
    for text in ("[3]", "3", "{}", whole[:-9], whole.replace("args.clear", "args.close"), '{"sha256": 1, "step": 2}'):
        file.write_text(text)
        assert restored(file) is None, text


def test_without_a_library_nothing_is_restored(tmp_path: Path) -> None:
    """One is gone, was cut short, or has no ``kernel``."""
    file, gone, short = tmp_path / "a.json", tmp_path / "gone.so", tmp_path / "short.so"
    short.write_bytes(b"\x7fELF")
    other = max(Path(torch.__file__).parent.glob("lib/*torch_python*"), default=short)
    found: list[KeptCall] = []
    chain_of_two(found.append)([torch.arange(3.0)])
    counters.clear()
    for library in (gone, short, other):
        keep(found[0]._replace(library=str(library)), file)
        assert restored(file) is None
        keep(found[0]._replace(kernels=[str(library)]), file)
        assert restored(file) is None
    assert sum(counters["xquant"].values()) == 6 and not any("kept" in name for name in counters["xquant"])


def test_where_nothing_can_be_written_the_step_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    full = tmp_path / "full.json"
    full.mkdir()  # what was written cannot be given this name
    for file in (tmp_path / "file" / "a.json", full):
        counters.clear()
        (two, _, _) = chain_of_two(lambda kept, file=file: keep(kept, file))([torch.arange(3.0)])  # type: ignore[misc]
        assert two.tolist() == [6, 10, 14]
        assert any("steps not kept" in name for name in counters["xquant"]) and restored(file) is None
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "full.json"]


def test_what_names_something_of_its_module_is_not_kept() -> None:
    space: dict[str, Any] = {}
    exec("def call(args):\n    return (empty_strided_cpu((3, ), (1, ), torch.float32), )", space)
    assert may_be_kept(space["call"])
    exec("def call(args):\n    return (constant0, )", space)
    assert not may_be_kept(space["call"])


def graph(scale: float = 2.0, dtype: torch.dtype = torch.float32, tokens: int = 3, op: Any = torch.ops.aten.mul) -> Any:
    """A graph as passes leave it, its inputs, and patches of Inductor's config."""
    x, y = torch.ones(tokens, 4, dtype=dtype), nn.Parameter(torch.ones(4, dtype=dtype), requires_grad=False)
    made = make_fx(lambda x, y: torch.ops.aten.add(op(x, scale), y), tracing_mode="fake")(x, y).graph
    for node in made.nodes:
        node.meta["example_value"] = node.meta.get("val")
    return made, [x, y], cache_key_patch("settings")


def place(made: Graph, inputs: list[Any], patches: dict[str, Any]) -> Path | None:
    with torch.no_grad():
        return place_of(made, inputs, patches)


OTHERS = {
    "a number": dict(scale=2.5), "type of a number": dict(scale=2), "dtype": dict(dtype=torch.float64),
    "shape": dict(tokens=4), "op": dict(op=torch.ops.aten.sub), "sign of zero": dict(scale=-0.0),
    "what is no number": dict(scale=float("nan")),
}  # fmt: skip


class Numbers:
    """Numbers of a step, and the place of a step that is given some."""

    def __init__(self) -> None:
        self.env, self.count = ShapeEnv(), itertools.count()

    def number(self, value: int) -> torch.SymInt:
        return open_number(self.env, value, f"n{next(self.count)}")

    def place(self, *numbers: torch.SymInt, shape: Sequence[Any] = (3,)) -> Path | None:
        """``shape``: of one more input."""
        made, inputs, patches = graph()
        first = next(node for node in made.nodes if node.op != "placeholder")
        with FakeTensorMode(shape_env=self.env), made.inserting_before(first):
            values = [*numbers, torch.empty(*shape)]
            for i, value in enumerate(values):
                made.placeholder(f"more{i}").meta["example_value"] = value
        real = torch.empty([size if isinstance(size, int) else size.node.hint for size in shape])
        return place(made, [*inputs, *numbers, real], patches)


def test_numbers_of_a_step_are_told_by_what_is_known_of_them() -> None:
    """Not by their value: by their range, what was asked of them, and which of them are one."""
    env = Numbers()
    one, two, small, even = map(env.number, (5, 6, 5, 6))
    found = env.place(one)
    assert found == env.place(two) is not None
    assert env.place(one, two) == env.place(two, one) != env.place(one, one)
    assert env.place(one + 1) is None
    assert small <= 100 and even % 2 == 0  # Dynamo guards on it
    assert len({found, env.place(small), env.place(even)}) == 3 and env.place(one) == found


def test_shapes_of_a_step_are_told_by_its_numbers() -> None:
    env, other = Numbers(), Numbers()
    one, two, six = env.number(5), env.number(5), other.number(6)
    found = env.place(one, two, shape=(one, 5))
    assert found == env.place(two, one, shape=(two, 5)) == other.place(six, other.number(3), shape=(six, 5)) is not None
    others = [(5, one), (two, 5), (5, 5), (one, two), (one + 1, 5)]
    assert len({found, *(env.place(one, two, shape=shape) for shape in others)}) == 6
    assert env.place(one, shape=(two, 5)) is None


def test_the_same_is_found_again() -> None:
    assert place(*graph()) == place(*graph()) is not None


@pytest.mark.parametrize("what", OTHERS)
def test_another_graph_is_another_step(what: str) -> None:
    assert place(*graph(**OTHERS[what])) not in (place(*graph()), None)


def test_other_surroundings_are_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, inputs, patches = graph()
    found = [place(made, inputs, patches), place(made, inputs, cache_key_patch("other specs"))]
    found.append(place(made, inputs, {**patches, "cpp.min_chunk_size": 1}))
    found.append(place(made, inputs, {**patches, "post_grad_custom_pre_pass": KeyPass("settings", (_Named(),))}))
    with inductor_config.patch("joint_custom_post_pass", _Named()):
        found.append(place(made, inputs, patches))
    with torch.compiler.config.patch(cache_key_tag="a user's"):
        found.append(place(made, inputs, patches))
    with monkeypatch.context() as changed:
        changed.setitem(inductor_config.post_grad_fusion_options, "batch_linear", {})
        found.append(place(made, inputs, patches))
    with inductor_config.patch("cpp.simdlen", 1):
        found.append(place(made, inputs, patches))
    with torch.inference_mode():
        found.append(place(made, inputs, patches))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    found.append(place(made, inputs, patches))
    torch.set_num_threads(threads)
    storage = torch.ones(13)
    found.append(place(made, [storage[:12].view(3, 4), storage[:4]], patches))
    for other in (torch.ones(4, 3).T, torch.ones(13)[1:].view(3, 4)):
        found.append(place(made, [other, inputs[1]], patches))
    monkeypatch.setattr("xquant_fx.compiler.cache_key.source_hash", lambda: b"other sources")
    found.append(place(made, inputs, patches))
    assert None not in found and len(set(found)) == len(found)


@dataclasses.dataclass
class _Nameless:
    """Its text is the same in each process, whatever it does."""

    def __call__(self, graph: Graph) -> None:
        pass


class _Named(KeyPass):
    def __init__(self) -> None:
        super().__init__("of a user")


@torch.library.custom_op("kept_steps_test::double", mutates_args=())
def double(x: Tensor, scale: float) -> Tensor:
    return x * scale


@double.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


def test_what_has_no_lasting_text_is_not_kept() -> None:
    made, inputs, patches = graph()
    assert place(*graph(op=torch.ops.kept_steps_test.double)) is None
    assert place(made, [inputs[0], 3], patches) is None  # no tensor
    assert place(made, [inputs[0].to_sparse(), inputs[1]], patches) is None
    assert place(made, inputs, {**patches, "post_grad_custom_pre_pass": KeyPass("", (print,))}) is None
    for name, user in (("joint_custom_pre_pass", [print]), ("custom_partitioner_fn", _Nameless())):
        with inductor_config.patch(name, user):
            assert place(made, inputs, patches) is None
    with torch.autocast("cpu"):
        assert place(made, inputs, patches) is None
    for caches in ({"fx_graph_cache": False}, {"force_disable_caches": True}):
        with inductor_config.patch(caches):
            assert place(made, inputs, patches) is None and not kept_steps.are_expected()
    of_a_user = Graph()
    of_a_user.output(of_a_user.call_function(fresh, (1,)))
    assert place(of_a_user, [], patches) is None
    of_python = Graph()
    of_python.output(of_python.call_function(operator.add, (1, 2)))
    assert place(of_python, [], patches) is not None


def test_a_folder_keeps_the_steps_that_were_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_call, "MOST", 3)
    found: list[KeptCall] = []
    chain_of_two(found.append)([torch.arange(3.0)])
    (tmp_path / "a folder").mkdir()
    (tmp_path / "tmp_begun").touch()  # by a process that was killed
    os.utime(tmp_path / "tmp_begun", (0, 0))
    for number, name in enumerate("abc", start=1):
        keep(found[0], tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    assert restored(tmp_path / "a") is not None  # which is the last now
    keep(found[0], tmp_path / "d")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "a folder", "c", "d"]
    assert restored(tmp_path / "b") is None

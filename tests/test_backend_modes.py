"""The backend under its name, as a function, through transformers, and in every mode of torch.compile."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import layers_of, range_config
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch.nn.functional import scaled_dot_product_attention
from transformers import CompileConfig, LlamaForCausalLM

import xquant_fx
from xquant_fx import CacheStateError, ConfigError, XQuantCache, XQuantConfig, ops
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler import backend
from xquant_fx.compiler.inductor import CPU_SETTINGS
from xquant_fx.compiler.options import MODES

pytest_plugins = ["plain_torch"]
SHAPE = (1, 1, 32, 16)
SMALL = range_config(k_group_size=8, residual_length=8)
OPTIONS = {"preset": "xquant", "k_group_size": 8, "residual_length": 8}


def step(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)
    return scaled_dot_product_attention(q, keys, values)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, plain_torch: None) -> list[torch.fx.GraphModule]:
    """The graphs that Inductor is given, with the ops not taken apart yet; they run as they are."""
    seen: list[torch.fx.GraphModule] = []

    def compile_fx_stub(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_fx_stub)
    return seen


def count(gm: torch.fx.GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def assert_rewritten(gm: torch.fx.GraphModule, layers: int) -> None:
    """Each layer stores its keys and its values once, reads them in one op, and appends nothing otherwise."""
    assert count(gm, ops.STORE, ops.STORE_BORROWED) == 2 * layers
    assert count(gm, ops.DECODE) == layers
    assert count(gm, ops.LOAD, scaled_dot_product_attention) == 0
    assert count(gm, "index_copy_") == 0


def decode_three_tokens(
    compiled: Callable[..., Tensor], buffers: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(last output, keys, values): the first call takes ordinary buffers over, the others run a compiled step."""
    keys, values = (torch.zeros(SHAPE), torch.zeros(SHAPE)) if buffers is None else buffers
    x = torch.randn(3, 3, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, qkv in enumerate(x):
            out = compiled(*qkv, torch.tensor([i]), keys, values)
    return out, keys, values


def test_registered_by_name() -> None:
    assert "xquant" in torch._dynamo.list_backends(exclude_tags=())
    assert torch._dynamo.lookup_backend("xquant") is xquant_fx.xquant_backend


@pytest.mark.parametrize("given", ["xquant", xquant_fx.xquant_backend], ids=["name", "function"])
@pytest.mark.parametrize("options, bits", [(OPTIONS, 1), ({"preset": "kivi-4"}, 4)], ids=["fields", "preset"])
def test_by_name_and_as_a_function(given: Any, options: dict[str, Any], bits: int, graphs: list) -> None:
    out, keys, values = decode_three_tokens(torch.compile(step, backend=given, options=options, dynamic=False))
    (gm,) = graphs  # the first step is not compiled; one graph serves the others
    assert_rewritten(gm, layers=1)
    assert isinstance(keys, QuantizedKV) and isinstance(values, QuantizedKV)
    assert values.spec.bits == bits
    plain, _, _ = decode_three_tokens(step)
    torch.testing.assert_close(out, plain)  # three tokens are all in the full-precision window


def test_inductors_function_does_not_go_by_the_name_of_ours(graphs: list) -> None:
    """Under that name ``caching_precompile`` would call it in another process, with quantized buffers."""
    with torch._dynamo.config.patch(caching_precompile=True):
        decode_three_tokens(torch.compile(step, backend="xquant", options=OPTIONS, dynamic=False))
    (gm,) = graphs
    assert not hasattr(gm, "_backend_id")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"options": {"k_bit": 2}}, "valid options are"),
        ({"options": {"preset": "no such"}}, "preset must be one of"),
        ({"mode": "fast"}, "mode must be one of"),
    ],
)
def test_unknown_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=message) as error:
        decode_three_tokens(torch.compile(step, backend="xquant", **settings))
    assert isinstance(error.value.inner_exception, ConfigError)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_modes_reach_inductor(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mode means is Inductor's; ours is to pass it on, next to the cache key."""
    seen: list[dict[str, Any]] = []

    def inner_compile(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        names = ("triton.cudagraphs", "max_autotune", "coordinate_descent_tuning")
        seen.append({name: value for name, value in inductor_config.get_config_copy().items() if name in names})
        assert inductor_config.post_grad_custom_pre_pass.uuid() is not None
        assert {name: getattr(inductor_config, name) for name in CPU_SETTINGS} == CPU_SETTINGS
        assert not gc.isenabled()
        return gm

    original = compile_fx.compile_fx
    monkeypatch.setattr(compile_fx, "compile_fx", lambda *a, **k: original(*a, **{"inner_compile": inner_compile, **k}))
    decode_three_tokens(torch.compile(step, backend="xquant", mode=mode, dynamic=False))
    assert len(seen) == 1 and gc.isenabled()
    assert all(getattr(inductor_config, name) != value for name, value in CPU_SETTINGS.items())  # the user's, again
    expected = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else {}
    assert expected or mode in (None, "default")
    defaults = {name: False for name in seen[0]}
    assert seen == [{**defaults, **{name: value for name, value in expected.items() if name in defaults}}]


def test_options_of_inductor_hold_while_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside ours, and before what a mode means; ``torch.compile`` takes no mode beside options."""
    asked = {"coordinate_descent_tuning": False, "cpp.min_chunk_size": 512, "benchmark_harness": True}
    names, seen = ("max_autotune", *asked), list[dict[str, Any]]()

    def inner_compile(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        seen.append({name: value for name, value in inductor_config.get_config_copy().items() if name in names})
        return gm

    before = inductor_config.get_config_copy()
    original = compile_fx.compile_fx
    monkeypatch.setattr(compile_fx, "compile_fx", lambda *a, **k: original(*a, **{"inner_compile": inner_compile, **k}))
    options = {**OPTIONS, "mode": "max-autotune", **asked}
    decode_three_tokens(torch.compile(step, backend="xquant", options=options, dynamic=False))
    assert seen == [{"max_autotune": True, **asked}]
    after = inductor_config.get_config_copy()
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_run(mode: str) -> None:
    """All the way, on the CPU; buffers of 16 bits, as their code is the shortest."""
    buffers = _buffers(XQuantConfig.preset("full"))
    compiled = torch.compile(step, backend="xquant", mode=mode, dynamic=False)
    out, _, _ = decode_three_tokens(compiled, buffers)
    plain, _, _ = decode_three_tokens(step)
    torch.testing.assert_close(out, plain)
    assert [buffer.state.length for buffer in buffers] == [3, 3]


def _buffers(config: XQuantConfig) -> tuple[QuantizedKV, QuantizedKV]:
    keys, values = (QuantizedKV.of(state) for state in layers_of(config, SHAPE, torch.float32)[0])
    return keys, values


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modes of the calls of the backend."""
    seen: list[Any] = []
    original = backend.compile_graph

    def compile_graph(gm: Any, inputs: Any, request: Any, compiler: Any) -> Any:
        seen.append(request.mode)
        return original(gm, inputs, request, compiler)

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    return seen


def generate(model: LlamaForCausalLM, cache: XQuantCache, config: CompileConfig | None) -> Tensor:
    more = {} if config is None else {"compile_config": config}
    return model.generate(
        torch.arange(1, 13)[None], past_key_values=cache, max_new_tokens=6, do_sample=False,
        disable_compile=config is None, **more,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["reduce-overhead", pytest.param("default", marks=pytest.mark.slow)])
def test_transformers_generate(tiny_llama: Any, calls: list[Any], graphs: list, mode: str) -> None:
    """transformers runs the prompt eagerly and compiles the decode step; on CPUs only if told to."""
    model = tiny_llama(layers=2)
    config = CompileConfig(backend="xquant", mode=mode, dynamic=False)
    config._compile_all_devices = True
    cache = XQuantCache(model.config, 32, config=SMALL)
    compiled = generate(model, cache, config)

    assert calls == [None if mode == "default" else mode]
    (gm,) = graphs
    assert_rewritten(gm, layers=2)
    assert count(gm, ops.STORE_BORROWED) == 1
    assert {state.length for state in cache.states} == {17}

    cache.reset()
    generate(model, cache, config)
    assert len(calls) == 1  # a second generation compiles nothing
    assert torch.equal(compiled, generate(model, XQuantCache(model.config, 32, config=SMALL), None))


def test_contradicting_options_in_generate(tiny_llama: Any) -> None:
    model = tiny_llama(layers=2)
    config = CompileConfig(backend="xquant", mode=None, options={"preset": "kivi-2"}, dynamic=False)
    config._compile_all_devices = True
    with pytest.raises(BackendCompilerFailed, match="differ from the config of the XQuantCache") as error:
        generate(model, XQuantCache(model.config, 32, config=SMALL), config)
    assert isinstance(error.value.inner_exception, ConfigError)


@pytest.mark.parametrize("other", ["inductor", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_other_backends_refuse_a_quantized_cache(tiny_llama: Any, other: str) -> None:
    """They would write into a dequantized copy."""
    model = tiny_llama(layers=2)
    config = CompileConfig(backend=other, mode=None, dynamic=False)
    config._compile_all_devices = True
    with pytest.raises(BackendCompilerFailed, match="was given to a compiler that does not know it") as error:
        generate(model, XQuantCache(model.config, 32, config=SMALL), config)
    assert isinstance(error.value.inner_exception, CacheStateError)


def test_import_is_light() -> None:
    # Without torch, which takes longer than all else: nothing that it would have loaded may be loaded either.
    code = """
import sys
before = set(sys.modules)
import xquant_fx
assert "XQuantCache" in dir(xquant_fx)
new = {name for name in sys.modules if name not in before}
print(*sorted(new))
loaded = [name for name in ("transformers", "triton", "torch") if name in new]
assert not loaded, loaded
assert not {name for name in new if name.split(".")[0] not in (*sys.stdlib_module_names, "xquant_fx")}, new
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "xquant_fx" in done.stdout


#: What a program does with the backend, and whether it is told at the end that nothing came of it.
USES = {
    "never called": ("torch.compile(torch.nn.Linear(2, 2), backend='xquant')", True),
    "called": ("torch.compile(torch.neg, backend='xquant')(torch.ones(2))", False),
    "failed before": ("torch.compile(torch.neg, backend='xquant'); raise ValueError", False),
    "only looked": ("import xquant_fx.compiler.backend", False),
}


@pytest.mark.parametrize("use", ["never called", *(pytest.param(u, marks=pytest.mark.slow) for u in list(USES)[1:])])
def test_told_at_the_end_where_nothing_was_compiled(use):
    code, told = USES[use]
    done = subprocess.run([sys.executable, "-c", f"import torch\n{code}"], capture_output=True, text=True, check=False)
    assert done.returncode == (use == "failed before"), done.stderr
    assert ("never had a graph" in done.stderr) == told, done.stderr

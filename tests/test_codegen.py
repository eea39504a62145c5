"""The code that Inductor generates for a decode step: no callbacks, no copies of the state, in place.

The same checks run on C++ for the CPU and on Triton for an imaginary GPU (``fake_cuda.py``).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import math
import re
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda, generated_code
from states import layers_of
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._triton import has_triton
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, PretrainedConfig

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import TENSOR_NAMES, KVState

LENGTH = 48
HEADS, KV_HEADS, DIM = 4, 2, 32
# Tensors of the model and temporaries of a step are bfloat16 or float32, scales float16 and codes
# int32: what has a state tensor's dtype and size is a copy of it.
DTYPE = torch.bfloat16
MODEL = LlamaConfig(
    vocab_size=64, hidden_size=HEADS * DIM, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=64,
)  # fmt: skip
SLIDING = MistralConfig(**{**MODEL.to_dict(), "model_type": "mistral"}, sliding_window=160)
PRESETS = ["xquant", pytest.param("xquant-1bit", marks=pytest.mark.slow)]
DEVICES = ["cpu", "cuda"]


def small(preset: str) -> XQuantConfig:
    return XQuantConfig.preset(preset).replace(k_group_size=8, residual_length=8)


@functools.cache
def empty_cache(preset: str, length: int = LENGTH) -> XQuantCache:
    """An allocated cache of the two-layer model on the CPU; the layers share codes as the preset says."""
    cache = XQuantCache(MODEL, length, config=small(preset))
    cache.early_initialization(1, KV_HEADS, DIM, DTYPE, torch.device("cpu"))
    assert any(state.spec.borrowed for state in cache.states)
    return cache


@functools.cache
def sliding_cache() -> XQuantCache:
    """One whose layers keep a window alone, by the default schemes."""
    config = XQuantConfig(k_group_size=32, residual_length=32, k_token_norms=True)
    cache = XQuantCache(SLIDING, 600, config=config)
    cache.early_initialization(1, KV_HEADS, DIM, DTYPE, torch.device("cpu"))
    assert all(state.spec.wraps for state in cache.states)
    return cache


def on_device(cache: XQuantCache, device: str, model: PretrainedConfig = MODEL) -> XQuantCache:
    """A cache of the same specs as ``cache``, allocated anew; under a FakeTensorMode a fake one."""
    group = CacheGroup(cache.plan, 1, torch.device(device))
    twin = XQuantCache(model, cache.quantized_layers[0].max_cache_len, config=cache.xquant_config)
    states: dict[KVState | None, KVState] = {}
    for layer, old in zip(twin.quantized_layers, cache.quantized_layers, strict=True):
        layer.lazy_initialization(*torch.zeros(2, 1, KV_HEADS, 0, DIM, dtype=DTYPE, device=device))
        for name in ("keys", "values"):
            state = getattr(old, name).state
            states[state] = KVState(state.spec, group, states.get(state.lower))
            setattr(layer, name, QuantizedKV.of(states[state]))
            torch._dynamo.mark_static_address(getattr(layer, name))
    return twin


def decode(model: LlamaForCausalLM, cache: XQuantCache, ids: Tensor) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True).logits


def state_tensors(cache: XQuantCache) -> dict[str, Tensor]:
    """Every stored tensor once, in the order in which the backend makes graph inputs of them."""
    found: dict[int, tuple[str, Tensor]] = {}
    for state in cache.states:
        for name in TENSOR_NAMES:
            tensor = state.tensor(name)
            if tensor is not None:
                found.setdefault(id(tensor), (f"{state.spec.role}{state.spec.layer}_{name}", tensor))
    return dict(found.values())


class Source:
    """Generated code, read as far as the tests need it."""

    def __init__(self, code: str) -> None:
        self.code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))
        body = re.search(r"\n( *)def call\(.*?\n\1    return \(.*?\n", self.code, re.DOTALL)
        assert body is not None
        self.call = body.group()
        self.inputs = re.search(r"\n +(arg\w+(?:, arg\w+)*),? = args\n", self.call).group(1).split(", ")
        self.layouts = _asserted_layouts(self.call)
        self.allocated = [
            (math.prod(_numbers(shape)), dtype)
            for shape, dtype in re.findall(r"= empty_strided_\w+\(\((.*?)\), \(.*?\), torch\.(\w+)\)", self.call)
        ]
        aliases = re.findall(r"(\w+) = reinterpret_tensor\((\w+),|(\w+) = (\w+); ?del", self.call)
        self.alias_of = {a or c: b or d for a, b, c, d in aliases}
        self.kernels = {**_cpp_kernels(self.code), **_triton_kernels(self.code)}
        views = re.sub(r"reinterpret_tensor\((\w+), \(.*?\), \(.*?\), \d+\)", r"\1", self.call)
        runs = re.findall(r"\n +((?:cpp|triton|append|decode|combine)_\w+?)(?:\.run)?\((.*)\)(?=\n)", views)
        self.runs = [(name, [self._base(arg) for arg in arguments.split(", ")]) for name, arguments in runs]

    def _base(self, name: str) -> str:
        while name in self.alias_of:
            name = self.alias_of[name]
        return name

    @property
    def written(self) -> set[str]:
        """Buffers and inputs that a kernel writes to."""
        return {arg for name, args in self.runs for arg, out in zip(args, self.kernels[name], strict=False) if out}

    @property
    def read(self) -> set[str]:
        return {arg for _, args in self.runs for arg in args}

    @property
    def fallbacks(self) -> set[str]:
        """Ops that are called, not generated."""
        return set(re.findall(r"torch\.ops\.([\w.]+)\(", self.call))


#: Arguments of our own kernels that they write to, without the number of a side.
OUR_OUTPUTS = "'codes', 'scale', 'zero', 'ring', 'sink', 'length', 'fault', 'part', 'stats', 'out'"


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _asserted_layouts(call: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Argument to the shape and strides that the code asserts; torch 2.14 does so for several arguments at once."""
    found = {}
    for grouped, text in re.findall(r"\n +assert_size_stride(_grouped)?(\(.*\))(?=\n)", call):
        names, shapes, strides = ast.parse(f"call{text}", mode="eval").body.args[:3]
        layouts = [ast.literal_eval(shapes), ast.literal_eval(strides)]
        if grouped:
            found.update({name.id: layout for name, *layout in zip(names.elts, *layouts, strict=True)})
        else:
            found[names.id] = layouts
    return {name: tuple(layout) for name, layout in found.items()}


def _cpp_kernels(code: str) -> dict[str, list[bool]]:
    """Kernel name to whether each argument is written: those that are no pointers to const."""
    found = re.findall(r"(\w+) = async_compile\.cpp_pybinding\(\[(.*?)\]", code)
    return {name: ["const" not in kind for kind in kinds.split(", ")] for name, kinds in found}


def _triton_kernels(code: str) -> dict[str, list[bool]]:
    """Kernel name to whether each argument is written: Inductor says which, and calls fresh outputs out_ptr.

    It does not say so of kernels that we wrote; those of OUR_OUTPUTS are written.
    """
    kernels = {}
    for name, text in re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL):
        function = name if f"def {name}(" in text else name.rpartition("_")[0]
        arguments = re.search(rf"def {function}\((.*?)\):", text, re.DOTALL).group(1).replace("\n", " ").split(",")
        arguments = [a.strip() for a in arguments if a.strip() and "constexpr" not in a]
        found = re.search(r"'mutated_arg_names': \[(.*?)\]", text)
        mutated = found.group(1) if found else OUR_OUTPUTS
        kernels[name] = [f"'{re.sub('_[01]$', '', a)}'" in mutated or a.startswith("out_ptr") for a in arguments]
    return kernels


def maybe_fake(device: str) -> contextlib.AbstractContextManager[None]:
    """What code generation for ``device`` needs around it; skips where Triton is not installed."""
    if device == "cpu":
        return contextlib.nullcontext()
    pytest.importorskip("triton")
    return fake_cuda()


def step_args(
    cache: XQuantCache, device: str, tokens: int = 1, config: PretrainedConfig = MODEL
) -> tuple[LlamaForCausalLM, XQuantCache, Tensor]:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
        return model, on_device(cache, device, config), torch.zeros(1, tokens, dtype=torch.long)


@functools.cache
def step_code(preset: str, device: str, mode: str | None = None) -> str:
    """Code of a decode step of the two-layer model."""
    cache = empty_cache(preset)
    with maybe_fake(device):
        return generated_code(decode, lambda: step_args(cache, device), mode=mode)


def state_arguments(source: Source, preset: str) -> dict[str, tuple[str, Tensor]]:
    """State tensor to the argument of the generated code that it is: the last ones, in order."""
    tensors = state_tensors(empty_cache(preset))
    names = source.inputs[-len(tensors) :]
    return {name: (argument, tensor) for (name, tensor), argument in zip(tensors.items(), names, strict=True)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", PRESETS)
class TestStep:
    def test_nothing_calls_back(self, preset: str, device: str) -> None:
        source = Source(step_code(preset, device))
        assert "torch.ops.xquant" not in source.code
        assert source.fallbacks == set()

    def test_state_is_passed_as_inputs(self, preset: str, device: str) -> None:
        source = Source(step_code(preset, device))
        for name, (argument, tensor) in state_arguments(source, preset).items():
            assert source.layouts[argument] == (tensor.shape, tensor.stride()), name

    def test_state_is_written_in_place(self, preset: str, device: str) -> None:
        source = Source(step_code(preset, device))
        arguments = state_arguments(source, preset)
        written = {name for name, (argument, _) in arguments.items() if argument in source.written}
        assert written == {name for name in arguments if not name.endswith("_start")}
        assert {argument for argument, _ in arguments.values()} <= source.read

    def test_state_is_not_copied(self, preset: str, device: str) -> None:
        source = Source(step_code(preset, device))
        sizes = {
            (tensor.numel(), str(tensor.dtype).removeprefix("torch."))
            for name, (_, tensor) in state_arguments(source, preset).items()
            if name.split("_")[1] in ("codes", "scale", "zero", "ring")
        }
        assert len(sizes) >= 4 and source.allocated
        assert not sizes & set(source.allocated)
        # Of scales, only the new ones of a step are in no state tensor: of one group of tokens.
        assert all(numel <= KV_HEADS * DIM for numel, dtype in source.allocated if dtype == "float16")
        assert "aten.clone" not in source.fallbacks and ".copy_(" not in source.call

    def test_keys_and_values_are_never_dequantized_to_memory(self, preset: str, device: str) -> None:
        source = Source(step_code(preset, device))
        assert max(numel for numel, _ in source.allocated) < KV_HEADS * LENGTH * DIM // 2


def test_the_mask_of_all_layers_is_computed_once() -> None:
    source = Source(step_code("xquant", "cpu"))
    assert source.call.count("xquant_decode_attention") == MODEL.num_hidden_layers
    assert [each for each in source.allocated if each[1] == "bool"] == [(LENGTH, "bool")]


def test_triton_kernels_do_all_the_work() -> None:
    source = Source(step_code("xquant", "cuda"))
    assert source.code.count("async_compile.triton(") > 10
    assert "async_compile.cpp" not in source.code
    check_all_on_device(source)


def check_all_on_device(source: Source) -> None:
    """No input and no buffer is the CPU's, no number of the device's is asked for: what CUDA graphs would not take."""
    inputs = re.findall(r"(arg\w+) = rand_strided\(.*device='(\w+)", source.code)
    assert {name for name, _ in inputs} == set(source.inputs) and {device for _, device in inputs} == {"cuda"}
    assert "empty_strided_cpu(" not in source.call and "device='cpu'" not in source.code
    assert not re.search(r"\.(item|tolist|cpu|to)\(|_local_scalar_dense|synchronize", source.call)


def test_launches_of_a_layer() -> None:
    """Keys and values are stored by one, with codes of their own and with borrowed ones; attention takes two."""
    source = Source(step_code("xquant", "cuda"))
    ours = [name.rstrip("_0123456789") for name, _ in source.runs if not name.startswith("triton_")]
    assert ours == ["append_kernel", "decode_kernel", "combine_kernel"] * MODEL.num_hidden_layers


def chunk_step(x: Tensor, keys: QuantizedKV, values: QuantizedKV, pos: Tensor) -> Tensor:
    """An attention alone: ``x`` [3, B, H, q, D]."""
    keys[:, :, pos], values[:, :, pos] = x[1], x[2]
    return scaled_dot_product_attention(x[0], keys, values, attn_mask=torch.arange(keys.shape[2]) <= pos[:, None])


def chunk_code(length: int) -> str:
    def make_args() -> tuple[Any, ...]:
        states = layers_of(small("xquant"), (1, KV_HEADS, length, DIM), DTYPE)[0]
        x = torch.zeros(3, 1, KV_HEADS, 12, DIM, dtype=DTYPE)
        return x, *(QuantizedKV.of(state) for state in states), torch.arange(12)

    return generated_code(chunk_step, make_args)


@pytest.mark.parametrize(
    ("device", "whole"),
    [
        ("cpu", False),
        pytest.param("cpu", True, marks=pytest.mark.slow),
        pytest.param("cuda", True, marks=pytest.mark.slow),
    ],
)
def test_a_chunk_is_not_dequantized(device: str, whole: bool) -> None:
    """A chunk on a past reads the codes as a step does: nothing is as large as one layer's keys.

    On CPUs it is stored by a kernel, too: plain torch would be most of what there is to compile.
    """
    length = 512
    with maybe_fake(device):
        if whole:
            cache = empty_cache("xquant", length)
            code = generated_code(decode, lambda: step_args(cache, device, 12))
        else:
            code = chunk_code(length)
    source = Source(code)
    kernel = "decode_kernel" if device == "cuda" else "xquant_decode_attention"
    assert sum(kernel in name for name, _ in source.runs) == (MODEL.num_hidden_layers if whole else 1)
    stores = sum("xquant_append" in name for name, _ in source.runs)
    assert stores == (0 if device == "cuda" else 2 * (MODEL.num_hidden_layers if whole else 1))
    assert "torch.ops.xquant" not in source.code and source.fallbacks == set()
    assert max(numel for numel, _ in source.allocated) < KV_HEADS * length * DIM // 2


@pytest.mark.parametrize("preset", PRESETS)
def test_state_inputs_are_static(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs would copy other inputs at each step, and refuse a graph that writes to one."""
    seen: list[dict[str, Any]] = []

    def inner_compile(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        def run(args: list[Any]) -> Any:
            seen[0]["addresses"].append([a.data_ptr() for a in args])
            return gm(*args)

        run._boxed_call = True
        placeholders = gm.graph.find_nodes(op="placeholder")
        copies = [node for node in gm.graph.nodes if node.target is torch.ops.aten.copy_.default]
        seen.append(
            {
                "mutated": {placeholders.index(node.args[0]) for node in copies},
                "static": set(kwargs["static_input_idxs"]),
                "cudagraphs": inductor_config.triton.cudagraphs,
                "addresses": [],
            }
        )
        return run

    monkeypatch.setattr(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=inner_compile))
    model, cache, ids = step_args(empty_cache(preset), "cpu")
    step = torch.compile(decode, backend="xquant", mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            step(model, cache, ids)

    (graph,) = seen
    assert graph["cudagraphs"]
    first, second = graph["addresses"]
    state = {name: first.index(tensor.data_ptr()) for name, tensor in state_tensors(cache).items()}
    assert set(state.values()) <= graph["static"]
    assert {i for name, i in state.items() if not name.endswith("_start")} <= graph["mutated"] <= graph["static"]
    assert all(first[i] == second[i] for i in graph["static"])


@pytest.mark.slow
def test_reduce_overhead_makes_one_cuda_graph() -> None:
    """Inductor puts what a CUDA graph can hold into partitions; here that is everything."""
    source = Source(step_code("xquant", "cuda", "reduce-overhead"))
    assert source.code.count("def partition_") == source.call.count("self.partitions[") == 1
    outside = source.runs, source.allocated, source.fallbacks, "extern_kernels" in source.call
    assert not any(outside)


@pytest.mark.slow
def test_sliding_windows_are_in_that_graph_too() -> None:
    """Ranked keys, rotated values and storage that starts over: everything in one partition, by our kernels."""
    cache = sliding_cache()
    with maybe_fake("cuda"):
        code = generated_code(decode, lambda: step_args(cache, "cuda", 1, SLIDING), mode="reduce-overhead")
    source = Source(code)
    check_all_on_device(source)
    assert source.code.count("def partition_") == source.call.count("self.partitions[") == 1
    outside = source.runs, source.allocated, source.fallbacks, "extern_kernels" in source.call
    assert not any(outside)
    for kernel in ("append_kernel", "decode_kernel", "combine_kernel"):
        assert len(re.findall(rf"\n +{kernel}_\d+\.run\(", source.code)) == MODEL.num_hidden_layers


def rows_step(x: Tensor, buffers: list[QuantizedKV], pos: Tensor) -> Tensor:
    """A layer whose rows are written at positions of their own [B, q]; ``x`` [3, B, H, q, D]."""
    for buffer, new in zip(buffers, x[1:], strict=True):
        buffer[torch.arange(pos.shape[0], device=x.device)[:, None], :, pos] = new.transpose(1, 2)
    mask = torch.arange(LENGTH, device=x.device) <= pos[:, None, :, None]
    return scaled_dot_product_attention(x[0], *buffers, attn_mask=mask)


def test_rows_of_lengths_of_their_own() -> None:
    """One launch stores both sides of all rows, one attends to the codes: rows are no loop, and nothing is copied."""
    shape, config = (3, KV_HEADS, LENGTH, DIM), small("xquant")
    states = layers_of(config, shape, DTYPE, ragged=True)[0]

    def make_args() -> tuple[Any, ...]:
        made = layers_of(config, shape, DTYPE, device="cuda", ragged=True)[0]
        with torch.device("cuda"):
            x, pos = torch.zeros(3, 3, KV_HEADS, 2, DIM, dtype=DTYPE), torch.zeros(3, 2, dtype=torch.int64)
        return x, [QuantizedKV.of(state) for state in made], pos

    with maybe_fake("cuda"):
        source = Source(generated_code(rows_step, make_args))
    check_all_on_device(source)
    assert source.fallbacks == set() and ".copy_(" not in source.call
    ours = [name.rstrip("_0123456789") for name, _ in source.runs if not name.startswith("triton_")]
    assert ours == ["append_kernel", "decode_kernel", "combine_kernel"]
    sizes = {(t.numel(), str(t.dtype).removeprefix("torch.")) for state in states for t in state.owned.values()}
    assert source.allocated and not sizes & set(source.allocated)
    (appended,) = (arguments for name, arguments in source.runs if name.startswith("append"))
    lengths = [argument for argument in source.inputs if source.layouts[argument] == ((3, 2), (2, 1))]
    assert len(lengths) == 3 and set(lengths) <= {*appended, *source.read}  # positions, and lengths of both sides
    assert {*lengths} & source.written == {*lengths[1:]}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x @ weight).softmax(-1)


def attention(x: Tensor, weight: Tensor) -> Tensor:
    return scaled_dot_product_attention(x, x @ weight, x, is_causal=True)


def growing(x: Tensor, past: Tensor) -> Tensor:
    """What grows is not returned: no cache."""
    every = torch.cat([past, x], dim=2)
    return scaled_dot_product_attention(x, every, every)


INDUCTORS = list(
    itertools.product([linear, attention, growing], [("cpu", None), ("cuda", None), ("cuda", "reduce-overhead")])
)
#: Each function, and each place to run it.
QUICK = [(linear, ("cpu", None)), (attention, ("cuda", None)), (growing, ("cuda", "reduce-overhead"))]


@pytest.mark.parametrize(
    ("function", "device", "mode"),
    [pytest.param(f, *at, marks=() if (f, at) in QUICK else pytest.mark.slow) for f, at in INDUCTORS],
)
def test_without_a_cache_it_is_inductor(function: Any, device: str, mode: str | None) -> None:
    shapes = {
        linear: [(4, 16), (16, 16)],
        attention: [(1, 2, 8, 16), (16, 16)],
        growing: [(1, 2, 1, 16), (1, 2, 8, 16)],
    }

    def make_args() -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, device=device) for shape in shapes[function])

    with maybe_fake(device):
        ours, plain = (
            generated_code(function, make_args, backend=backend, mode=mode) for backend in ("xquant", "inductor")
        )
    number = re.compile(r"# AOT ID: .*")
    assert number.sub("", ours) == number.sub("", plain)
    assert f" = empty_strided_{device}((" in ours


def test_fake_cuda_leaves_nothing_behind() -> None:
    pytest.importorskip("triton")
    before = has_triton(), CudaInterface.is_available(), torch.cuda.is_available()
    with fake_cuda():
        assert has_triton() and CudaInterface.is_available()
        assert torch.cuda.is_available() == before[2]
    assert (has_triton(), CudaInterface.is_available(), torch.cuda.is_available()) == before


@pytest.mark.slow
def test_generated_code_is_what_runs() -> None:
    """The fake tensors above stand for real ones: same code, and the state stays where it is."""
    model, cache, ids = step_args(empty_cache("xquant"), "cpu")
    with torch.no_grad():
        decode(model, cache, torch.arange(20)[None])
        before = {name: tensor.data_ptr() for name, tensor in state_tensors(cache).items()}
        held = {name: tensor.clone() for name, tensor in state_tensors(cache).items()}
        step = torch.compile(decode, backend="xquant", dynamic=False)
        logits, (code,) = run_and_get_code(step, model, cache, ids)
    number = re.compile(r"# AOT ID: .*")
    assert number.sub("", code) == number.sub("", step_code("xquant", "cpu"))
    assert logits.isfinite().all()
    after = state_tensors(cache)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before
    assert {state.length for state in cache.states} == {21}
    changed = {name.split("_")[1] for name, tensor in after.items() if not torch.equal(tensor, held[name])}
    assert {"ring", "length", "codes", "scale", "zero"} == changed

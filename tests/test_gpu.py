"""Numbers on a real GPU: what the interpreter and the compile-only checks cannot tell. Run by benchmarks/gpu.sh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    RANKED_CASES,
    RANKED_SPOILED,
    SPOILED,
    WHOLE_CASES,
    WHOLE_RANKED,
    WHOLE_SLOW,
    WHOLE_SPOILED,
    allowed,
)
from attention_runs import Setup, arguments, errors, inputs
from dynamo_graphs import tiny
from states import layers_of
from stepping import interpreted

from xquant_fx import XQuantCache, XQuantConfig, ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
STEPS = [300, 1, 1, 1, 5, 1, 8, 1, 1, 40, 1, 1]


def moved(values: dict[str, Any]) -> dict[str, Any]:
    return {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in values.items()}


WHOLE = {**WHOLE_CASES, **WHOLE_RANKED, **WHOLE_SLOW, **WHOLE_SPOILED}
EVERY = {**CASES, **SPOILED, **RANKED_CASES, **RANKED_SPOILED, **WHOLE}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", EVERY)
def test_attention(name: str, dtype: str) -> None:
    case = EVERY[name]
    setup = Setup(**{**case, "dtype": case.get("dtype", dtype)})
    given = inputs(setup)
    result = errors(setup, ops.DECODE(**moved(arguments(setup, given))).cpu(), given)
    assert result["same_nan"] and result["zeros_are_zero"]
    assert result["error"] <= allowed(result, vars(setup)), result


@pytest.mark.parametrize("preset", ["xquant", "xquant-paper", "xquant-1bit", "kivi-4", "xquant-2.2", "xquant-1.4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["key", "value"])
def test_append_is_the_cpus(side: str, dtype: torch.dtype, preset: str) -> None:
    config = XQuantConfig.preset(preset).replace(k_group_size=32, residual_length=64)
    layers = {device: layers_of(config, (2, 3, 400, 64), dtype, 2, device=device) for device in ("cpu", "cuda")}
    for layer in (0, 1):
        states = {device: layers[device][layer][side == "value"] for device in ("cpu", "cuda")}
        at = 0
        for number, new in enumerate(STEPS):
            x = torch.randn(2, 3, new, 64, generator=torch.Generator().manual_seed(100 * layer + number)).to(dtype)
            for device, state in states.items():
                state.store(x.to(device), torch.arange(at, at + new, device=device))
            at += new
        assert states["cuda"].length == at
        torch.testing.assert_close(*(state.owned["ring"].cpu() for state in states.values()), rtol=0, atol=0)
        # All that is read; the kernel leaves what is not as it was. A code or a scale at a tie may fall either way.
        loads = [state.load(at).cpu().float() for state in states.values()]
        assert (~loads[0].isclose(loads[1], 1e-2, 1e-2)).float().mean() < 2e-3


def test_sequences_one_after_the_other() -> None:
    """In the same memory, under other modes: each step is the eager one."""
    model, config = tiny("llama", max_position_embeddings=128).cuda(), XQuantConfig(residual_length=32, k_group_size=32)
    ids, outs = torch.randint(3, 60, (2, 90), generator=torch.Generator().manual_seed(0)).cuda(), []
    for compiled in (False, True):
        step = torch.compile(model.forward, backend="xquant", dynamic=False) if compiled else model.forward
        cache = XQuantCache(model.config, 128, config)
        for mode in (torch.no_grad(), torch.inference_mode(), torch.no_grad(), torch.device("cuda")):
            with torch.no_grad(), mode:
                model(ids[:, :70], past_key_values=cache)
                outs += [step(piece, past_key_values=cache).logits.cpu() for piece in ids[:, 70:].split(1, 1)]
            cache.reset()
    half = len(outs) // 2
    torch.testing.assert_close(torch.cat(outs[:half], 1), torch.cat(outs[half:], 1), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_cache_on_another_gpu() -> None:
    """Uncompiled steps and compiled ones, while the current GPU is the first."""
    model = tiny("llama", max_position_embeddings=256)
    ids, outs = torch.randint(3, 60, (2, 100), generator=torch.Generator().manual_seed(0)), []
    for device, compiled in (("cuda:0", False), ("cuda:1", False), ("cuda:1", True)):
        model.to(device)
        step = torch.compile(model.forward, backend="xquant", dynamic=False) if compiled else model.forward
        cache = XQuantCache(model.config, 256, XQuantConfig(residual_length=32, k_group_size=32))
        with torch.no_grad():
            model(ids[:, :70].to(device), past_key_values=cache)
            pieces = ids[:, 70:].to(device).split(1, 1)
            outs.append(torch.cat([step(piece, past_key_values=cache).logits.cpu() for piece in pieces], 1))
    for other in outs[1:]:
        torch.testing.assert_close(outs[0], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", ["xquant", "xquant-2.2"])
def test_compiled_steps_are_the_eager_ones(preset: str, attention: str, mode: str | None) -> None:
    """Float32, across flushes, with a chunk among the steps; with CUDA graphs in reduce-overhead."""
    model = tiny("llama", attention, max_position_embeddings=256).cuda()
    config, outs = XQuantConfig.preset(preset).replace(k_group_size=32, residual_length=32), []
    ids = torch.randint(3, 60, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    for compiled in (False, True):
        cache = XQuantCache(model.config, 256, config)
        step = torch.compile(model.forward, backend="xquant", mode=mode, dynamic=False) if compiled else model.forward
        with torch.no_grad():
            model(ids[:, :70], past_key_values=cache)
            pieces = ids[:, 70:190].split([1] * 50 + [20] + [1] * 50, 1)
            outs.append([step(piece, past_key_values=cache).logits.clone() for piece in pieces])
    torch.testing.assert_close(torch.cat(outs[0], 1), torch.cat(outs[1], 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [(300, 40), (200, 33)])
@torch.no_grad()
def test_compiled_prompts_are_the_eager_ones(tokens: tuple[int, ...]) -> None:
    """A prompt and a chunk, of a second number of tokens, too."""
    model = tiny("llama", max_position_embeddings=512).cuda()
    step = torch.compile(model.forward, backend="xquant", options={"compile_prompts": True})
    for fewer in (0, 7):
        mine, theirs = (XQuantCache(model.config, max_cache_len=512) for _ in range(2))
        for number, new in enumerate(tokens):
            ids = torch.randint(3, 60, (1, new - fewer), generator=torch.Generator().manual_seed(number)).cuda()
            out, expected = (f(ids, past_key_values=c).logits for f, c in ((step, mine), (model, theirs)))
            torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("preset", ["xquant", "xquant-2.2"])
def test_a_whole_step_is_one_cuda_graph(preset: str) -> None:
    """Nothing is left out of it, nothing but token ids is copied into it, and the host waits for nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny("llama", max_position_embeddings=256).cuda()
    cache = XQuantCache(model.config, 256, XQuantConfig.preset(preset).replace(k_group_size=32, residual_length=32))
    ids = torch.randint(3, 60, (2, 70), generator=torch.Generator().manual_seed(0)).cuda()
    step = torch.compile(model.forward, backend="xquant", mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(5):  # compiles, warms up, records, replays
            torch.compiler.cudagraph_mark_step_begin()
            step(ids[:, :1], past_key_values=cache)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                step(ids[:, :1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] <= 1
    assert {state.length for state in cache.states} == {78}


@pytest.mark.parametrize("preset", ["xquant", "xquant-2.2"])
def test_rows_of_lengths_of_their_own(preset: str) -> None:
    """Buffers that compiled steps take over, a row of which begins anew: as steps run one op at a time on the CPU."""
    config = XQuantConfig.preset(preset).replace(k_group_size=32, residual_length=32)
    numbers = torch.Generator().manual_seed(0)
    x, prompt = torch.randn(40, 3, 3, 2, 1, 64, generator=numbers), torch.randn(2, 3, 2, 100, 64, generator=numbers)
    lengths = torch.tensor([100, 0, 37])
    steps = [lengths + i if i < 20 else torch.tensor([lengths[0] + i, i - 20, 57]) for i in range(40)]

    def step(x: Any, keys: Any, values: Any, pos: Any) -> Any:
        for buffer, new in zip((keys, values), x[1:], strict=True):
            buffer[torch.arange(3, device=x.device), :, pos] = new[:, :, 0]
        mask = torch.arange(192, device=x.device) <= pos[:, None, None, None]
        return torch.nn.functional.scaled_dot_product_attention(x[0], keys, values, attn_mask=mask)

    outs = []
    for device, backend in (("cpu", interpreted(config=config)), ("cuda", "xquant")):
        torch._dynamo.reset()
        options = {"config": config} if backend == "xquant" else None
        compiled, buffers = torch.compile(step, backend=backend, options=options), torch.zeros(2, 3, 2, 192, 64)
        for row, length in enumerate(lengths.tolist()):
            buffers[:, row, :, :length] = prompt[:, row, :, :length]
        keys, values = (buffer.to(device).clone() for buffer in buffers)
        with torch.no_grad():
            outs.append([compiled(x[i].to(device), keys, values, pos.to(device)).cpu() for i, pos in enumerate(steps)])
        assert keys.state.row_lengths == [140, 20, 58]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [4096, 32768])
def test_a_step_allocates_next_to_nothing(length: int) -> None:
    """Less than 16 bytes per token beyond weights and cache."""
    model = tiny("llama", max_position_embeddings=length, head_dim=64).cuda().to(torch.bfloat16)
    cache, ids = XQuantCache(model.config, length), torch.zeros(1, 1, dtype=torch.long, device="cuda")
    step = torch.compile(model.forward, backend="xquant", dynamic=False)
    with torch.no_grad():
        for layer in range(2):
            cache.update(*torch.randn(2, 1, 2, length - 8, 64, device="cuda", dtype=torch.bfloat16), layer)
        for _ in range(3):
            step(ids, past_key_values=cache)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(ids, past_key_values=cache)
    assert torch.cuda.max_memory_allocated() - before < 16 * length + 2**20

"""The kernel with which prompts, and long parts of them, attend: beside float64 and torch's own, and who has it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamo_graphs import tiny
from stepping import interpreted
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.prompt_attention import attention, by_kernel
from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.cache.reads import ReadOnlyCopy
from xquant_fx.kernels.cpu import build
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.prompt_attention import cpu_call
from xquant_fx.kernels.prompt_attention.cpu_source import Problem, source
from xquant_fx.kernels.prompt_attention.seen import causal, seen_by

DIM = 96  # vectors of 64 channels, and of 32
LONG = cpu_call.LONG_PROMPT


def prompt(batch: int, heads: int, kv_heads: int, tokens: int, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v in bfloat16, queries as models lay them out; scores are ``gain`` times as large as usual."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(batch, tokens, h, DIM, generator=generator) for h in (heads, kv_heads, kv_heads))
    return (q * gain).bfloat16().transpose(1, 2), *(x.bfloat16().transpose(1, 2).contiguous() for x in (k, v))


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float = DIM**-0.5) -> Tensor:
    """In float64, with all scores at once."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q.double() @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    "sizes",
    [(2, 3, 3, 257), (1, 6, 2, 300, 4.0), (1, 4, 1, 400, 30.0), (1, 2, 1, 5), (1, 1, 1, 512)],
    ids=["two rows", "groups of three", "peaked, groups of four", "a few tokens", "whole blocks"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_errors_are_not_larger_than_those_of_torch(sizes: tuple[Any, ...], dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in prompt(*sizes))
    ours = cpu_call.attend(q, k, v, causal(sizes[0], sizes[3]))
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert ours.shape == theirs.shape and ours.stride() == theirs.stride() and ours.dtype == dtype
    errors = [(x - exact(q, k, v)).abs() for x in (ours, theirs)]
    slack = 1.0 if dtype == torch.bfloat16 else 2.0  # torch's float32 sums are in another order on each processor
    assert errors[0].square().mean() <= 1.1 * slack * errors[1].square().mean()
    assert errors[0].max() <= 1.25 * slack * errors[1].max()


def test_what_tokens_cannot_see() -> None:
    """Nothing of later tokens; spoiled ones spoil their own head only, from their token on."""
    q, k, v = prompt(1, 4, 2, 300)
    seen = causal(1, 300)
    before, k = cpu_call.attend(q, k, v, seen, scale=0.3), k.clone()
    torch.testing.assert_close(before.double(), exact(q, k, v, 0.3), atol=0.02, rtol=0.01)
    k[0, 1, 200] = torch.nan
    spoiled = cpu_call.attend(q, k, v, seen, scale=0.3)
    assert torch.equal(spoiled[:, :2], before[:, :2]) and torch.equal(spoiled[:, :, :200], before[:, :, :200])
    assert spoiled[:, 2:, 200:].isnan().all()


def test_many_threads_give_the_same() -> None:
    given, threads = (*prompt(2, 6, 2, 300), causal(2, 300)), torch.get_num_threads()
    one = cpu_call.attend(*given)
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu_call.attend(*given), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["portable", "avx512"])
def test_on_any_processor(isa: str) -> None:
    """Where nothing multiplies pairs, and the instructions that do spelt out (avx512.h)."""
    q, k, v = prompt(1, 2, 1, 140)
    out = torch.empty(1, 140, 2, DIM, dtype=torch.bfloat16).transpose(1, 2)
    types, code = source(Problem(dtype=torch.bfloat16, dim=DIM), ISAS[isa])
    others = "".join(f"#undef {m}\n" for m in ("__AVX512VNNI__", "__AVX512VL__", "__AVX512BF16__"))
    shim = f"{others}#define __AVX512BF16__ 1\n{(Path(__file__).parent / 'avx512.h').read_text()}"
    strides = [x.stride(i) for x in (q, k, v, out) for i in range(3)]
    code = code.replace("#include <immintrin.h>", shim)
    build.load(types, code)(q, k, v, out, *causal(1, 140)[:2], *strides, 1, 2, 1, 140, 140, DIM**-0.5)
    torch.testing.assert_close(out.double(), exact(q, k, v), atol=0.02, rtol=0.01)


def later(queries: int, tokens: int) -> Tensor:
    """What the last ``queries`` of ``tokens`` see, bool [q, n]."""
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)


PADDED = later(70, 200).expand(2, 1, 70, 200) & (torch.arange(200) >= torch.tensor([[[[0]]], [[[140]]]]))
MASKS = {
    "a later chunk": later(70, 200),
    "padding, and queries that are padding": PADDED,
    "a window": later(70, 200) & ~later(70, 200).roll(-33, 1).tril(90),
    "everything": torch.ones(1, 1, 70, 200, dtype=torch.bool),
    "nothing behind the 10th": (torch.arange(200) < 10).expand(70, 200),
    "a cache with room": torch.nn.functional.pad(later(70, 140), (0, 60)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", MASKS)
def test_what_masks_show(name: str, dtype: torch.dtype) -> None:
    """Beside float64 and torch; what nobody sees changes nothing, and who sees nothing gets zeros."""
    q, k, v = (x.to(dtype) for x in prompt(2, 6, 2, 200))
    q, mask = q[:, :, :70], MASKS[name]
    seen = seen_by(mask, q, k)
    assert seen is not None
    given = [x.repeat_interleave(3, 1) for x in (k, v)]
    right = scaled_dot_product_attention(*(x.double() for x in (q, *given)), attn_mask=mask)
    theirs = scaled_dot_product_attention(q, *given, attn_mask=mask)
    ours = cpu_call.attend(q, k[:, :, : seen.tokens], v[:, :, : seen.tokens], seen)
    errors = [(x - right).abs() for x in (ours, theirs)]
    assert errors[0].square().mean() <= 2 * errors[1].square().mean() and errors[0].max() <= 2 * errors[1].max()
    blind = ~mask.any(-1).expand(2, 6, 70)
    assert bool((ours[blind] == 0).all()) and bool(blind.any()) == ("queries" in name)


def test_masks_that_are_no_runs_of_tokens() -> None:
    q, k, _ = prompt(2, 6, 2, 200)
    holes = later(200, 200)
    holes[150, 20] = False
    left = [
        holes,
        torch.zeros(200, 200),
        later(200, 200).expand(2, 6, 200, 200),
        later(199, 200),
        holes.expand(2, 200, 200),
    ]
    assert [seen_by(mask, q, k) for mask in left] == [None] * len(left)


def test_a_mask_is_read_once_a_version() -> None:
    q, k, _ = prompt(1, 2, 2, 200)
    mask = later(200, 200)[None, None]
    first = seen_by(mask, q, k)
    assert first is not None and seen_by(mask, q, k) is first
    mask[..., 5, 3:] = False
    changed = seen_by(mask, q, k)
    assert changed is not None and int(changed.end[0, 5]) == 3 and int(first.end[0, 5]) == 6
    with torch.inference_mode():
        inner = later(200, 200)[None, None]
        assert seen_by(inner, q, k) is not seen_by(inner, q, k)  # it counts no versions


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that the kernel is given, on a processor that gains in bfloat16."""
    seen: list[tuple[int, ...]] = []
    attend: Callable[..., Tensor] = cpu_call.attend

    def noted(query: Tensor, *args: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return attend(query, *args)

    monkeypatch.setattr(cpu_call, "attend", noted)
    monkeypatch.setattr(cpu_call, "faster_dtypes", lambda: (torch.bfloat16,))
    return seen


class Other(Tensor):
    """Tensors of another class, which need not have memory."""


def note(query: Tensor) -> None:
    """What keys do with the query that reads them."""


Q, K, V = prompt(1, 4, 2, LONG)
MASK = torch.zeros(LONG, LONG, dtype=torch.bfloat16)
GROUPED = dict(is_causal=True, enable_gqa=True)
LEFT = {
    "a mask": ((Q, K, V), dict(attn_mask=MASK, enable_gqa=True)),
    "not causal": ((Q, K, V), dict(enable_gqa=True)),
    "dropout": ((Q, K, V), dict(GROUPED, dropout_p=0.5)),
    "float32": ((Q.float(), K.float(), V.float()), GROUPED),
    "short": (tuple(x[:, :, : LONG - 1] for x in (Q, K, V)), GROUPED),
    "fewer queries": ((Q[:, :, 1:], K, V), GROUPED),
    "odd head_dim": (tuple(x[..., :80] for x in (Q, K, V)), GROUPED),
    "other values": ((Q, K, V[..., :64]), GROUPED),
    "another class": ((Q, K, V.as_subclass(Other)), GROUPED),
    "gradients": ((Q.detach().requires_grad_(), K, V), GROUPED),
    "gradients of values": ((Q, K, V.detach().requires_grad_()), GROUPED),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_torch_computes(name: str, calls: list[tuple[int, ...]]) -> None:
    (q, k, v), given = LEFT[name]
    torch.manual_seed(0)
    out = scaled_dot_product_attention(q, PromptKeys.of(k, note), v, **given)
    torch.manual_seed(0)
    expected = scaled_dot_product_attention(q, k, v, **given)
    assert torch.equal(out.as_subclass(Tensor), expected.as_subclass(Tensor)) and not calls


@pytest.mark.parametrize("around", [Watched(), sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.float16)])
def test_when_torch_computes(around: Any, calls: list[tuple[int, ...]]) -> None:
    for context in (around, nullcontext()):
        with context:
            scaled_dot_product_attention(Q, PromptKeys.of(K, note), V, None, 0.0, True, enable_gqa=True)
        assert len(calls) == (context is not around)


def test_a_profiler_changes_nothing_and_sees_the_kernel(calls: list[tuple[int, ...]]) -> None:
    outs = []
    for around in (nullcontext(), torch.profiler.profile()):
        with around:
            outs.append(scaled_dot_product_attention(Q, PromptKeys.of(K, note), V, None, 0.0, True, enable_gqa=True))
    assert torch.equal(outs[0], outs[1]) and len(calls) == 2
    assert "xquant::prompt_attention" in [event.key for event in around.key_averages()]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("capability", "gains"), [("AVX2", {"bfloat16", "float32"}), ("DEFAULT", set())])
def test_dtypes_that_gain(capability: str, gains: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert {str(dtype).split(".")[1] for dtype in cpu_call.faster_dtypes.__wrapped__()} == gains


def test_other_calls_that_have_it(calls: list[tuple[int, ...]]) -> None:
    """Repeated KV heads, no groups, a scale, no gradient wanted; compiled ones do not."""
    keys, expected = PromptKeys.of(K, note), exact(Q, K, V, 0.2)
    repeated = keys[:, :, None].expand(1, 2, 2, LONG, DIM).reshape(1, 4, LONG, DIM)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)

    with torch.no_grad():
        out = attend(Q.detach().requires_grad_(), repeated, V.repeat_interleave(2, 1))
        torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.01)
        assert type(out) is Tensor and len(calls) == 1
        compiled = torch.compile(lambda q, k, v: attend(q, PromptKeys.of(k, note), v), backend="eager", fullgraph=True)
        compiled(Q, K.repeat_interleave(2, 1), V.repeat_interleave(2, 1))
    assert len(calls) == 1


@pytest.mark.parametrize("way", ["eager", "by a graph"])
def test_a_prompt_of_a_model(calls: list[tuple[int, ...]], way: str) -> None:
    """A padded prompt as with torch's attention, to rounding; eagerly a long chunk, too, and the same tokens."""
    fields = dict(hidden_size=64, head_dim=DIM, max_position_embeddings=1024)
    model = tiny("llama", **fields).to(torch.bfloat16)
    if way == "by a graph":
        model.compile(backend=interpreted(), dynamic=True)
    ids = torch.randint(3, 60, (2, 560), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def run(around: Any) -> tuple[Tensor, Tensor | None]:
        cache = XQuantCache(model.config, 800, XQuantConfig(k_bits=16, v_bits=16))
        with torch.no_grad(), around:
            told = dict(past_key_values=cache, output_hidden_states=True)
            hidden = [model(ids[:, :300], attention_mask=mask[:, :300], **told).hidden_states[-1][:, 9:]]
            if way != "eager":  # a compiled chunk has a kernel of its own
                return hidden[0], None
            hidden.append(model(ids[:, 300:], attention_mask=mask, **told).hidden_states[-1])
            cache.reset()
            text = model.generate(ids[:, :300], past_key_values=cache, max_new_tokens=4, do_sample=False)
            return torch.cat(hidden, 1), text

    theirs = run(sdpa_kernel(SDPBackend.MATH))
    assert not calls
    ours = run(nullcontext())
    one = [(2, 4, 300, DIM)] * 2  # two layers
    assert calls == (one + [(2, 4, 260, DIM)] * 2 + one if way == "eager" else one)
    torch.testing.assert_close(ours[0], theirs[0], atol=0.05, rtol=0.05)
    assert ours[1] is theirs[1] is None or torch.equal(ours[1], theirs[1])


def test_a_graph_that_runs_uncompiled() -> None:
    """Its attention is exchanged, and dequantizes what is stored as codes; short ones are torch's."""

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    gm = by_kernel(torch.fx.symbolic_trace(program))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [attention]
    q, k, v = (x.float() for x in prompt(1, 4, 4, 300))
    for tokens in (300, 20):
        cut = [x[:, :, :tokens] for x in (q, k, v)]
        codes = [ReadOnlyCopy(x, "keys") for x in cut[1:]]
        torch.testing.assert_close(gm(cut[0], *codes), program(*cut))

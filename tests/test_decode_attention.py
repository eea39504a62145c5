"""The public ``decode_attention``, for loops that people write themselves, against float64 attention.

What the cache's own eager read gives is the truth about the stored tokens; here it is the arguments
that are tried, not the kernel's arithmetic (tests/test_cpu_attention.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_and_slow import fast_but
from numeric import seeded
from states import range_config
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache, LlamaConfig, StaticCache

from xquant_fx import ArgumentError, CacheStateError, XQuantCache, XQuantConfig, decode_attention

B, HEADS, KV_HEADS, DIM, MAX_LEN, PROMPT = 2, 4, 2, 16, 96, 75
PADDING = torch.tensor([0, 9])
CONFIG = range_config(k_bits=2, v_bits=2, k_group_size=16, residual_length=32, rollback_tokens=8)


def model_config() -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=2, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )


def tokens(count: int, heads: int, seed: int) -> Tensor:
    return torch.randn(B, heads, count, DIM, generator=seeded(seed))


class Loop:
    """A cache of two layers with left padding, filled with a prompt; ``step`` appends and attends."""

    def __init__(self, config: XQuantConfig = CONFIG, padded: bool = True) -> None:
        seen = torch.arange(PROMPT) >= PADDING[:, None] if padded else None
        self.cache = XQuantCache(model_config(), max_cache_len=MAX_LEN, config=config, padding_mask=seen)
        self.length = 0
        self.append(PROMPT)

    def append(self, new: int) -> list[tuple[Tensor, Tensor]]:
        """What attention sees of every layer after ``new`` more tokens: keys and values [B, Hkv, N, D]."""
        seen = []
        for layer in (0, 1):
            k, v = (tokens(new, KV_HEADS, 10 * self.length + 2 * layer + side) for side in (0, 1))
            seen.append(tuple(t.to(torch.float64) for t in self.cache.update(k, v, layer)))
        self.length += new
        return seen


def truth(q: Tensor, seen: tuple[Tensor, Tensor], mask: Tensor, scale: float, softcap: float = 0.0,
          sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in seen)
    logits = q.double() @ k.mT * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(B, HEADS, q.shape[2], 1)], -1)
    return torch.softmax(logits, -1)[..., :MAX_LEN] @ v


def causal(length: int, new: int, window: int = 0, padded: bool = True) -> Tensor:
    """Bool [B, 1, new, N]."""
    t, position = torch.arange(MAX_LEN), torch.arange(length - new, length)[:, None]
    mask = (t <= position) & (t > position - window if window else t >= 0)
    return (mask & ((t >= PADDING[:, None, None]) | (not padded)))[:, None]


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("layer", [0, 1])
def test_causal_with_left_padding(layer: int, new: int) -> None:
    """Steps over a flush, the upper layer of the pair on borrowed value codes."""
    loop = Loop()
    for number in range(7):
        seen = loop.append(new)[layer]
        q = tokens(new, HEADS, number)
        out = decode_attention(q, loop.cache, layer)
        want = truth(q, seen, causal(loop.length, new), DIM**-0.5)
        torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-5)


def test_causal_without_padding() -> None:
    """The last token sees all that is there, so that there is no mask; and only that, after a rollback."""
    loop = Loop(padded=False)
    for number, taken_back in enumerate((0, 0, 3, 0)):
        if taken_back:
            loop.cache.crop(-taken_back)
            loop.length -= taken_back
        seen, q = loop.append(1)[0], tokens(1, HEADS, number)
        want = truth(q, seen, causal(loop.length, 1, padded=False), DIM**-0.5)
        torch.testing.assert_close(decode_attention(q, loop.cache, 0), want.float(), rtol=1e-4, atol=1e-5)


bias = torch.randn(B, HEADS, 2, MAX_LEN, generator=seeded(1))
ARGUMENTS: dict[str, tuple[dict[str, Any], Any]] = {
    "a scale": ({"scale": 0.7}, {"scale": 0.7}),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
    "a window": ({"window": 20}, {"mask": causal(PROMPT + 2, 2, window=20)}),
    "sink logits": ({"sink_logits": torch.arange(4.0)}, {"sinks": torch.arange(4.0)}),
    "sink logits of float64": ({"sink_logits": torch.arange(4.0).double()}, {"sinks": torch.arange(4.0)}),
    "a mask of [N]": ({"mask": bias[0, 0, 0] < 0}, {"mask": (bias[0, 0, 0] < 0).expand(B, HEADS, 2, MAX_LEN)}),
    "a mask of [q, N]": ({"mask": bias[0, 0] < 0}, {"mask": (bias[0, 0] < 0).expand(B, HEADS, 2, MAX_LEN)}),
    "a mask of [H, q, N]": ({"mask": bias[0]}, {"mask": bias[:1].expand(B, HEADS, 2, MAX_LEN)}),
    "a mask of [B, H, q, N]": ({"mask": bias < 0}, {"mask": bias < 0}),
    "a float mask": ({"mask": bias}, {"mask": bias}),
    "a mask of float64": ({"mask": bias.double()}, {"mask": bias}),
    "a mask of bfloat16": ({"mask": bias.bfloat16()}, {"mask": bias.bfloat16()}),
}


#: Each of these has a kernel of its own; see ``test_arguments_together``, "a mask of [q, N]" and "a float mask".
ALONE = ("a scale", "softcap", "a window", "sink logits", "sink logits of float64", "a mask of [B, H, q, N]")


@pytest.mark.parametrize("name", fast_but(ARGUMENTS, ALONE))
def test_arguments(name: str) -> None:
    loop, (given, wanted) = Loop(), ARGUMENTS[name]
    seen = loop.append(2)[0]
    q = tokens(2, HEADS, 3)
    want = truth(q, seen, **{"mask": causal(loop.length, 2), "scale": DIM**-0.5, **wanted})
    out = decode_attention(q, loop.cache, 0, **given)
    torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-5)
    if "mask" not in given:
        plain = decode_attention(q, loop.cache, 0)
        assert (out - plain).abs().max() > 1e-2, f"{name} changes nothing"


@pytest.mark.parametrize("sinks", ["sink logits", "sink logits of float64"])
def test_arguments_together(sinks: str) -> None:
    """By one kernel; the truth says that each of them changes something."""
    loop, names = Loop(), ("a scale", "softcap", "a window", sinks)
    seen = loop.append(2)[0]
    q, usual = tokens(2, HEADS, 3), {"mask": causal(loop.length, 2), "scale": DIM**-0.5}

    def wanted(names: tuple[str, ...]) -> Tensor:
        return truth(q, seen, **functools.reduce(lambda most, name: most | ARGUMENTS[name][1], names, usual))

    given = functools.reduce(lambda most, name: most | ARGUMENTS[name][0], names, {})
    out, want = decode_attention(q, loop.cache, 0, **given), wanted(names)
    torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-5)
    for name in names:
        without = wanted(tuple(other for other in names if other != name))
        assert (want - without).abs().max() > 1e-2, f"{name} changes nothing"


def test_a_pair_of_buffers() -> None:
    loop = Loop()
    loop.append(1)
    q, layer = tokens(1, HEADS, 3), loop.cache.layers[1]
    assert torch.equal(decode_attention(q, (layer.keys, layer.values), 1), decode_attention(q, loop.cache, 1))
    assert torch.equal(decode_attention(q, [layer.keys, layer.values], 1), decode_attention(q, loop.cache, 1))
    with pytest.raises(ArgumentError, match=r"must be \(keys, values\), got \(values, keys\)"):
        decode_attention(q, (layer.values, layer.keys), 1)


class Wrapped(Tensor):
    """A tensor that has its numbers in another one, as quantized weights and distributed tensors do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        return func(*given[0], **given[1])


Attend = Callable[..., Tensor]
#: Ways to call it whose tensors have no numbers at the address they name, or other ones.
INDIRECT: dict[str, Callable[[Attend, Tensor, Tensor], Tensor]] = {
    "wrapped queries": lambda attend, q, mask: attend(Wrapped(q), mask),
    "a wrapped mask": lambda attend, q, mask: attend(q, Wrapped(mask)),
    "a negated view": lambda attend, q, mask: attend(torch._neg_view(-q), mask),
    "a negated view of a mask": lambda attend, q, mask: attend(q, torch._neg_view(-mask)),
    "vmap": lambda attend, q, mask: torch.vmap(attend, (0, None))(torch.stack([-q, q]), mask)[1],
    "functionalize": lambda attend, q, mask: torch.func.functionalize(attend)(q, mask),
}


@pytest.mark.parametrize("name", INDIRECT)
def test_numbers_that_are_not_where_the_tensor_is(name: str) -> None:
    cache, q, mask = Loop().cache, tokens(2, HEADS, 3), bias

    def attend(q: Tensor, mask: Tensor) -> Tensor:
        return decode_attention(q, cache, 0, mask=mask)

    torch.testing.assert_close(INDIRECT[name](attend, q, mask), attend(q, mask), rtol=0, atol=0)


def test_zeros_without_memory() -> None:
    cache, zeros = Loop().cache, torch._efficientzerotensor((B, HEADS, 1, DIM))
    assert torch.equal(decode_attention(zeros, cache, 0), decode_attention(torch.zeros(zeros.shape), cache, 0))


def test_derivatives_are_refused_or_left_to_torch() -> None:
    """It has none: torch says so of parameters when somebody asks for them, and queries never get as far."""
    cache, q = Loop().cache, tokens(2, HEADS, 3)
    assert decode_attention(q, cache, 0, sink_logits=torch.nn.Parameter(torch.zeros(HEADS))).requires_grad
    with pytest.raises(CacheStateError, match="layer 0: a quantized KV cache has no gradient"):
        torch.func.jvp(lambda q: decode_attention(q, cache, 0), (q,), (q,))


def test_a_profiler_sees_the_kernel() -> None:
    cache = Loop().cache
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        decode_attention(tokens(1, HEADS, 3), cache, 0)
    assert "xquant::decode_attention_cpu" in [event.key for event in profile.key_averages()]


@pytest.mark.parametrize(("batch", "length"), [(1, MAX_LEN), (B, MAX_LEN + 32)])
def test_a_pair_of_two_caches(batch: int, length: int) -> None:
    """Kernels would read behind the shorter one's end."""
    other = XQuantCache(model_config(), max_cache_len=length, config=CONFIG)
    other.update(*(tokens(PROMPT, KV_HEADS, side)[:batch] for side in (0, 1)), 0)
    with pytest.raises(ArgumentError, match=r"layer 0: a pair must be of one cache, got keys \(\[2, 2, 96\]"):
        decode_attention(tokens(1, HEADS, 3), (Loop().cache.layers[0].keys, other.layers[0].values), 0)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a batch of 3": ({"q": torch.zeros(3, HEADS, 1, DIM)}, r"layer 0: q must have shape \[2, multiple of 2, q, 16\]"),
    "3 heads": ({"q": torch.zeros(B, 3, 1, DIM)}, r"got \(2, 3, 1, 16\)"),
    "three dimensions": ({"q": torch.zeros(B, HEADS, DIM)}, r"got \(2, 4, 16\)"),
    "another dtype": ({"q": torch.zeros(B, HEADS, 1, DIM).half()}, "dtype torch.float32, got .* and torch.float16"),
    "9 tokens": ({"q": torch.zeros(B, HEADS, 9, DIM)}, f"1 to 8 stored tokens, got 9 of {PROMPT}"),
    "no tokens": ({"q": torch.zeros(B, HEADS, 0, DIM)}, "1 to 8 stored tokens, got 0"),
    "a short mask": ({"mask": torch.ones(1, PROMPT) > 0}, rf"broadcast to \[2, 4, 1, 96\].* got \(1, {PROMPT}\)"),
    "a mask of one": ({"mask": torch.ones(1, 1) > 0}, r"got \(1, 1\)"),
    "a mask of 3 heads": ({"mask": torch.zeros(1, 3, 1, MAX_LEN)}, r"got \(1, 3, 1, 96\)"),
    "a mask of five dimensions": ({"mask": torch.zeros(1, 1, 1, 1, MAX_LEN)}, r"got \(1, 1, 1, 1, 96\)"),
    "a mask of integers": ({"mask": torch.ones(1, MAX_LEN).long()}, "bool or float .* torch.int64"),
    "a negative window": ({"window": -1}, "0 .off. or more, got 0.25, 0.0 and -1"),
    "a negative softcap": ({"softcap": -2.0}, "0 .off. or more, got 0.25, -2.0 and 0"),
    "an infinite softcap": ({"softcap": math.inf}, "0 .off. or more, got .* inf and 0"),
    "a scale that is no number": ({"scale": math.nan}, "scale must be finite.* got nan"),
    "no heads": ({"q": torch.zeros(B, 0, 1, DIM)}, r"got \(2, 0, 1, 16\)"),
    "a layer too many": ({"layer": 2}, "one of the cache's 2 layers, got 2 of a XQuantCache"),
    "no cache": ({"cache": "cache"}, "one of the cache's 0 layers, got 0 of a str"),
    "a gradient": ({"q": tokens(1, HEADS, 3).requires_grad_()}, "no gradient"),
    "queries elsewhere": ({"q": torch.zeros(B, HEADS, 1, DIM, device="meta")}, "this cache is on cpu, q on meta"),
    "a mask elsewhere": ({"mask": torch.zeros(MAX_LEN, device="meta")}, "this cache is on cpu, mask on meta"),
    "sink logits elsewhere": ({"sink_logits": torch.zeros(4, device="meta")}, "on cpu, sink_logits on meta"),
    "a sparse mask": ({"mask": torch.zeros(1, MAX_LEN).to_sparse()}, "mask must be dense, got torch.sparse_coo"),
    "sink logits of KV heads": ({"sink_logits": torch.zeros(2)}, r"sink_logits must have shape \[4\], got \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    given, message = ERRORS[name]
    given = {"q": tokens(1, HEADS, 3), "cache": Loop().cache, "layer": 0, **given}
    expected = CacheStateError if name == "a gradient" else ArgumentError
    with pytest.raises(expected, match=message) as caught:
        decode_attention(**given)
    assert isinstance(caught.value, ValueError) == (name != "a gradient")


def test_caches_without_codes() -> None:
    q = tokens(1, HEADS, 3)
    for cache in (StaticCache(model_config(), max_cache_len=MAX_LEN), DynamicCache(config=model_config())):
        with pytest.raises(CacheStateError, match="layer 1 is not quantized"):
            decode_attention(q, cache, 1)
    with pytest.raises(CacheStateError, match="layer 0 is not quantized, or not allocated yet"):
        decode_attention(q, XQuantCache(model_config(), max_cache_len=MAX_LEN), 0)
    with pytest.raises(CacheStateError, match="16-bit storage has no codes"):
        decode_attention(q, Loop(XQuantConfig.preset("full")).cache, 0)


def test_more_keys_than_values() -> None:
    loop = Loop()
    layer = loop.cache.layers[0]
    layer.values.state.truncate(PROMPT - 2)
    with pytest.raises(CacheStateError, match=f"layer 0: {PROMPT} keys and {PROMPT - 2} values are stored"):
        decode_attention(tokens(1, HEADS, 3), loop.cache, 0)


@pytest.mark.parametrize(
    ("back", "new", "fits"), [(5, 3, True), (7, 1, True), (8, 1, False), (1, 8, False), (5, 4, False)]
)
def test_after_a_rollback(back: int, new: int, fits: bool) -> None:
    """The window holds 8 tokens more than R: those taken back and those of the query must be no more."""
    loop = Loop()
    loop.append(8)
    for _ in range(back):
        loop.append(1)
    q = tokens(new, HEADS, 3)
    fresh = Loop()
    fresh.append(8)
    loop.cache.crop(-back)
    if fits:
        assert torch.equal(decode_attention(q, loop.cache, 0), decode_attention(q, fresh.cache, 0))
        return
    with pytest.raises(CacheStateError, match=f"layer 0: after a rollback .* at most .*, 8, got {back + new}"):
        decode_attention(q, loop.cache, 0)


def test_inside_a_compiled_function() -> None:
    """A graph break, and the same numbers."""

    def step(q: Tensor, k: Tensor, v: Tensor, cache: XQuantCache) -> Tensor:
        cache.update(k, v, 0)
        return decode_attention(q * 2, cache, 0) + 1

    mine, theirs = Loop(), Loop()
    compiled = torch.compile(step, backend="xquant", dynamic=False)
    with torch.no_grad():
        for i in range(2):
            q, k, v = tokens(1, HEADS, i), tokens(1, KV_HEADS, 10 + i), tokens(1, KV_HEADS, 20 + i)
            torch.testing.assert_close(compiled(q, k, v, mine.cache), step(q, k, v, theirs.cache))

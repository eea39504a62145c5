"""Caches that differ in nothing but their length: from the second on, one runs the graphs of the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fast_and_slow import fast_but
from plain_decoder import Decoder
from stepping import interpreted
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import MistralConfig, MistralForCausalLM, StaticCache

from xquant_fx import CacheStateError, XQuantCache, XQuantConfig, explain
from xquant_fx.cache.growth import LEAST_OF_GRAPHS, of_any_length, of_any_room
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler import any_length
from xquant_fx.kernels.cpu import any_room
from xquant_fx.passes.any_length import FixedLengthError, open_lengths, wide

CONFIG = XQuantConfig.preset("xquant-2.2").replace(residual_length=32, k_group_size=32, k_residual_length=None)
#: Tokens of a cache that is made as long as the prompt and what is to follow, request after request.
LENGTHS = [96, 130, 333, 72, 200]
IDS = torch.randint(3, 60, (2, 6000), generator=torch.Generator().manual_seed(1))


class WithMask(Decoder):
    """A decoder that is given its mask."""

    def forward(self, ids: Tensor, past_key_values: Any, mask: Tensor) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask, past_key_values)
        return x @ self.embed.weight.T


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model.forward, backend="xquant", options={"config": CONFIG, "strict": True, **options})


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def run(step: Any, cache: Any, sizes: list[int], batch: int = 1, **more: Any) -> Tensor:
    """Logits [B, T, V] of steps of these numbers of tokens."""
    begin, parts = 0, []
    for size in sizes:
        out = step(IDS[:batch, begin : begin + size].clone(), past_key_values=cache, **more)
        parts.append(out.logits)
        begin += size
    return torch.cat(parts, 1)


def xquant(model: Any, length: int) -> XQuantCache:
    return XQuantCache(model.config, length, CONFIG)


def static(model: Any, length: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)


def graphs_of(step: Any, model: Any, lengths: Sequence[int], sizes: list[int]) -> list[int]:
    """How many graphs there are after each of these lengths; the logits of each are those of uncompiled steps."""
    made = []
    for length in lengths:
        got = run(step, xquant(model, length), sizes)
        made.append(graphs())
        torch.testing.assert_close(got, run(model.forward, xquant(model, length), sizes), rtol=0, atol=2e-5)
    return made


#: Layers, sequences, lengths of caches.
THIRDS = [(5, 1, LENGTHS[:3]), (5, 1, LENGTHS), (1, 2, LENGTHS)]
#: A prompt, steps over the end of a group, and one of several tokens, as assisted decoding has them.
SIZES = [40, *[1] * 26, 3, 1]


@pytest.mark.parametrize("make", [xquant, pytest.param(static, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", fast_but(THIRDS, THIRDS[1:]), ids=str)
def test_a_third_length_is_not_compiled_for(make: Callable[..., Any], sizes: tuple[int, int, list[int]]) -> None:
    """And its logits are, bit for bit, those of steps that were compiled for it alone."""
    layers, batch, lengths = sizes
    model = Decoder(layers).eval()
    alone = []
    for length in lengths:
        alone.append(run(compiled(model), make(model, length), SIZES, batch))
    step, made = compiled(model), []
    for length, expected in zip(lengths, alone, strict=True):
        got = run(step, make(model, length), SIZES, batch)
        made.append((graphs(), counters["xquant"]["one_call"]))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert made[2:] == [made[1]] * (len(lengths) - 2) and made[0][0] < made[1][0], made
    assert bool(counters["xquant"]["layers_not_compiled_again"]) == (layers > 1)


def test_a_much_longer_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has a room of its own, as have all up to eight times as long."""
    model = Decoder(1).eval()
    step = compiled(model)
    for length in (LEAST_OF_GRAPHS // 2, LEAST_OF_GRAPHS):
        run(step, xquant(model, length), [40, 1])
    made = graphs()
    run(step, xquant(model, LEAST_OF_GRAPHS + 1), [40, 1])
    assert graphs() == made + 1  # the prompt's serves it, too
    got = run(step, xquant(model, 9000), [40, 1, 1])
    assert graphs() == made + 1
    torch.testing.assert_close(got, run(model.forward, xquant(model, 9000), [40, 1, 1]), rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_end_of_a_shorter_one_is_noticed() -> None:
    """Kernels are told at each call how many tokens there is room for, and write none behind."""
    model = Decoder(2).eval()
    step = compiled(model)
    for length in (64, 96):
        run(step, xquant(model, length), [40, 1])
    made, cache = graphs(), xquant(model, 48)
    run(step, cache, [40, *[1] * 8])
    with pytest.raises(CacheStateError, match="the cache is full"):
        step(IDS[:1, 48:49], past_key_values=cache)
    assert graphs() == made
    cache.reset()
    got = run(step, cache, [40, *[1] * 8])
    torch.testing.assert_close(got, run(model.forward, xquant(model, 48), [40, *[1] * 8]), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", fast_but([torch.bool, torch.float32], [torch.bool]))
def test_masks_that_are_passed_in_are_made_long_enough(dtype: torch.dtype) -> None:
    """They are as wide as a cache, and hide some tokens, and what lies behind a cache is hidden in any case."""
    model = WithMask(2).eval()
    step = torch.compile(model.forward, backend="xquant", options={"config": CONFIG, "strict": True})
    torch._dynamo.reset()
    counters.clear()
    made = []
    for length in LENGTHS:
        cache, other = xquant(model, length), xquant(model, length)
        for begin, size in ((0, 40), (40, 1), (41, 1), (42, 4)):
            columns = torch.arange(length if begin else size)
            seen = (columns <= torch.arange(begin, begin + size)[:, None]) & (columns != 7)
            mask = seen[None, None] if dtype == torch.bool else torch.where(seen, 0.0, -1e30)[None, None]
            ids = IDS[:1, begin : begin + size].clone()
            found = model if not begin else step
            got = found(ids, past_key_values=cache, mask=mask)
            torch.testing.assert_close(got, model(ids, past_key_values=other, mask=mask), rtol=0, atol=2e-5)
        made.append(graphs())
    assert made == [2, 4, 4, 4, 4]


@torch.no_grad()
def test_chunks_of_caches_of_any_length() -> None:
    """Those of one number of tokens are compiled, of several run uncompiled; none is traced anew."""
    model = Decoder(2).eval()
    step = compiled(model)
    made = graphs_of(step, model, LENGTHS, [20, 16, 16, 1, 1])
    assert made[2:] == [made[1]] * 3, made
    step = compiled(model)
    made = graphs_of(step, model, LENGTHS, [20, 30, 1, 12, 1])
    assert made[2:] == [made[1]] * 3, made


def test_windows_are_of_any_length_beside_full_layers() -> None:
    """A window is stored as it is in a longer cache where both are longer than it."""
    sizes = dict(hidden_size=64, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(num_hidden_layers=1, sliding_window=140, **sizes)).eval()
    step = compiled(model)
    made = graphs_of(step, model, (400, 333, 500, 450), [180, 1, 1])
    assert made == [1, 2, 2, 2]
    key = xquant(model, 400)
    run(model.forward, key, [4])
    spec = key.layers[0].keys.live.spec
    assert spec.wraps and of_any_room(spec) is spec and of_any_length(spec).any_room
    fills = spec.with_room(150)  # which such a cache fills without starting over
    assert not fills.wraps and of_any_length(fills) is fills


@pytest.mark.slow
@torch.no_grad()
def test_unfused_attention_to_windows_has_its_length() -> None:
    """Of such a window nothing that is stored is larger in a longer cache: only masks would tell."""
    sizes = dict(hidden_size=64, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    torch.manual_seed(0)
    of_model = MistralConfig(num_hidden_layers=1, sliding_window=140, attn_implementation="eager", **sizes)
    model = MistralForCausalLM(of_model).eval()
    step, made = compiled(model, disable=["linear_rows"]), []
    for length in (400, 333, 500):
        cache, other = xquant(model, length), xquant(model, length)
        for begin, size in ((0, 180), (180, 1), (181, 1)):
            ids = IDS[:1, begin : begin + size].clone()
            got = step(ids, past_key_values=cache, output_attentions=True)
            expected = model(ids, past_key_values=other, output_attentions=True)
            torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=2e-5)
            assert begin == 0 or got.attentions[0].shape[-1] == length
        made.append(graphs())
    assert made[2] == made[1] + 1, made


@torch.no_grad()
def test_a_new_sequence_over_an_old_one() -> None:
    """Buffers that were taken over, written to anew from position 0 and not emptied before: masks hide the rest."""

    def program(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys[:, :, pos] = k
        values[:, :, pos] = v
        return by_arange(q, keys, values, pos, pos)

    torch._dynamo.reset()
    counters.clear()
    step, made = torch.compile(program, backend="xquant", options={"config": CONFIG}), []
    generator = torch.Generator().manual_seed(0)
    for length in (64, 80, 96):
        buffers = [torch.zeros(1, 4, length, 16) for _ in range(4)]
        for at in (0, 1, 2, 3, 4, 0, 1, 2, 1):
            q, k, v = (torch.randn(1, 4, 1, 16, generator=generator) for _ in range(3))
            got = step(q, k, v, torch.tensor([at]), *buffers[:2])
            expected = program(q, k, v, torch.tensor([at]), *buffers[2:])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert all(isinstance(each, QuantizedKV) for each in buffers[:2])
        made.append(graphs())
    assert made[2] == made[1], made


@torch.no_grad()
@pytest.mark.parametrize(("dynamic", "expected"), [(True, [1, 1, 1, 1]), (False, [1, 2, 3, 4])])
def test_lengths_that_are_told_to_vary_or_not(dynamic: bool, expected: list[int]) -> None:
    model, made = Decoder(1).eval(), []
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model.forward, backend="xquant", dynamic=dynamic, options={"config": CONFIG, "strict": True})
    made = graphs_of(step, model, LENGTHS[:4], [40, 1, 1])
    assert made == expected


def test_what_is_not_read_by_kernels_has_its_length() -> None:
    cache = xquant(Decoder(1), 64)
    run(Decoder(1).eval().forward, cache, [4])
    keys = cache.layers[0].keys
    spec = keys.live.spec
    assert keys.__tensor_flatten__()[1] == (of_any_length(spec), None) and of_any_length(spec).shape[2] == 4096
    full = dataclasses.replace(spec, bits=16)
    assert of_any_length(full) is full
    for other in (QuantizedKV(spec, keys.anchor.to("meta")), QuantizedKV(full, keys.anchor), keys[:, :, 2:]):
        described = other.__tensor_flatten__()[1]
        assert described == (other.spec, other.span) and not described[0].any_room
    rows = QuantizedKV(dataclasses.replace(spec, ragged=True), keys.anchor)
    assert not rows.__tensor_flatten__()[1][0].any_room


@torch.no_grad()
def test_a_wrapper_that_looks_at_sizes_is_compiled_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_room, "OURS", "cpp_of_others_")
    monkeypatch.setattr(any_length, "_fixed", set())
    model = Decoder(1).eval()
    step = compiled(model)
    made = graphs_of(step, model, LENGTHS[:4], [40, 1, 1, 1])
    assert len(any_length._fixed) == 1 and made[3] == made[2] + 1


#: Of what is compiled for one length.
ALONE = [{"disable": ["one_call"]}, {"self_check": True}, {"disable": ["fuse_decode"]}]


@torch.no_grad()
@pytest.mark.parametrize("options", fast_but(ALONE, ALONE[1:]))
def test_who_has_the_length_that_there_is(options: dict[str, Any]) -> None:
    model = Decoder(1).eval()
    step = compiled(model, **options)
    made = graphs_of(step, model, LENGTHS[:3], [40, 1, 1])
    assert made == [1, 2, 3]


@torch.no_grad()
def test_another_backend_has_the_length_that_there_is() -> None:
    model, others = Decoder(1).eval(), list[Any]()
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend=interpreted(others, config=CONFIG, self_check=False))
    for number, length in enumerate(LENGTHS[:3]):
        got = run(step, xquant(model, length), [40, 1, 1])
        assert len(others) == number + 1
        torch.testing.assert_close(got, run(model.forward, xquant(model, length), [40, 1, 1]), rtol=0, atol=2e-5)


@torch.no_grad()
def test_reports_say_how_long_a_cache_is() -> None:
    model = Decoder(2).eval()
    step = compiled(model)
    for length in LENGTHS[:2]:
        run(step, xquant(model, length), [40, 1, 1])
    cache = xquant(model, 72)
    run(model.forward, cache, [40])
    report = explain(model, IDS[:1, :1].clone(), past_key_values=cache, options={"config": CONFIG})
    assert "4096" not in str(report) and "4,096" not in str(report)
    key, value = (state.spec.stored_bytes for state in cache.layers[0].states)
    assert str(report).count(f"{key + value:,}") == 2


Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def by_arange(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    return attend(q, keys, values, (torch.arange(keys.shape[2]) <= pos[:, None])[None, None])


def by_bias(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    columns = torch.arange(0, keys.shape[2], dtype=torch.float32).reshape(1, 1, 1, -1)
    bias = torch.where(columns <= pos.reshape(1, 1, -1, 1), -0.1 * (pos.reshape(1, 1, -1, 1) - columns), -torch.inf)
    return attend(q, keys, values, bias.expand(1, 4, -1, keys.shape[2]))


def by_input(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    return attend(q, keys, values, given[None, None, None, :].logical_not().logical_not())


def by_products(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    seen = torch.arange(keys.shape[2]) <= pos[:, None]
    scores = (q @ keys.transpose(2, 3) / 4).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ values


def from_the_end(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    columns = torch.arange(keys.shape[2] - 1, -1, -1)
    return attend(q, keys, values, (columns >= keys.shape[2] - 1 - pos[:, None])[None, None])


def by_flip(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    return attend(q, keys, values, given.flip(0).flip(0)[None, None, None])


def by_sum(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    seen = (torch.arange(keys.shape[2]) <= pos[:, None])[None, None]
    return attend(q, keys, values, seen) * seen.sum()


def by_total(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    seen = torch.ones(1, keys.shape[2]).cumsum(1) <= pos[:, None] + 1
    return attend(q, keys, values, seen[None, None])


def by_fraction(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    seen = (torch.arange(keys.shape[2]) <= pos[:, None])[None, None]
    return attend(q, keys, values, seen) * (pos[0] / keys.shape[2])


def by_table(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    table = torch.ones(keys.shape[2], keys.shape[2], dtype=torch.bool).tril()
    return attend(q, keys, values, table[pos][None, None])


def by_nothing(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    return attend(q, keys, values, None)


def by_what_is_returned(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Any:
    seen = (torch.arange(keys.shape[2]) <= pos[:, None])[None, None]
    return attend(q, keys, values, seen), seen


def by_reshape(q: Tensor, keys: Tensor, values: Tensor, pos: Tensor, given: Tensor) -> Tensor:
    both = (torch.arange(keys.shape[2])[:, None] <= torch.stack([pos, pos], 1)).reshape(2, -1)[:1]
    return attend(q, keys, values, both[None, None])


@torch.no_grad()
@pytest.mark.parametrize(
    ("see", "is_open"),
    [
        *((see, True) for see in (by_bias, by_products)),
        *((see, False) for see in (from_the_end, by_table)),
        *(pytest.param(see, True, marks=pytest.mark.slow) for see in (by_arange, by_input)),
        *(
            pytest.param(see, False, marks=pytest.mark.slow)
            for see in (by_sum, by_fraction, by_flip, by_total, by_nothing, by_what_is_returned, by_reshape)
        ),
    ],
    ids=lambda each: each.__name__ if callable(each) else str(each),
)
def test_programs_whose_masks_are_the_same_in_a_longer_cache(see: Program, is_open: bool) -> None:
    """And no others; all are right whatever the length."""

    def program(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, keys: Tensor, values: Tensor, given: Tensor) -> Any:
        keys.index_copy_(2, pos, k)
        values.index_copy_(2, pos, v)
        return see(q, keys, values, pos, given)

    torch._dynamo.reset()
    counters.clear()
    step, made = torch.compile(program, backend="xquant", options={"config": CONFIG}), []
    generator = torch.Generator().manual_seed(0)
    for length in (64, 80, 96, 70):
        buffers = [torch.zeros(1, 4, length, 16) for _ in range(4)]
        for at in range(6):
            q, k, v = (torch.randn(1, 4, 1, 16, generator=generator) for _ in range(3))
            pos, given = torch.tensor([at]), torch.arange(length) <= at
            got = step(q, k, v, pos, *buffers[:2], given)
            expected = program(q, k, v, pos, *buffers[2:], given)  # nothing has left the window: stored as it is
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert all(isinstance(each, QuantizedKV) for each in buffers[:2])
        made.append(counters["xquant"]["rewrite"])
    assert (made[3] == made[1]) == is_open, made


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (lambda keys: torch.arange(keys.shape[2]).neg(), "output reads what is as long as a cache"),
        (
            lambda keys: torch.arange(keys.shape[2])[1:].sum(),
            "getitem gives what is not as long as a cache along one dimension",
        ),
        (lambda keys: torch.arange(keys.shape[2]) - keys.shape[2], "sub takes how long a cache is"),
        (lambda keys: torch.full((keys.shape[2],), keys.shape[2]), "full takes how long a cache is"),
        (lambda keys: torch.arange(keys.shape[2] + 1), "add counts with how long a cache is"),
    ],
)
def test_what_cannot_be_widened_says_why(program: Callable[[Tensor], Tensor], reason: str) -> None:
    """Of a graph that Dynamo made, before any pass."""
    reasons, model = list[str](), Decoder(1).eval()

    def backend(gm: Any, inputs: list[Any]) -> Any:
        if open_lengths(gm):
            try:
                wide(gm)
            except FixedLengthError as error:
                reasons.append(str(error))
        return gm.forward

    torch._dynamo.reset()
    step = torch.compile(lambda keys: (keys.sum(), program(keys)), backend=backend)
    for length in (64, 80):
        cache = xquant(model, length)
        run(model.forward, cache, [4])
        step(cache.layers[0].keys)
    assert reasons == [reason]


@torch.no_grad()
def test_chunks_of_a_prompt_after_a_cache_that_grew(tiny_llama) -> None:
    """Whose length Dynamo leaves open, as it did with the keys of that one; a mask of two dimensions follows it."""
    torch._dynamo.reset()
    model, plain = tiny_llama(layers=2, head_dim=32), tiny_llama(layers=2, head_dim=32)
    ids = torch.randint(3, 128, (1, 70), generator=torch.Generator().manual_seed(0))
    model.compile(backend="xquant")
    model.generate(ids[:, :40], max_new_tokens=3, do_sample=False)
    more = dict(
        max_new_tokens=3, do_sample=False, prefill_chunk_size=20, output_logits=True, return_dict_in_generate=True
    )
    made, expected = (
        torch.cat(each.generate(ids, past_key_values=XQuantCache(each.config, 96), **more).logits)
        for each in (model, plain)
    )
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
    assert counters["xquant"]["rewrite"]

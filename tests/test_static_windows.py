"""Sliding windows of a ``StaticCache``: taken over while they fill or when they are full, and codes from then on."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from rewrites import Rewrites
from stepping import interpreted
from test_sliding_windows import BASE, FULL, LOW, MODELS, WINDOW, close, ids_of, model_of
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

from xquant_fx import UnsupportedWriteError, XQuantCache, XQuantConfig, explain, memory_report
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.sliding import SlidingKV

sdpa = torch.nn.functional.scaled_dot_product_attention
#: Steps on a prompt of 36 tokens: until the window is full, past it, chunks, and past the room of 512 tokens.
LIFE = [36, *[1] * 6, 12, 460, 1]


def config_of(name: str, **more: Any) -> Any:
    """Two layers of window 40 (Mistral), or one of them and one of full attention (Gemma3Text)."""
    return getattr(transformers, f"{name}Config")(**{**BASE, **MODELS[name], **more})


def cache_of(name: str, length: int = 1024) -> StaticCache:
    return StaticCache(config=config_of(name), max_cache_len=length)


def tokens_of(count: int, layers: int = 2, batch: int = 1) -> Tensor:
    """Queries, keys and, halved, values [layers, B, H, T, D]."""
    return torch.randn(layers, batch, 2, count, 8, generator=torch.Generator().manual_seed(0))


def attend(cache: Any, x: Tensor) -> Tensor:
    """One step of all layers, as a model makes it: masks as the layers say, then an append, then attention."""
    out, new = [], x.shape[3]
    for own, layer in zip(x, cache.layers, strict=True):
        past = layer.cumulative_length_int if hasattr(layer, "cumulative_length_int") else layer.cumulative_length
        width, first = layer.get_mask_sizes(new)
        tokens, last = torch.arange(width) + first, past + torch.arange(new)[:, None]
        seen = (tokens <= last) & (tokens > last - (WINDOW if layer.is_sliding else 10_000))
        keys, values = layer.update(own, own / 2)
        out.append(sdpa(own, keys, values, attn_mask=seen))
    return torch.stack(out)


def whole(x: Tensor, windows: list[int]) -> Tensor:
    """What all steps together give: attention of all tokens, those of ``windows`` (layers) to the last 40."""
    t = torch.arange(x.shape[3])
    causal, near = t <= t[:, None], t > t[:, None] - WINDOW
    masks = [causal & near if i in windows else causal for i in range(len(x))]
    return torch.stack([sdpa(own, own, own / 2, attn_mask=mask) for own, mask in zip(x, masks, strict=True)])


def compiled(**options: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(attend, backend=interpreted(strict=True, **options))


@torch.no_grad()
def run(step: Any, cache: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """An uncompiled prompt, and steps of these numbers of tokens."""
    parts = x[..., : sum(sizes), :].split(sizes, 3)
    return torch.cat([(step if at else attend)(cache, part) for at, part in enumerate(parts)], 3)


def kinds(cache: StaticCache) -> list[type]:
    return [type(layer.keys) for layer in cache.layers]


def test_as_an_xquant_cache() -> None:
    """The same codes, from a prompt shorter than the window until positions are past the room that there was."""
    config, x = config_of("Mistral", num_hidden_layers=1), tokens_of(sum(LIFE), layers=1)
    cache = StaticCache(config=config, max_cache_len=1024)
    got = run(compiled(config=LOW, self_check=False), cache, x, LIFE)
    assert close(got, run(attend, XQuantCache(config, 1024, LOW), x, LIFE))
    keys = cache.layers[0].keys
    assert isinstance(keys, SlidingKV) and keys.shape[2] == WINDOW and keys.live.length == sum(LIFE)
    assert keys.spec.wraps and keys.spec.stored_tokens < 200 and keys.spec.shape[2] == 4096
    # The takeover, a step that fills it, the one in which it begins to slide, one token, and a chunk: there is room for
    # all that comes.
    assert counters["stats"]["unique_graphs"] <= 5 and counters["xquant"]["fuse_decode"] >= 2
    assert memory_report(cache).full_bytes == 2 * 2 * 8 * 4 * WINDOW


@pytest.mark.parametrize(
    ("name", "windows"), [pytest.param("Mistral", [0, 1], marks=pytest.mark.slow), ("Gemma3Text", [0])]
)
def test_sixteen_bits_are_exact_over_its_life(name: str, windows: list[int]) -> None:
    """A cache that is used four times; what was compiled first serves again."""
    cache, x, step = cache_of(name, 256), tokens_of(130), compiled(config=FULL)
    graphs = 0
    for turn, sizes in enumerate([[36, *[1] * 7, 9, 1], [60, 1, 1], [30, 20, 1, 1], [36, *[1] * 6]]):
        assert close(run(step, cache, x, sizes), whole(x[..., : sum(sizes), :], windows)), turn
        assert kinds(cache) == [SlidingKV if i in windows else QuantizedKV for i in range(2)]
        before, graphs = graphs, counters["stats"]["unique_graphs"]
        assert graphs <= (6 if turn == 0 else before + (turn == 2)), turn  # a chunk in which it becomes full is new
        cache.reset()
        assert kinds(cache) == [QuantizedKV] * 2


def test_a_compiled_prompt_longer_than_the_window() -> None:
    """It attends to itself; the buffer gets the last of it, an ordinary one, and a quantized one that was emptied."""
    cache, x, step = cache_of("Gemma3Text", 256), tokens_of(64), compiled(config=FULL)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    for _ in range(2):
        with torch.no_grad():
            got = torch.cat([step(cache, part) for part in x[..., :63, :].split([60, 1, 1, 1], 3)], 3)
        assert close(got, whole(x[..., :63, :], [0]))
        assert kinds(cache) == [SlidingKV, QuantizedKV]
        cache.reset()


def test_uncompiled_steps_copies_and_rows() -> None:
    cache, x, step = cache_of("Mistral"), tokens_of(120, batch=2), compiled(config=FULL, self_check=False)
    run(step, cache, x, [60, 1, 1])
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    rows = torch.tensor([1, 0])
    cache.reorder_cache(rows)  # beam search
    for each, text in [(cache, x[:, rows]), *((other, x) for other in others)]:
        parts = text[..., 62:87, :].split([1, 1, 23], 3)
        with torch.no_grad():
            got = torch.cat([call(each, part) for call, part in zip([attend, step, attend], parts, strict=True)], 3)
        assert close(got, whole(text[..., :87, :], [0, 1])[..., 62:, :])
        assert set(kinds(each)) == {SlidingKV}


def test_codes_are_shared_while_the_window_fills() -> None:
    shared = XQuantConfig.preset("xquant").replace(
        **dict(k_bits=4, v_bits=4, k_group_size=8, residual_length=8, share_keys_from=0, share_values_from=0),
        sliding_windows=True,
    )
    cache, x, step = cache_of("Mistral", 256), tokens_of(60), compiled(config=shared, self_check=False)
    for _ in range(2):
        run(step, cache, x, [36, 1])
        below, above = (layer.keys for layer in cache.layers)
        assert above.live.lower is below.live and above.spec.partner == 0
        codes = [layer.keys.dequantize()[:, :, 20:22] for layer in cache.layers]
        uncompiled = copy.deepcopy(cache)
        parts = x[..., 37:47, :].split(1, 3)
        with torch.no_grad():
            for part in parts:
                torch.testing.assert_close(step(cache, part), attend(uncompiled, part))
        assert kinds(cache) == [SlidingKV] * 2 and above.live.lower is None and above.spec.partner is None
        for layer, old in zip(cache.layers, codes, strict=True):
            assert torch.equal(layer.keys.dequantize()[:, :, 13:15], old)
        cache.reset()


def test_written_otherwise_it_is_given_back() -> None:
    """The numbers are there, in an ordinary tensor, before anything is written."""
    cache, x = cache_of("Mistral"), tokens_of(62)
    run(compiled(config=FULL, self_check=False), cache, x, [60, 1, 1])
    keys = cache.layers[0].keys
    held = keys.dequantize()

    def scale(buffer: Tensor) -> None:
        buffer.mul_(2)

    with torch.no_grad():
        with pytest.raises(UnsupportedWriteError, match="mul_"):
            scale(keys)
        with pytest.raises(UnsupportedWriteError, match="zero_"):
            keys[:, :, 3:].zero_()
        torch.compile(scale, backend=interpreted(config=FULL))(keys)
    assert type(keys) is Tensor and torch.equal(keys, held * 2)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            LOW.replace(residual_length=32),
            "window or buffer of 40 tokens is within the residual window, which holds 52",
        ),
        (LOW.replace(sliding_windows="auto"), "window or buffer of 40 tokens is shorter than 4 residual windows"),
        (LOW.replace(sliding_windows=False), "sliding_windows of the config is False"),
    ],
)
@pytest.mark.parametrize("prompt", [20, 60])
def test_windows_that_stay(config: Any, why: str, prompt: int) -> None:
    cache, x = cache_of("Gemma3Text", 256), tokens_of(61)
    with torch.no_grad():
        attend(cache, x[..., :prompt, :])
        found = explain(attend, cache, x[..., :1, :], options={"config": config}, strict="within" in why)
    assert [site.rewritten for site in found.sites] == [False, True] and found.sites[0].reason == why


def move(buffer: Tensor, x: Tensor, how: str) -> Tensor:
    """What a static sliding layer does with one full buffer, and what looks alike."""
    if how.startswith("cat"):
        joined = torch.cat((buffer[:, :, 2 if how == "cat behind two" else 1 :], x), 2)
        buffer.copy_(joined[:, :, -WINDOW:] if how == "cat" else joined.repeat(1, 1, 2, 1)[:, :, :WINDOW])
        return joined
    rolled = buffer.roll(-2 if how == "roll by two" else -1, 3 if how == "roll of channels" else 2)
    rolled[:, :, torch.tensor([-2 if how == "set before the last" else -1])] = x
    buffer.copy_(rolled)
    return rolled if how == "roll that is read" else buffer


OTHERS = [
    "roll by two", "roll of channels", "set before the last", "roll that is read", "cat behind two", "cat of others",
]  # fmt: skip


@pytest.mark.parametrize("how", ["roll", "cat", *OTHERS])
def test_what_moves_a_window(how: str) -> None:
    """All are right; the first two alone are moves that are known."""

    def moved(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return sdpa(q, move(keys, q, how), move(values, q, how))

    torch._dynamo.reset()
    step, x = torch.compile(moved, backend=Rewrites(config=FULL), dynamic=False), torch.randn(4, 1, 2, 1, 16)
    buffers = [torch.randn(1, 2, WINDOW, 16) for _ in range(2)]
    theirs = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        for token in x:
            torch.testing.assert_close(step(token, *buffers), moved(token, *theirs))
    assert all(isinstance(buffer, SlidingKV) == (how not in OTHERS) for buffer in buffers)


def test_what_is_not_full_and_moves_is_no_window() -> None:
    """Its zeros are seen."""

    def moved(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return sdpa(q, move(keys, q, "roll"), move(values, q, "roll"))

    torch._dynamo.reset()
    step, x = torch.compile(moved, backend=interpreted(config=FULL)), torch.randn(3, 1, 2, 1, 16)
    buffers, theirs = ([torch.zeros(1, 2, WINDOW, 16) for _ in range(2)] for _ in range(2))
    with torch.no_grad():
        for token in x:
            torch.testing.assert_close(step(token, *buffers), moved(token, *theirs))
    assert all(type(buffer) is Tensor for buffer in buffers)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """From a prompt within the window, and from a longer one."""
    model, ids = model_of(name), ids_of(1, 100)
    for sizes in ([36, 1, 1, 1, 1, 1, 1, 5, 12, 1, 1], [60, 1, 1, 5, 12, 1]):
        torch._dynamo.reset()
        step = torch.compile(model.forward, backend=interpreted(strict=True, config=FULL))
        cache, parts = StaticCache(config=model.config, max_cache_len=256), ids[:, : sum(sizes)].split(sizes, 1)
        with torch.no_grad():
            got = [(step if at else model)(part, past_key_values=cache).logits for at, part in enumerate(parts)]
            assert close(torch.cat(got, 1), model(ids[:, : sum(sizes)]).logits)
        assert kinds(cache)[0] is SlidingKV


@torch.no_grad()
def test_full_layers_of_a_second_length() -> None:
    """Whose length Dynamo leaves open: it tells windows apart all the same, which stay, and the layers beside them."""
    torch._dynamo.reset()
    counters.clear()
    step, made = torch.compile(attend, backend=interpreted(self_check=False)), []
    for length in (1024, 900, 800):
        x, cache = tokens_of(60), cache_of("Gemma3Text", length)
        got = run(step, cache, x, [36, *[1] * 24])
        assert [type(layer.keys) for layer in cache.layers] == [Tensor, QuantizedKV], length
        torch.testing.assert_close(got, whole(x, [0]), rtol=1e-4, atol=1e-5)  # nothing has left the residual window
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] < made[1]


@torch.no_grad()
def test_windows_beside_layers_of_any_length() -> None:
    """What is compiled for the second length moves the windows of a third, too, and counts what they got."""
    x, sizes = tokens_of(60), [36, *[1] * 24]
    expected = run(compiled(config=LOW), cache_of("Gemma3Text"), x, sizes)
    torch._dynamo.reset()
    counters.clear()
    step, made = torch.compile(attend, backend="xquant", options={"config": LOW, "strict": True}), []
    for length in (1024, 900, 800, 700):
        cache = cache_of("Gemma3Text", length)
        got = run(step, cache, x, sizes)
        assert kinds(cache) == [SlidingKV, QuantizedKV]
        assert [layer.keys.live.length for layer in cache.layers] == [60, 60]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        made.append(counters["xquant"]["rewrite"])
    assert made[0] < made[1] == made[2] == made[3], made
    assert counters["stats"]["unique_graphs"] == 6  # of each length the takeover, windows that fill, and that slide


@pytest.mark.parametrize("name", ["Gemma3Text", "Mistral"])
@torch.no_grad()
def test_uncompiled_attention_that_repeats_kv_heads(name: str) -> None:
    """It reads a window's last tokens, not the first ones: the step that takes over, and uncompiled ones behind it."""
    model, sizes = model_of(name), [WINDOW + 8, 1, 1, 1, 9, 1]
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend=interpreted(config=FULL))
    cache, plain = (StaticCache(model.config, max_cache_len=2 * WINDOW) for _ in range(2))
    for times, part in enumerate(ids_of(1, sum(sizes)).split(sizes, 1)):
        call = step if times == 1 else model
        got = call(part, past_key_values=cache).logits
        assert close(got, model(part, past_key_values=plain).logits), times
    assert isinstance(cache.layers[0].keys, SlidingKV)

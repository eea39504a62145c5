"""What must be proven of ordinary buffers before they are taken over, and what attention sees in that step."""

from __future__ import annotations

import logging
import tempfile

import numpy as np
import pytest
import torch
from rewrites import sdpa
from stepping import interpreted, relative_error
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import xquant_fx.warn_once as warn_once
from xquant_fx import NotRewrittenError, XQuantConfig, explain
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.storage import why_not_alone
from xquant_fx.errors import CacheStateError

pytest_plugins = ["plain_torch"]

N, SHAPE = 32, (1, 2, 32, 8)
CONFIG = XQuantConfig.preset("xquant").replace(k_bits=2, v_bits=2, k_group_size=4, residual_length=4)


def step(q, k, v, keys, values, pos, mask):
    keys[:, :, pos] = k
    values[:, :, pos] = v
    return sdpa(q, keys, values, attn_mask=mask)


def tokens(n: int, seed: int = 0):
    return torch.randn(3, 1, 2, n, 8, generator=torch.Generator().manual_seed(seed))


def empty():
    return [torch.zeros(SHAPE) for _ in range(2)]


def causal(first: int, n: int):
    return torch.arange(N) <= torch.arange(first, first + n)[:, None]


def seen(t: int, n: int):
    """Of a buffer that rotates: all that was written so far."""
    return (torch.arange(N) < t + n).expand(n, N)


# Who else sees the buffer


def numpy_array():
    array = np.zeros(SHAPE, np.float32)
    return torch.from_numpy(array), lambda: torch.from_numpy(array)


def given_to_numpy():
    buffer = torch.zeros(SHAPE)
    array = buffer.numpy()
    return buffer, lambda: torch.from_numpy(array)


def imported():
    other = torch.zeros(SHAPE)
    return torch.from_dlpack(other), lambda: other


def exported():
    buffer = torch.zeros(SHAPE)
    capsule = torch.utils.dlpack.to_dlpack(buffer)
    return buffer, lambda: torch.from_dlpack(capsule)


def inference_view():
    with torch.inference_mode():
        pool = torch.zeros(2, *SHAPE)
        return pool[1], lambda: pool[1]


def set_to():
    other = torch.zeros(SHAPE)
    return torch.empty(0).set_(other), lambda: other


def mapped():
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115  (closed with the closure)
    torch.save(torch.zeros(SHAPE), file.name)
    buffer = torch.load(file.name, mmap=True)
    return buffer, lambda: file and buffer


def held_storage():
    buffer = torch.zeros(SHAPE)
    storage = buffer.untyped_storage()
    return buffer, lambda: torch.empty(0).set_(storage, 0, SHAPE)


def aliases():
    base, other = torch.zeros(SHAPE), torch.zeros(SHAPE)
    pool = torch.zeros(2, *SHAPE)
    return {
        "data": (base.data, lambda: base),
        "detach": (other.detach(), lambda: other),
        "view": (pool[1], lambda: pool[1]),
        "inference view": inference_view(),
        "set_": set_to(),
        "storage": held_storage(),
        "from NumPy": numpy_array(),
        "to NumPy": given_to_numpy(),
        "from DLPack": imported(),
        "to DLPack": exported(),
        "memory-mapped": mapped(),
        "shared": (shared := torch.zeros(SHAPE).share_memory_(), lambda: shared),
    }


@pytest.mark.parametrize("how", aliases())
def test_a_buffer_that_something_else_sees_stays(how):
    buffer, other = aliases()[how]
    q, k, v = tokens(1)
    with torch.inference_mode() if how == "inference view" else torch.no_grad():
        got = torch.compile(step, backend=interpreted())(q, k, v, buffer, torch.zeros(SHAPE), *at(0))
    assert type(buffer) is torch.Tensor and torch.equal(got, v)
    assert torch.equal(other()[:, :, :1], k)


def at(first: int, n: int = 1):
    return torch.arange(first, first + n), causal(first, n)


@pytest.mark.parametrize("made", [True, False])
def test_inference_mode(made, attended_by):
    """Made under it or not, taken over under it, then on without it; heads are repeated by a view."""

    def repeated(q, k, v, keys, values, pos, mask):
        keys[:, :, pos] = k
        values[:, :, pos] = v
        wide = [buffer[:, :, None].expand(1, 2, 2, N, 8).flatten(1, 2) for buffer in (keys, values)]
        return sdpa(q.repeat_interleave(2, 1), *wide, attn_mask=mask)

    def run(make_inside, *modes):
        torch._dynamo.reset()
        with torch.inference_mode(make_inside):
            buffers = empty()
        out, compiled = [], torch.compile(repeated, backend=interpreted())
        for t, inside in enumerate(modes):
            with torch.inference_mode(inside), torch.no_grad():
                out.append(compiled(*tokens(1, t), *buffers, *at(t)).clone())
        assert all(isinstance(buffer, QuantizedKV) for buffer in buffers)
        return torch.cat(out, 2)

    assert torch.equal(run(made, True, False, True), run(False, False, False, False))


def test_a_buffer_is_alone_again_when_the_others_are_gone():
    buffer = torch.zeros(SHAPE)
    assert not why_not_alone(buffer)
    other = buffer.detach()
    assert "shares" in why_not_alone(buffer) and "shares" in why_not_alone(other)
    del other
    assert not why_not_alone(buffer)
    keys, values = empty()
    with torch.no_grad():
        torch.compile(step, backend=interpreted())(*tokens(1), keys, values, *at(0))
    assert isinstance(keys, QuantizedKV) and isinstance(values, QuantizedKV)


def test_explain_asks_who_sees_the_original(caplog):
    """It runs on copies, which nobody else sees."""
    keys, values = empty()
    other = keys.data
    with torch.no_grad():
        (site,) = explain(step, *tokens(1), keys, values, *at(0)).sites
        assert "another tensor shares the buffer's memory" in site.reason
        del other
        (site,) = explain(step, *tokens(1), keys, values, *at(0)).sites
    assert site.rewritten


# What lies behind the position, and the positions


def rotating(t, n):
    return torch.arange(t, t + n) % N, seen(t, n)


def rotating_smaller(t, n):
    return torch.arange(t, t + n) % (N - 8), seen(t, n) & (torch.arange(N) < N - 8)


def slots(t, n):
    return torch.tensor([5, 3, 9, 0, 7])[t % 5 : t % 5 + 1], torch.ones(n, N, dtype=torch.bool)


def backwards(t, n):
    return N - 1 - torch.arange(t, t + n) % N, (torch.arange(N) >= N - t - n).expand(n, N)


def permuted(t, n):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    return order[torch.arange(t, t + n) % N], torch.ones(n, N, dtype=torch.bool)


@pytest.mark.parametrize(
    "where, chunk, start, until",
    [
        (rotating, 1, 40, 43),
        (rotating, 1, 63, 66),
        (rotating, 16, 0, 64),
        (rotating_smaller, 1, 0, 27),
        (rotating_smaller, 12, 0, 48),
        (slots, 1, 0, 6),
        (backwards, 1, 0, 4),
        (backwards, 1, 30, 36),
        (permuted, 1, 0, 4),
        (permuted, 4, 40, 48),
    ],
)
def test_buffers_that_are_not_appended_to_stay_exact(where, chunk, start, until, attended_by):
    """The default preset quantizes nothing of so few tokens: only what is dropped could differ."""
    mine, theirs = empty(), empty()
    compiled = torch.compile(step, backend=interpreted(), dynamic=False)
    with torch.no_grad():
        for t in range(0, until, chunk):
            pos, mask = where(t, chunk)
            new, call = tokens(chunk, t), step if t < start else compiled
            torch.testing.assert_close(call(*new, *mine, pos, mask), step(*new, *theirs, pos, mask))
    assert type(mine[0]) is type(mine[1]) is torch.Tensor
    torch.testing.assert_close(mine, theirs)


def test_a_sequence_that_begins_anew_stays_quantized():
    """Its masks hide what is left of the one before; a short prompt, and one of more tokens than the old ones."""
    mine, theirs = empty(), empty()
    compiled = torch.compile(step, backend=interpreted(preset="full"), dynamic=False)
    with torch.no_grad():
        for sizes in ([20, 1, 1], [1, 1, 1, 1], [9, 1], [3, 20, 1], [32], [9]):
            first = 0
            for n in sizes:
                new = tokens(n, first)
                torch.testing.assert_close(compiled(*new, *mine, *at(first, n)), step(*new, *theirs, *at(first, n)))
                first += n
    assert isinstance(mine[0], QuantizedKV) and mine[0].state.length == 9


@pytest.mark.parametrize(
    ("fresh", "quantized"),
    [
        (torch.zeros_like, True),
        (lambda old: old.new_zeros(SHAPE), True),
        (torch.clone, False),  # numbers that were quantized once
        (lambda old: torch.zeros_like(old).copy_(old), False),
    ],
)
@torch.no_grad()
def test_a_buffer_of_zeros_that_an_old_one_made_is_like_any_other(fresh, quantized):
    mine, theirs = empty(), empty()
    compiled = torch.compile(step, backend=interpreted(preset="full"), dynamic=False)
    for t in range(2):
        compiled(*tokens(1, t), *mine, *at(t, 1)), step(*tokens(1, t), *theirs, *at(t, 1))
    assert isinstance(mine[0], QuantizedKV)
    mine, theirs = ([fresh(b) for b in buffers] for buffers in (mine, theirs))
    for t in range(2, 4) if mine[0].any() else range(2):
        new, where = tokens(1, t), at(t, 1)
        torch.testing.assert_close(compiled(*new, *mine, *where), step(*new, *theirs, *where))
    assert isinstance(mine[0], QuantizedKV) == quantized


@pytest.mark.parametrize("sizes", [(12, 12, 12), (12, 4, 12), (1, 12, 1, 12)])
def test_computed_positions_that_start_over_in_sight_of_old_tokens_raise(sizes, attended_by):
    """Whole chunks, also where their length is a symbol of the graph: they look like a new prompt."""

    def rotating(q, k, v, keys, values, first):
        pos = torch.arange(k.shape[2]) + first
        keys[:, :, pos] = k
        values[:, :, pos] = v
        return sdpa(q, keys, values)

    compiled, buffers, firsts = torch.compile(rotating, backend=interpreted(self_check=False)), empty(), [0]
    for n in sizes[:-2]:
        firsts.append(firsts[-1] + n)
    with torch.no_grad():
        for n, first in zip(sizes[:-1], firsts, strict=True):
            compiled(*tokens(n, first), *buffers, torch.tensor(first))
        with pytest.raises(CacheStateError, match="a position that the program computes"):
            compiled(*tokens(sizes[-1]), *buffers, torch.tensor(0))


def test_computed_positions_that_write_over_all_that_was_taken_back() -> None:
    """Candidates of which the last are refused: no mask as wide as the buffer says that nothing lies behind them."""

    def candidates(q, k, v, keys, values, end: int):
        pos = torch.arange(end - k.shape[2], end)
        keys[:, :, pos], values[:, :, pos] = k, v
        return sdpa(q, keys[:, :, :end], values[:, :, :end])

    compiled = torch.compile(candidates, backend=interpreted(preset="full"), dynamic=False)
    mine, theirs = empty(), empty()
    with torch.no_grad():
        for seed, end in enumerate((4, 8, 10, 12)):  # two of four tokens are taken back each time but the first
            x = tokens(4, seed)
            torch.testing.assert_close(compiled(*x, *mine, end), candidates(*x, *theirs, end))
    assert isinstance(mine[0], QuantizedKV)


@pytest.mark.parametrize("front", [0, 4])
@pytest.mark.parametrize("n", [3, 10])
def test_a_chunk_that_wraps_gives_the_buffers_back(front, n):
    """To the first position, or behind tokens that a rotating buffer keeps for good."""
    mine, theirs = empty(), empty()
    compiled, last = torch.compile(step, backend=interpreted(self_check=False), dynamic=False), N - 2
    wrapped = lambda p: torch.where(p < N, p, front + (p - N) % (N - front))  # noqa: E731
    with torch.no_grad():
        for tokens_now, first in ((last, 0), (1, last), (n, last + 1), (1, last + 1 + n)):
            pos = wrapped(torch.arange(first, first + tokens_now))
            args = tokens(tokens_now, first), pos, seen(min(first, N - tokens_now), tokens_now)
            mine_out, out = (f(*args[0], *buffers, *args[1:]) for f, buffers in ((compiled, mine), (step, theirs)))
            torch.testing.assert_close(mine_out, out)
    assert type(mine[0]) is torch.Tensor
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("first", [0, 5])
def test_numbers_behind_the_position_keep_a_buffer_as_it_is(first):
    for place, taken in ((first - 1, True), (first, False), (N - 1, False)):
        if place < 0:
            continue
        torch._dynamo.reset()
        keys, values = empty()
        keys[:, :, :first], values[:, :, :first] = 1.0, 1.0
        values[0, 1, place, 3] = 1e-30
        with torch.no_grad():
            torch.compile(step, backend=interpreted())(*tokens(1), keys, values, *at(first))
        assert isinstance(keys, QuantizedKV) == taken and type(keys) is type(values)


def test_the_reason_is_told(caplog):
    warn_once.forget()
    args = (*tokens(1), *(torch.ones(SHAPE) for _ in range(2)), *at(4))
    reason = "keys: the buffer holds numbers at or behind position 4, the first that is written (a rotating buffer"
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="xquant_fx"):
        assert reason in explain(step, *args).sites[0].reason
        torch.compile(step, backend=interpreted())(*args)
        assert sum(reason in record.getMessage() for record in caplog.records) == 1
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match="numbers at or behind position 4"):
            torch.compile(step, backend=interpreted(strict=True))(*args)


def test_each_cache_is_judged_for_itself():
    """One graph serves buffers that stay and buffers that are taken over."""
    counters.clear()
    compiled = torch.compile(step, backend=interpreted(preset="full"), dynamic=False)
    dirty, clean, late = [torch.ones(SHAPE) for _ in range(2)], empty(), empty()
    with torch.no_grad():
        for t in range(4):
            for buffers in (dirty, clean) if t < 2 else (dirty, clean, late):
                mine, new = [x.clone() for x in buffers] if type(buffers[0]) is torch.Tensor else None, tokens(1, t)
                got = compiled(*new, *buffers, *at(t))
                if mine is not None:
                    torch.testing.assert_close(got, step(*new, *mine, *at(t)))
            if t == 1:
                late[0][:, :, 5] = 1.0
    assert [type(x[0]) for x in (dirty, clean, late)] == [torch.Tensor, QuantizedKV, torch.Tensor]


def test_a_later_cache_that_cannot_be_taken_over_is_refused_in_its_own_step():
    compiled = torch.compile(step, backend=interpreted(preset="full", strict=True), dynamic=False)
    with torch.no_grad():
        compiled(*tokens(1), *empty(), *at(0))
        keys, values = empty()
        alias = values.data
        with pytest.raises((NotRewrittenError, BackendCompilerFailed), match=r"shares the buffer's memory"):
            compiled(*tokens(1), keys, values, *at(0))
        assert torch.equal(alias, values) and type(keys) is torch.Tensor


# What attention sees


def two_layers(q, k, v, layers, pos, mask):
    """Appends to both before it attends to either."""
    for keys, values in layers:
        keys[:, :, pos], values[:, :, pos] = k, v
        k, v = k.flip(-1), v.flip(-1)
    return torch.stack([sdpa(q, *layer, attn_mask=mask) for layer in layers])


@pytest.mark.parametrize("past, new", [(0, 12), (3, 12), (14, 12), (14, 1), (14, 8)])
def test_the_step_that_takes_over_sees_what_an_eager_step_on_codes_sees(past, new):
    """Its own tokens in full precision, all those before them as they are stored."""
    ordinary, quantized = ([empty() for _ in range(2)] for _ in range(2))
    begin = torch.compile(two_layers, backend=interpreted(config=CONFIG), dynamic=False)
    with torch.no_grad():
        for layers in (ordinary, quantized):
            if past:
                two_layers(*tokens(past), layers, *at(0, past))
        want_exact = two_layers(*tokens(new, 1), [[x.clone() for x in layer] for layer in ordinary], *at(past, new))
        got = begin(*tokens(new, 1), ordinary, *at(past, new))
        reference = [empty() for _ in range(2)]
        torch._dynamo.reset()
        again = torch.compile(two_layers, backend=interpreted(config=CONFIG), dynamic=False)
        if past:
            again(*tokens(past), reference, *at(0, past))
            for layer in range(2):  # one layer at a time, as eager code holds one layer's chunk
                one = reference[layer : layer + 1]
                k, v = (x if layer == 0 else x.flip(-1) for x in tokens(new, 1)[1:])
                want = two_layers(tokens(new, 1)[0], k, v, one, *at(past, new))
                assert relative_error(got[layer], want[0]) < 1e-6
        if past <= CONFIG.residual_length:
            torch.testing.assert_close(got, want_exact)


class Marked(torch.Tensor):
    pass


def test_a_subclass_of_tensor_is_not_taken_over():
    def step(q, k, v, keys, values, pos):
        keys.index_copy_(2, pos, k)
        values.index_copy_(2, pos, v)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

    keys, values = (torch.ones(1, 2, 16, 8).as_subclass(Marked) for _ in range(2))  # slots: tokens lie behind
    q, k, v = torch.randn(3, 1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    right = step(q, k, v, keys.clone(), values.clone(), torch.tensor([5]))
    with torch.no_grad():
        got = torch.compile(step, backend=interpreted([]))(q, k, v, keys, values, torch.tensor([5]))
    assert type(keys) is Marked and torch.allclose(got, right, atol=1e-6)


@pytest.mark.parametrize("bits", [16, 4])
def test_rows_that_eager_code_reorders_in_place(bits, attended_by):
    config = CONFIG.replace(k_bits=bits, v_bits=bits, share_values_from=None)
    compiled = torch.compile(step, backend=interpreted(config=config))
    mine, theirs = ([torch.zeros(3, 2, N, 8) for _ in range(2)] for _ in range(2))
    with torch.no_grad():
        for p in range(20):
            x = torch.randn(3, 3, 2, 1, 8, generator=torch.Generator().manual_seed(p))
            out, right = (f(*x, *b, torch.tensor([p]), causal(p, 1)) for f, b in ((compiled, mine), (step, theirs)))
            assert relative_error(out, right) < (1e-6 if bits == 16 else 0.2)
            for buffer in (*mine, *theirs):
                buffer.copy_(buffer[torch.tensor([[1, 2, 0], [0, 2, 1]][p % 2])])
    assert isinstance(mine[0], QuantizedKV)

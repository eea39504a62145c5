"""Ways to write tokens and to read them that are no index_copy_ and no SDPA: taken over, and right afterwards."""

from __future__ import annotations

import pytest
import torch
from rewrites import quantized_layers, sdpa
from stepping import interpreted, relative_error
from torch.nn.attention.flex_attention import flex_attention

from xquant_fx import NotRewrittenError, UnsupportedWriteError, explain
from xquant_fx.cache.kv_tensor import QuantizedKV

pytest_plugins = ["plain_torch"]
N, SHAPE = 32, (1, 2, 32, 8)


def by_int(buffer, x, p):
    buffer[:, :, p] = x[:, :, 0]


def by_int_after_ellipsis(buffer, x, p):
    buffer[..., p, :] = x[0, :, 0]


def by_int_from_the_end(buffer, x, p):
    buffer[:, :, p - N] = x[:, :, 0]


def by_slice_from_the_end(buffer, x, p):
    buffer[:, :, p - N : p - N + 1] = x


def by_select(buffer, x, p):
    buffer.select(2, p).copy_(x[:, :, 0])


def by_narrow(buffer, x, p):
    buffer.narrow(-2, p, 1).copy_(x)


def by_copy(buffer, x, p):
    buffer[:, :, p : p + 1].copy_(x)


def by_data(buffer, x, p):
    buffer.data[:, :, p : p + 1] = x


def by_detach(buffer, x, p):
    buffer.detach().index_copy_(2, torch.tensor([p]), x)


WRITES = [
    by_int, by_int_after_ellipsis, by_int_from_the_end, by_slice_from_the_end, by_select, by_narrow, by_copy, by_data,
    by_detach,
]  # fmt: skip


def tokens(n, seed):
    return torch.randn(3, 1, 2, n, 8, generator=torch.Generator().manual_seed(seed))


#: With positions that are numbers in the graph; those of the others are written as one of these is.
NUMBERS = [by_int, by_slice_from_the_end, by_select, by_narrow]


@pytest.mark.parametrize(
    ("write", "dynamic"),
    [(write, None) for write in WRITES]
    + [pytest.param(f, False, marks=() if f in NUMBERS else pytest.mark.slow) for f in WRITES],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_token_written_so_is_an_append(write, dynamic):
    """The prompt is written as a slice."""

    def step(q, k, v, keys, values, p: int, mask):
        for buffer, x in ((keys, k), (values, v)):
            if k.shape[2] > 1:
                buffer[:, :, p : p + k.shape[2]] = x
            else:
                write(buffer, x, p)
        return sdpa(q, keys, values, attn_mask=mask)

    mine, theirs = ([torch.zeros(SHAPE) for _ in range(2)] for _ in range(2))
    compiled, p = torch.compile(step, backend=interpreted(preset="full"), dynamic=dynamic), 0
    with torch.no_grad():
        for n in (6, 1, 1, 1):
            args = p, torch.arange(N) <= torch.arange(p, p + n)[:, None]
            torch.testing.assert_close(compiled(*tokens(n, p), *mine, *args), step(*tokens(n, p), *theirs, *args))
            p += n
    assert isinstance(mine[0], QuantizedKV) and mine[0].state.length == mine[1].state.length == p


@pytest.mark.parametrize("write", [by_int, by_int_after_ellipsis, by_int_from_the_end, by_select])
def test_eager_code_appends_a_token_by_its_number(write):
    (one, other), _ = quantized_layers(shape=SHAPE)
    for p in range(12):
        x = tokens(1, p)[0]
        write(one, x, p)
        other[:, :, p : p + 1] = x
    torch.testing.assert_close(one.select(2, 3), one.dense()[:, :, 3])
    assert one.state.length == other.state.length == 12
    for wrong in (lambda: one[:, :, 3].mul_(2), lambda: one.select(2, 3).zero_(), lambda: one[:, :, 3, 0].fill_(1)):
        with pytest.raises(UnsupportedWriteError, match="layer 0 keys"):
            wrong()


def zeroed(buffer, begin, end):
    buffer[:, :, begin:end].zero_()


def filled(buffer, begin, end):
    buffer[:, :, begin:end].fill_(0.0)


def assigned(buffer, begin, end):
    buffer[:, :, begin:end] = 0


@pytest.mark.parametrize("clear", [zeroed, filled, assigned])
def test_zeros_are_no_tokens(clear):
    """From a token on they take back what is there, in all of a buffer everything; in the middle they are refused."""
    ((keys, _), _), ((twin, _), _) = quantized_layers(shape=SHAPE), quantized_layers(shape=SHAPE)
    keys[:, :, :12] = twin[:, :, :12] = tokens(12, 0)[0]
    clear(keys, 9, None)
    assert keys.state.length == 9 and keys[:, :, :9].any() and not keys[:, :, 9:].any()
    clear(keys, 9, 11)
    with pytest.raises(UnsupportedWriteError, match=r"layer 0 keys.* go back by buffer\[:, :, n:\].zero_"):
        clear(keys, 3, 5)
    with pytest.raises(UnsupportedWriteError, match=r"begin anew by buffer\.zero_"):
        keys.fill_(1)
    keys[:, :, 9:10] = twin[:, :, 9:10] = tokens(1, 9)[0]
    assert torch.equal(keys.dense(), twin.dense())
    clear(keys, 0, None)
    assert keys.state.length == 0 and not keys.dense().any()


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_write_to_the_last_dimension_is_none_to_tokens(dynamic):
    """Of [B, H, q, N] scores whose q and N differ, by a number and from the end by a symbol."""

    def step(q, k, v, keys, values, p: int, mask):
        keys[:, :, p : p + k.shape[2]], values[:, :, p : p + k.shape[2]] = k, v
        scores = (q @ keys.mT).masked_fill(~mask, -1e9)
        scores[..., 0] -= 2.0
        scores[..., p - N :] += 0.5
        return torch.softmax(scores, -1) @ values

    mine, theirs = ([torch.zeros(SHAPE) for _ in range(2)] for _ in range(2))
    compiled, p = torch.compile(step, backend=interpreted(), dynamic=dynamic), 0
    with torch.no_grad():
        for n in (6, 2, 2, 2):
            args = p, torch.arange(N) <= torch.arange(p, p + n)[:, None]
            torch.testing.assert_close(compiled(*tokens(n, p), *mine, *args), step(*tokens(n, p), *theirs, *args))
            p += n
    assert isinstance(mine[0], QuantizedKV)


def test_a_write_through_a_view_that_is_no_append_keeps_a_buffer():
    """``select`` of another dimension, and ``unbind``, are views as well."""

    def step(q, k, v, keys, values, pos):
        keys[:, :, pos], values[:, :, pos] = k, v
        keys.unbind(1)[0].mul_(2)
        values.select(1, 0).zero_()
        return sdpa(q, keys, values)

    keys, values = torch.zeros(SHAPE), torch.zeros(SHAPE)
    with torch.no_grad():
        torch.compile(step, backend=interpreted())(*tokens(1, 0), keys, values, torch.tensor([0]))
    assert type(keys) is type(values) is torch.Tensor and not values[:, 0].any() and values[:, 1].any()


def flex(q, k, v, keys, values, pos):
    keys[:, :, pos], values[:, :, pos] = k, v
    hide = lambda score, b, h, i, j: torch.where(j <= pos[i], score, -float("inf"))  # noqa: E731
    return flex_attention(q, keys, values, score_mod=hide, enable_gqa=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    "options, tolerance",
    [
        pytest.param({"preset": "full"}, 1e-6, marks=pytest.mark.slow),  # test_flex_step.py
        ({"k_bits": 4, "v_bits": 4}, 1e-6),
    ],
)
def test_flex_attention(options, tolerance):
    """Eagerly, in the step that takes the buffers over, and compiled."""
    mine, theirs = ([torch.zeros(SHAPE) for _ in range(2)] for _ in range(2))
    compiled, at = torch.compile(flex, backend=interpreted(**options), dynamic=False), 0
    with torch.no_grad():
        for n, call in ((12, flex), (1, compiled), (1, compiled), (2, flex)):
            (q, k, v), pos = tokens(n, at), torch.arange(at, at + n)
            args = torch.cat([q, q.flip(1)], 1), k, v
            assert relative_error(call(*args, *mine, pos), flex(*args, *theirs, pos)) < tolerance
            at += n
    assert isinstance(mine[0], QuantizedKV)


def test_a_chunk_of_any_length_with_ranked_keys():
    """The default preset, where Dynamo makes the number of tokens symbolic."""

    def step(q, k, v, keys, values, pos, mask):
        keys[:, :, pos], values[:, :, pos] = k, v
        return sdpa(q, keys, values, attn_mask=mask)

    mine, theirs = ([torch.zeros(SHAPE) for _ in range(2)] for _ in range(2))
    compiled, at = torch.compile(step, backend=interpreted()), 0
    with torch.no_grad():
        for n in (3, 2, 9):
            args = torch.arange(at, at + n), torch.arange(N) <= torch.arange(at, at + n)[:, None]
            torch.testing.assert_close(compiled(*tokens(n, at), *mine, *args), step(*tokens(n, at), *theirs, *args))
            at += n


# Attention that is not recognised


def log_softmax(scores, values):
    return scores.log_softmax(-1).exp() @ values


def sigmoid(scores, values):
    return torch.sigmoid(scores) @ values


def spelt_out(scores, values):
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ values


def without_a_product(scores, values):
    return (torch.softmax(scores, -1)[..., None] * values[:, :, None]).sum(-2)


@pytest.mark.parametrize("attend", [log_softmax, sigmoid, spelt_out, without_a_product])
def test_an_attention_that_is_not_recognised_is_told_of(attend):
    def step(q, k, v, keys, values, pos):
        keys[:, :, pos], values[:, :, pos] = k, v
        return attend(q @ keys.mT, values)

    args = (*tokens(1, 0), torch.zeros(SHAPE), torch.zeros(SHAPE), torch.tensor([0]))
    with torch.no_grad():
        (site,) = explain(step, *args).sites
        assert not site.rewritten and "no attention that is recognised reads it here" in site.reason
        with pytest.raises(NotRewrittenError, match="no attention that is recognised"):
            explain(step, *args, strict=True)
        (layer, _), made = quantized_layers(shape=SHAPE), tokens(1, 0)
        (site,) = explain(step, *made, *layer, torch.tensor([0])).sites
        assert site.rewritten and "no attention that is recognised" in site.dequantized
        compiled = torch.compile(step, backend=interpreted())
        torch.testing.assert_close(compiled(*made, *layer, torch.tensor([0])), step(*args))

"""Batches whose rows have lengths of their own: each row gives what it gives alone, as a batch of one."""

from __future__ import annotations

import copy
import logging
import re
from itertools import chain

import pytest
import torch
from rewrites import sdpa
from states import layers_of
from stepping import interpreted

import xquant_fx.compiler.restarts as restarts
import xquant_fx.warn_once as warn_once
from xquant_fx import (
    CacheStateError,
    UnsupportedWriteError,
    XQuantConfig,
    decode_attention,
    explain,
    memory_report,
    ops,
)
from xquant_fx.cache.kv_tensor import QuantizedKV

pytest_plugins = ["plain_torch"]

B, H, N, D, LENGTHS = 3, 2, 64, 16, (37, 5, 20)
SMALL = dict(k_bits=2, v_bits=2, residual_length=8, k_group_size=4, sink_tokens=2, rollback_tokens=8)
#: Codes of values are shared in pairs, keys have one range per channel.
SHARED = dict(preset="xquant", k_group_size=4, residual_length=8, share_values_from=0)


def by_index(buffer, x, pos):
    buffer[torch.arange(B), :, pos[:, 0]] = x[:, :, 0]


def by_index_of_tokens(buffer, x, pos):
    buffer[torch.arange(B)[:, None], :, pos] = x.transpose(1, 2)


def by_three_indices(buffer, x, pos):
    buffer[torch.arange(B).view(-1, 1), torch.arange(H), pos] = x.squeeze(2)


def by_put(buffer, x, pos):
    torch.ops.aten.index_put_(buffer, [torch.arange(B), None, pos[:, 0]], x[:, :, 0])


def by_scatter(buffer, x, pos):
    buffer.scatter_(-2, pos[:, None, :, None].expand(-1, H, -1, D), x)


def by_rows(buffer, x, pos):
    """As lit-gpt writes them."""
    part = buffer[:B, ...]
    for row in range(B):
        part[row].index_copy_(-2, pos[row], x[row])


def alone(buffer, x, pos):
    """What each of these is in a batch of one."""
    buffer[:, :, pos[0]] = x


def decoder(write):
    """A step of two layers: ``x`` [2, 3, B, H, q, D] are queries, keys and values of each."""

    def step(x, buffers, pos):
        mask = (torch.arange(N) <= pos[..., None])[:, None]
        for (q, k, v), (keys, values) in zip(x, buffers, strict=True):
            write(keys, k, pos)
            write(values, v, pos)
            x = x + sdpa(q, keys, values, attn_mask=mask)
        return x

    return step


def prompts(lengths=LENGTHS):
    """Buffers of two layers with a prompt in each row, written eagerly."""
    buffers = [[torch.zeros(B, H, N, D) for _ in range(2)] for _ in range(2)]
    for row, length in enumerate(lengths):
        for i, buffer in enumerate(buffers[0] + buffers[1]):
            random = torch.Generator().manual_seed(9 * row + i)
            buffer[row, :, :length] = torch.randn(H, length, D, generator=random)
    return buffers


def new_tokens(step, q=1):
    return torch.randn(2, 3, B, H, q, D, generator=torch.Generator().manual_seed(100 + step))


def run(step, buffers, positions):
    """Outputs of steps at ``positions``, tensors [B, q]."""
    with torch.no_grad():
        return [step(new_tokens(i, pos.shape[1]), buffers, pos) for i, pos in enumerate(positions)]


def assert_as_alone(got, positions, row, lengths=LENGTHS, first=0, **options):
    """The row of ``got``, steps from ``first`` on, is what uncompiled steps give on a quantized cache of its own."""
    config = XQuantConfig.preset(options.pop("preset", "xquant-2.2")).replace(**options)
    cache = [[QuantizedKV.of(s) for s in layer] for layer in layers_of(config, (1, H, N, D), torch.float32, 2)]
    for layer, prompt in zip(cache, prompts(lengths), strict=True):
        for buffer, held in zip(layer, prompt, strict=True):
            if lengths[row]:
                buffer[:, :, : lengths[row]] = held[row : row + 1, :, : lengths[row]]
    for i, (mine, pos) in enumerate(zip(got, positions, strict=True), first):
        x = new_tokens(i, pos.shape[1])[:, :, row : row + 1]
        theirs = decoder(alone)(x, cache, pos[row : row + 1])
        torch.testing.assert_close(mine[:, :, row : row + 1], theirs, rtol=1e-5, atol=1e-5)


def ahead(steps, q=1, lengths=LENGTHS):
    """Positions of ``steps`` steps of ``q`` tokens that follow the prompts."""
    return [torch.tensor(lengths)[:, None] + torch.arange(i * q, i * q + q) for i in range(steps)]


@pytest.mark.parametrize(
    ("write", "q", "options"),
    [
        (by_index, 1, SMALL), (by_index_of_tokens, 3, SHARED), (by_index_of_tokens, 6, SMALL),
        (by_three_indices, 1, SHARED), (by_put, 1, dict(preset="full")), (by_scatter, 2, SMALL), (by_rows, 2, SHARED),
    ],
)  # fmt: skip
def test_each_row_is_as_alone(write, q, options, attended_by):
    calls, buffers, positions = [], prompts(), ahead(12 // q, q)
    got = run(torch.compile(decoder(write), backend=interpreted(calls, **options)), buffers, positions)
    for row in range(B):
        assert_as_alone(got, positions, row, **options)
    state = buffers[1][0].state
    assert len(calls) == 1 and state.row_lengths == [n + 12 for n in LENGTHS] and state.spec.ragged
    fused, stored = (len(calls[0].graph.find_nodes(op="call_function", target=t)) for t in (ops.DECODE, ops.STORE))
    assert fused == (0 if options.get("preset") == "full" else 2) and stored >= 3


def test_scatter_at_common_positions_is_an_append_like_others(attended_by):
    def write(buffer, x, pos):
        buffer.scatter_(2, pos[0][:, None].expand_as(x), x)

    lengths, buffers = (9, 9, 9), prompts((9, 9, 9))
    got = run(torch.compile(decoder(write), backend=interpreted(**SMALL)), buffers, ahead(3, 3, lengths))
    assert_as_alone(got, ahead(3, 3, lengths), 1, lengths, **SMALL)
    assert not buffers[0][0].spec.ragged and buffers[0][0].state.length == 18


def test_compiled_kernels_take_each_row_by_its_length():
    positions, buffers = ahead(9), prompts()
    got = run(torch.compile(decoder(by_index), backend="xquant", options=SMALL), buffers, positions)
    for row in range(B):
        assert_as_alone(got, positions, row, **SMALL)


@pytest.mark.parametrize("on_host", [True, False])
def test_a_row_begins_anew_while_others_go_on_and_one_is_idle(on_host, monkeypatch):
    """Row 0 begins anew at steps 3 and 7; row 1 writes over its last token; row 2 goes on.

    Lengths are no longer looked at once it is known that masks hide what rows held: not at all where they are a
    device's.
    """
    monkeypatch.setattr(restarts, "is_host", lambda state: on_host)
    looked, check = [], restarts.Restarts.check
    monkeypatch.setattr(
        restarts.Restarts, "check", lambda self, args, before: looked.append(bool(before)) or check(self, args, before)
    )
    steps = [
        [37, 5, 20], [38, 6, 21], [39, 7, 22], [0, 7, 23], [1, 7, 24], [2, 7, 25], [3, 8, 26], [0, 9, 27], [1, 10, 28],
    ]  # fmt: skip
    positions, buffers = [torch.tensor(step)[:, None] for step in steps], prompts()
    got = run(torch.compile(decoder(by_index), backend=interpreted(**SMALL)), buffers, positions)
    assert buffers[0][0].state.row_lengths == [2, 11, 29] and sum(looked) == (3 if on_host else 0)
    for row, parts in enumerate((((0, 3), (3, 7), (7, 9)), ((0, 9),), ((0, 9),))):
        for first, last in parts:
            lengths = (0, 0, 0) if first else LENGTHS
            assert_as_alone(got[first:last], positions[first:last], row, lengths, first, **SMALL)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([39, 7, 23], "row 2: tokens must be appended"), ([39, -1, 22], "row 1: tokens must be appended"),
        ([39, 7, 64], "row 2: positions must be below"), ([20, 7, 22], "row 0: more tokens were rolled back"),
    ],
)  # fmt: skip
def test_a_fault_names_the_row(bad, match):
    buffers, step = prompts(), torch.compile(decoder(by_index), backend=interpreted(**SMALL))
    run(step, buffers, ahead(2))
    with pytest.raises(CacheStateError, match=match):
        run(step, buffers, [torch.tensor(bad)[:, None]])


def test_a_full_row_does_not_begin_anew():
    buffers = prompts((N - 1, 5, 20))
    step = torch.compile(decoder(by_index), backend=interpreted(**SMALL))
    run(step, buffers, ahead(1, lengths=(N - 1, 5, 20)))
    with pytest.raises(CacheStateError, match="row 0: position 0 starts a sequence anew only"):
        run(step, buffers, [torch.tensor([[0], [6], [21]])])


@pytest.mark.parametrize("on_host", [True, False])
def test_old_tokens_of_a_row_must_be_hidden(on_host, monkeypatch):
    """Also where lengths would have to be waited for: there the first step decides whether they are."""
    monkeypatch.setattr(restarts, "is_host", lambda state: on_host)

    def step(x, buffers, pos):
        (keys, values), (q, k, v) = buffers[0], x[0]
        by_index(keys, k, pos)
        by_index(values, v, pos)
        return sdpa(q, keys, values, attn_mask=torch.arange(N)[None] < 40)

    compiled, buffers = torch.compile(step, backend=interpreted(**SMALL)), prompts()
    run(compiled, buffers, ahead(2))
    with pytest.raises(CacheStateError, match="no mask is recognised that hides the others"):
        run(compiled, buffers, [torch.tensor([[39], [0], [22]])])


# What stays as it is


ROWS = torch.arange(B)


@pytest.mark.parametrize(
    "rows",
    [
        lambda pos: torch.arange(B - 1, -1, -1), lambda pos: torch.arange(1, B + 1) % B, lambda pos: ROWS,
        lambda pos: torch.zeros_like(pos[:, 0]), lambda pos: torch.arange(B).flip(0),
    ],
    ids=["backwards", "computed", "given", "repeated", "flipped"],
)  # fmt: skip
def test_rows_that_are_chosen_otherwise_stay_as_they_are(rows):
    def write(buffer, x, pos):
        buffer[rows(pos), :, pos[:, 0]] = x[:, :, 0]

    buffers = prompts()
    for site in explain(decoder(write), new_tokens(0), buffers, ahead(1)[0]).sites:
        assert not site.rewritten and "rows are chosen by an index that is not arange(batch size)" in site.reason


def counted_backwards():
    rows = torch.arange(B)
    rows.sub_(B - 1).abs_()
    return rows


def by_changed_index(buffer, x, pos):
    index = pos[:, None, :, None].expand_as(x).contiguous()
    pos.add_(1)
    buffer.scatter_(2, index, x)


def by_sum(buffer, x, pos):
    buffer.scatter_(2, pos[:, None, :, None].expand_as(x), x, reduce="add")


@pytest.mark.filterwarnings("ignore:The reduce argument:UserWarning")
@pytest.mark.parametrize(
    ("write", "heads", "q"),
    [
        (lambda pos: (torch.arange(B), slice(None), pos), H, B),
        (lambda pos: (torch.arange(B)[:, None], slice(None), pos[:, 0]), H, 1),
        (lambda pos: (torch.arange(B), torch.arange(B), pos), B, 1),
        (lambda pos: (counted_backwards(), slice(None), pos[:, 0]), H, 1),
        (by_changed_index, H, 1), (by_sum, H, 1),
    ],
    ids=["along tokens", "each to all rows", "along heads", "changed numbers", "changed positions", "sum"],
)  # fmt: skip
def test_indices_that_mean_something_else_stay_as_they_are(write, heads, q):
    if write not in (by_changed_index, by_sum):
        index = write

        def write(buffer, x, pos):
            buffer[index(pos)] = x.transpose(1, 2) if q > 1 else x[:, :, 0]

    x, buffers = torch.randn(2, 3, B, heads, q, D), [[torch.zeros(B, heads, N, D) for _ in range(2)] for _ in range(2)]
    for site in explain(decoder(write), x, buffers, ahead(1, q, (0, 0, 0))[0]).sites:
        assert not site.rewritten and "the buffer is also written by" in site.reason


@pytest.mark.parametrize(
    ("spoil", "positions", "match"),
    [
        (lambda buffer: buffer[1, :, 9].fill_(1.0), ahead(1)[0], "row 1: the buffer holds numbers at or behind"),
        (lambda buffer: buffer[2, :, 3].zero_(), ahead(1)[0], "row 2: the buffer is empty at position 3"),
        (lambda buffer: None, torch.tensor([[37, 38], [5, 7], [20, 21]]), r"row 1: positions \[5, 7\] are no tokens"),
    ],
)
def test_what_the_buffers_hold_must_fit_each_row(spoil, positions, match, caplog):
    warn_once.forget()
    buffers, theirs = prompts(), prompts()
    for each in (buffers, theirs):
        spoil(each[1][0])
    step = torch.compile(decoder(by_index_of_tokens), backend=interpreted())
    with caplog.at_level(logging.WARNING, logger="xquant_fx"):
        (got,), (want,) = (run(f, b, [positions]) for f, b in ((step, buffers), (decoder(by_index_of_tokens), theirs)))
    torch.testing.assert_close(got, want)
    assert type(buffers[1][0]) is torch.Tensor and re.search(match, caplog.text)


# Eager code


@pytest.fixture
def taken_over():
    buffers = prompts()
    run(torch.compile(decoder(by_index), backend=interpreted(**SMALL)), buffers, ahead(1))
    assert isinstance(buffers[0][0], QuantizedKV)
    return buffers


@pytest.mark.parametrize("write", [by_index, by_index_of_tokens, by_scatter, by_put])
def test_eager_code_appends_to_each_row(taken_over, write):
    keys, other = taken_over[0]
    x, pos = torch.randn(B, H, 1, D), ahead(2)[1]
    write(keys, x, pos)
    assert keys.state.row_lengths == [39, 7, 22] and other.state.row_lengths == [38, 6, 21]
    torch.testing.assert_close(keys.dequantize()[torch.arange(B), :, pos[:, 0]], x[:, :, 0])
    with pytest.raises(CacheStateError, match="row 0: layer 0 keys: tokens must be appended"):
        write(keys, x, pos + 2)


def test_eager_code_gives_one_row_a_new_prompt(taken_over):
    keys = taken_over[0][0]
    before, x = keys.dequantize(), torch.randn(1, H, 12, D)
    keys[1:2, :, :12] = x
    assert keys.state.row_lengths == [38, 12, 21]
    torch.testing.assert_close(keys.dequantize()[1:2, :, :12], x)  # as a prompt sees itself
    assert torch.equal(keys.dequantize()[::2], before[::2]) and torch.equal(keys[2:3].dequantize(), before[2:3])
    with pytest.raises(CacheStateError, match="positions of one step must be consecutive"):
        alone(keys[1:2], x[:, :, :2], torch.tensor([[0, 2]]))
    assert keys.state.row_lengths == [38, 12, 21], "a row that cannot begin anew keeps what it holds"
    keys[torch.tensor([2, 0]), :, torch.tensor([21, 38])] = torch.ones(2, H, D)
    assert keys.state.row_lengths == [39, 12, 22]


def test_a_compiled_step_gives_one_row_a_new_prompt(taken_over, attended_by):
    def prompt(keys, values):
        return decoder(alone)(x, [[keys, values]], torch.arange(12)[None])

    x = torch.randn(1, 3, 1, H, 12, D)
    copied = copy.deepcopy(taken_over[0])
    rows = [[buffer[1:2] for buffer in layer] for layer in (taken_over[0], copied)]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(prompt, backend=interpreted(**SMALL))(*rows[0]), prompt(*rows[1]))
    for mine, theirs in zip(taken_over[0], copied, strict=True):
        assert mine.state.row_lengths == theirs.state.row_lengths == [38, 12, 21]
        assert all(torch.equal(mine.state.owned[name][::2], t[::2]) for name, t in theirs.state.owned.items())
        theirs.state.group.drop()  # eager code sees its prompt in full precision
        torch.testing.assert_close(mine.dequantize()[:, :, :12], theirs.dequantize()[:, :, :12])


def by_slice(row, x, buffers, tokens):
    """A prompt of ``tokens`` into one row of the batch, which the function itself takes."""
    return decoder(alone)(x, [[b[row : row + 1] for b in layer] for layer in buffers], torch.arange(tokens)[None])


def by_select(row, x, buffers, tokens):
    return decoder(alone)(x, [[b[row].unsqueeze(0) for b in layer] for layer in buffers], torch.arange(tokens)[None])


def by_assignment(row, x, buffers, tokens):
    mask = torch.arange(N) <= torch.arange(tokens)[:, None]
    for (q, k, v), (keys, values) in zip(x, buffers, strict=True):
        keys[row : row + 1, :, :tokens] = k
        values[row, :, :tokens] = v[0]
        x = x + sdpa(q, keys[row : row + 1], values[row][None], attn_mask=mask)
    return x


@pytest.mark.parametrize("prompt", [by_slice, by_select, by_assignment])
def test_a_compiled_step_takes_a_row_of_the_batch(taken_over, prompt, attended_by):
    """Of row 1, whose number is a constant then; of the others, an input; to row 0 a shorter prompt than it held."""
    calls = []
    step = torch.compile(prompt, backend=interpreted(calls, **SMALL))
    for row in (1, 2, 0):
        x, copied = torch.randn(2, 3, 1, H, 12, D), copy.deepcopy(taken_over)
        with torch.no_grad():
            torch.testing.assert_close(step(row, x, taken_over, 12), by_slice(row, x, copied, 12))
        for mine, theirs in zip(chain(*taken_over), chain(*copied), strict=True):
            assert mine.state.row_lengths == theirs.state.row_lengths
            assert all(torch.equal(mine.state.owned[name], t) for name, t in theirs.state.owned.items())
    assert taken_over[0][0].state.row_lengths == [12, 12, 12] and calls
    got = run(torch.compile(decoder(by_index), backend=interpreted(**SMALL)), taken_over, [torch.full((B, 1), 12)])
    torch.testing.assert_close(got, run(decoder(by_index), copied, [torch.full((B, 1), 12)]))


def test_two_rows_in_one_graph_give_the_batch_back(taken_over, caplog):
    def prompt(x, buffers):
        return by_slice(1, x, buffers, 12) + by_slice(2, x, buffers, 12)

    x, held = torch.randn(2, 3, 1, H, 12, D), [[buffer.dequantize() for buffer in layer] for layer in taken_over]
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="xquant_fx"):
        got = torch.compile(prompt, backend=interpreted(**{**SMALL, "self_check": False}))(x, taken_over)
        torch.testing.assert_close(got, prompt(x, held))
    assert type(taken_over[0][0]) is torch.Tensor and "what was stored was dequantized" in caplog.text


def test_one_row_of_ordinary_buffers_is_told_of_as_such():
    for site in explain(by_slice, 1, torch.randn(2, 3, 1, H, 12, D), prompts(), 12).sites:
        assert not site.rewritten and "a step that writes all rows, each at a position of its own" in site.reason


@pytest.mark.parametrize("q", [pytest.param(1, marks=pytest.mark.slow), 3])  # 1: compiled kernels
def test_decode_attention_takes_each_row_by_its_length(taken_over, q):
    (keys, values), pos = taken_over[0], ahead(2)[1][:, :1] + torch.arange(q)
    query, k, v = torch.randn(3, B, H, q, D)
    for buffer, x in ((keys, k), (values, v)):
        by_index_of_tokens(buffer, x, pos)
    got = decode_attention(query, (keys, values), 0)
    for row in range(B):
        part = slice(row, row + 1)
        torch.testing.assert_close(got[part], decode_attention(query[part], (keys[part], values[part]), 0))
    alone(keys[1:2], k[1:2], pos[1:2] + q)
    with pytest.raises(CacheStateError, match=rf"row 1: {6 + 2 * q} keys and {6 + q} values are stored"):
        decode_attention(query, (keys, values), 0)


def test_a_buffer_of_such_rows_is_no_window_that_moves():
    buffers = prompts((N - 1, 5, 20))
    run(torch.compile(decoder(by_index), backend=interpreted(**SMALL)), buffers, ahead(1, lengths=(N - 1, 5, 20)))
    keys, held = buffers[0][0], buffers[0][0].dequantize()
    for moved in (torch.cat([keys[:, :, 1:], torch.ones(B, H, 1, D)], 2), torch.roll(keys, -1, 2)):
        with pytest.raises(UnsupportedWriteError, match="nothing was written"):
            keys.copy_(moved)
    assert keys.state.row_lengths == [N, 6, 21] and torch.equal(keys.dequantize(), held)


def test_rows_are_selected_copied_counted_and_emptied(taken_over):
    keys, values = taken_over[1]
    chosen, copied = keys.index_select(0, torch.tensor([2, 2, 0, 1])), copy.deepcopy(keys)
    assert chosen.state.row_lengths == [21, 21, 38, 6] and copied.state.row_lengths == [38, 6, 21]
    held = keys.dequantize()
    assert torch.equal(chosen.dequantize()[1:3], held[[2, 0]]) and torch.equal(copied.dequantize(), held)
    by_index(copied, torch.ones(B, H, 1, D), ahead(2)[1])
    assert copied.state.row_lengths[0] == 39 and keys.state.row_lengths[0] == 38
    module = torch.nn.Module()
    module.keys, module.values = keys, values
    assert memory_report(module).elements == 2 * H * D * (38 + 6 + 21)
    keys.zero_()
    assert keys.state.row_lengths == [0, 0, 0] and not keys.dequantize().any()

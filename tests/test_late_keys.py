"""A prompt's keys are stored once, when its queries were seen; whoever looks before sees them stored all the same."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from states import layers_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig

from xquant_fx import XQuantCache, XQuantConfig, ops
from xquant_fx.cache.room import enlarge
from xquant_fx.cache.state import KVState

CONFIG = XQuantConfig(k_group_size=16, residual_length=32, sink_tokens=2)
TOKENS, MORE = 100, 16
POS = torch.arange(TOKENS)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(1, *shape, 64, generator=torch.Generator().manual_seed(seed))


X, Q, Y = random(2, TOKENS, seed=0), random(4, TOKENS, seed=1), random(2, MORE, seed=2)


def layers(count: int = 1) -> list[list[KVState]]:
    return layers_of(CONFIG, (1, 2, 200, 64), torch.float32, count)


def at_once() -> KVState:
    """Keys stored with nothing to wait for: no query was seen, and the chunk is one that waits for none."""
    state = layers()[0][0]
    state._write(X, POS)
    return state


def test_attention_of_a_prompt_reads_each_head_in_one_piece() -> None:
    """As of a static buffer, though projections give one token's heads together."""
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (X, Y.repeat(1, 1, 7, 1)[:, :, :TOKENS])]
    model = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    seen = XQuantCache(model, 200, config=CONFIG).update(*given, 0)
    assert not any(x.is_contiguous() for x in given)
    assert all(x.is_contiguous() and torch.equal(x, y) for x, y in zip(seen, given, strict=True))


def tensors(state: KVState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.owned.items()}


def test_a_prompt_of_a_model_is_stored_once(tiny_llama, monkeypatch) -> None:
    model, calls, store = tiny_llama(layers=3), Counter(), ops.STORE
    monkeypatch.setattr(ops, "STORE", lambda **given: (calls.update([given["scheme"]]), store(**given)))
    cache = XQuantCache(model.config, 128, CONFIG)
    with torch.no_grad():
        model(torch.arange(40)[None], past_key_values=cache)
    assert calls == {"per_channel_ranked": 3, "per_token_rotated": 3}
    assert cache.group.late is None, "the last layer's keys do not wait for another step"
    assert all(state.owned["energy"].any() for state in cache.states[::2])


def test_queries_that_are_seen_decide_and_keys_may_change_meanwhile() -> None:
    """What was appended is stored, whatever its tensor holds when the queries come."""
    state, shown, given = layers()[0][0], layers()[0][0], X.clone()
    shown.note_queries(Q)
    shown.store(X, POS)
    state.store(given, POS)
    assert state.group.late is not None
    given.zero_()
    state.note_queries(Q)
    assert state.group.late is None
    assert all(torch.equal(tensor, shown.owned[name]) for name, tensor in state.owned.items())
    assert not torch.equal(state.owned["order"], at_once().owned["order"])


LOOKS = {
    "its tensors": lambda keys, values: keys.tensors,
    "its length": lambda keys, values: keys.length,
    "lengths of all": lambda keys, values: keys.group.lengths(),
    "a read": lambda keys, values: keys.load(TOKENS),
    "a copy": lambda keys, values: copy.deepcopy(keys),
    "a pickle": lambda keys, values: pickle.dumps(keys),
    "another cache's rows": lambda keys, values: keys.reorder(torch.tensor([0])),
    "more room": lambda keys, values: enlarge(keys, 300),
    "what a compiled step writes": lambda keys, values: keys.group.enter({keys.name, values.name}),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_finds_it_stored(look: str) -> None:
    keys, values = layers()[0]
    keys.store(X, POS)
    values.store(X, POS)
    assert keys.group.late is not None, "the values of the same layer come between keys and attention"
    LOOKS[look](keys, values)
    assert keys.group.late is None
    for name, tensor in at_once().owned.items():
        both = tuple(slice(0, size) for size in tensor.shape)
        assert torch.equal(keys.owned[name][both], tensor), name


def test_the_next_layer_and_the_next_chunk_have_it_stored() -> None:
    (keys, values), (upper, _) = layers(2)
    keys.store(X, POS)
    values.store(X, POS)
    upper.store(X + 1, POS)
    assert keys.group.late is not None and keys.group.late[0] is upper
    upper.store(Y, TOKENS + torch.arange(MORE))
    assert keys.group.late is None and (keys.length, upper.length) == (TOKENS, TOKENS + MORE)
    assert all(torch.equal(tensor, keys.owned[name]) for name, tensor in at_once().owned.items())


def test_copies_of_a_group_wait_for_nothing() -> None:
    """A copy that stored its prompt a second time would overwrite what followed."""
    keys = layers()[0][0]
    keys.store(X, POS)
    group = copy.deepcopy(keys.group)
    assert group.late is None and keys.length == TOKENS


@pytest.mark.parametrize("forget", [lambda keys: keys.reset(), lambda keys: keys.undo(0)])
def test_what_is_taken_back_is_never_stored(forget) -> None:
    keys = layers()[0][0]
    keys.store(X, POS)
    forget(keys)
    assert keys.group.late is None and keys.length == 0 and not keys.owned["codes"].any()


def test_one_buffer_that_is_emptied_leaves_the_others_waiting() -> None:
    keys, values = layers()[0]
    values.store(X, POS)
    keys.store(X, POS)
    values.reset()
    assert (keys.length, values.length) == (TOKENS, 0)


def test_attention_that_is_none_of_torchs_finds_it_stored_at_the_next_step(tiny_llama) -> None:
    """Queries that nobody shows: keys stand in for them, as in a prompt of a few tokens."""
    model = tiny_llama(layers=1)
    cache = XQuantCache(model.config, 200, CONFIG)
    keys, values = cache.update(X[..., :16], X[..., :16], 0)
    assert cache.group.late is not None
    assert sdpa(X[..., :16], keys.as_subclass(Tensor), values).shape == values.shape
    stored, _ = cache.update(Y[:, :, :1, :16], Y[:, :, :1, :16], 0)
    assert cache.states[0].length == TOKENS + 1 and torch.equal(stored[:, :, TOKENS], Y[:, :, 0, :16])

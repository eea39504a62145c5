"""Encoder-decoder models: the decoder's own cache is quantized, and that of the encoder's output once, at first."""

from __future__ import annotations

import pytest
import torch
from stepping import interpreted, relative_error
from transformers import (
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import EncoderDecoderCache

from xquant_fx import XQuantCache, XQuantConfig, memory_report, ops
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.options import parse

ENCODED = 18
FULL = XQuantConfig.preset("full")
LOW = XQuantConfig(k_bits=3, v_bits=3, k_group_size=4, residual_length=4, sink_tokens=0)
DECODED = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
TOKENS = [2, 1, 10, 1]
FEW = [2, 1, 1]


def t5():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval(), torch.randint(3, 60, (2, ENCODED))


def whisper():
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    rest = dict(encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=ENCODED, max_target_positions=48)
    names = dict(
        vocab_size=64, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1
    )
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **rest, **names)).eval(), torch.randn(
        2, 8, 2 * ENCODED
    )


def xquant(config, settings):
    return EncoderDecoderCache(XQuantCache(config, 40, settings), XQuantCache(config, ENCODED, settings))


def dynamic(config, settings):
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def static(config, settings):
    return EncoderDecoderCache(StaticCache(config, max_cache_len=40), StaticCache(config, max_cache_len=ENCODED))


CACHES = [xquant, dynamic, static]


@torch.no_grad()
def logits(model, encoded, first, step, cache, sizes):
    out, at = [], 0
    for tokens in sizes:
        ids = DECODED[:, at : at + tokens]
        out.append(
            (step if at else first)(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache).logits
        )
        at += tokens
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    "build, make, settings, compiled_prompt, cross_is_quantized, sizes",
    [
        (t5, xquant, FULL, False, True, FEW),
        (t5, dynamic, FULL, True, True, FEW),
        (t5, static, FULL, False, False, FEW),
        *(
            pytest.param(t5, make, FULL, make is dynamic, make is not static, TOKENS, marks=pytest.mark.slow)
            for make in CACHES
        ),
        pytest.param(t5, dynamic, LOW, True, True, TOKENS, marks=pytest.mark.slow),  # few bits are whisper's
        (whisper, xquant, LOW, True, True, TOKENS),
    ],
)
def test_encoder_decoder(build, make, settings, compiled_prompt, cross_is_quantized, sizes):
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():
        encoded = model.get_encoder()(inputs)
    theirs = logits(model, encoded, model.forward, model.forward, dynamic(model.config, None), sizes)
    calls, cache = [], make(model.config, settings)
    fields = {} if make is xquant else {"config": settings}
    step = torch.compile(model.forward, backend=interpreted(calls, **fields))
    mine = logits(model, encoded, step if compiled_prompt else model.forward, step, cache, sizes)
    error = relative_error(mine, theirs)
    assert error < 1e-5 if settings is FULL else 1e-5 < error < 0.5
    own, cross = (side.layers[0].keys for side in (cache.self_attention_cache, cache.cross_attention_cache))
    assert isinstance(own, STORED_KV) and isinstance(cross, STORED_KV) == cross_is_quantized
    appends = sum(node.target is ops.STORE for node in calls[-1].graph.nodes)
    assert appends == 2, "keys and values of the decoder, and nothing of the encoder"
    decoder = memory_report(cache.self_attention_cache)
    assert memory_report([(own, cache.self_attention_cache.layers[0].values)]).codes == decoder.codes
    if cross_is_quantized:
        both = memory_report(cache.cross_attention_cache).total_bytes + decoder.total_bytes
        assert memory_report(cache).total_bytes == both


def test_reason_of_an_ordinary_cross_attention():
    model, inputs = t5()
    reasons = []

    def look(gm, example_inputs):
        found = detect_graph(gm, example_inputs, parse(None, None))
        reasons.extend((site.reason, site.has_cache) for site in found.sites)
        return gm.forward

    with torch.no_grad():
        encoded, cache = model.get_encoder()(inputs), static(model.config, None)
        model(encoder_outputs=encoded, decoder_input_ids=DECODED[:, :3], past_key_values=cache)
        torch.compile(model.forward, backend=look)(
            encoder_outputs=encoded, decoder_input_ids=DECODED[:, 3:4], past_key_values=cache
        )
    cross = "keys: the buffer is read and not written in this graph (cross attention, or a graph break?)"
    assert reasons == [("", True), (cross, False)]

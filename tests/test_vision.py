"""Models that see: an image and a text are prefilled, the text model's cache is quantized, the vision tower is left."""

from __future__ import annotations

import pytest
import torch
import transformers
from numeric import seeded
from rewrites import count
from stepping import interpreted, relative_error
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig, ops
from xquant_fx.cache.growing import STORED_KV

IMAGE, TOKENS = 60, 80
FULL = XQuantConfig.preset("full")
#: All tokens of these steps are in the residual window: as exact as 16 bits, and fused.
DEFAULT = XQuantConfig()
TEXT = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.15,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4
)


def prompt(image_tokens: int) -> torch.Tensor:
    """4 tokens of text, those of an image, 9 tokens of text."""
    ids = torch.randint(3, 50, (1, 13 + image_tokens), generator=seeded(1))
    ids[:, 4 : 4 + image_tokens] = IMAGE
    return ids


def llava():
    """The image is 16 embeddings among those of the text."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    image = dict(pixel_values=torch.randn(1, 3, 16, 16, generator=seeded(2)))
    return transformers.LlavaForConditionalGeneration(config), dict(input_ids=prompt(16), **image)


def qwen2_5_vl():
    """Positions of three axes (mrope), which run behind the number of tokens."""
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    sizes = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, out_hidden_size=32)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(text, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)),
        vision_config=dict(sizes, spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[0]),
        image_token_id=IMAGE,
        vision_start_token_id=61,
    )
    ids = prompt(4)
    ids[:, 3] = 61
    image = dict(pixel_values=torch.randn(16, 96, generator=seeded(2)), image_grid_thw=torch.tensor([[1, 4, 4]]))
    image["mm_token_type_ids"] = (ids == IMAGE).long()
    return transformers.Qwen2_5_VLForConditionalGeneration(config), dict(input_ids=ids, **image)


def gemma3():
    """Tokens of an image see each other, both ways; one of the layers has a sliding window."""
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(
            **TEXT, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
        ),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )
    ids = prompt(4)
    image = dict(pixel_values=torch.randn(1, 3, 16, 16, generator=seeded(2)), token_type_ids=(ids == IMAGE).long())
    return transformers.Gemma3ForConditionalGeneration(config), dict(input_ids=ids, **image)


def made(build):
    torch.manual_seed(0)
    model, inputs = build()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval().requires_grad_(False), inputs


def generated(model, inputs, **more):
    out = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
    )
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


@pytest.mark.parametrize(
    "build, make, layers",
    [
        (llava, lambda config: None, 2),  # the cache that generate() makes
        pytest.param(qwen2_5_vl, lambda config: StaticCache(config, max_cache_len=TOKENS), 2, marks=pytest.mark.slow),
        pytest.param(gemma3, lambda config: XQuantCache(config, TOKENS), 1, marks=pytest.mark.slow),  # the window stays
    ],
)
def test_generate(build, make, layers):
    """Under ``strict``, which the attentions of a vision tower do not break: they read no cache."""
    model, inputs = made(build)
    text, expected, _ = generated(model, inputs)
    without = torch.where(inputs["input_ids"] == IMAGE, 5, inputs["input_ids"])
    assert relative_error(generated(model, {"input_ids": without})[1], expected) > 0.1, "the image matters"
    calls, cache = [], make(model.config)
    model.compile(backend=interpreted(calls, strict=build is not gemma3, self_check=False))
    mine, logits, cache = generated(model, inputs, **({} if cache is None else {"past_key_values": cache}))
    assert torch.equal(mine, text) and relative_error(logits, expected) < 1e-5
    assert sum(isinstance(layer.keys, STORED_KV) for layer in cache.layers) == layers
    assert count(calls[-1], ops.DECODE) == layers and counters["xquant"]["fuse_decode"] >= layers


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("build", [llava, gemma3])
def test_a_second_image_in_a_later_turn(build):
    """A chunk with an image behind tokens that are stored, compiled."""
    model, inputs = made(build)
    types = {"token_type_ids": torch.zeros(1, 1, dtype=torch.long)} if build is gemma3 else {}
    token = dict(input_ids=torch.tensor([[7]]), **types)
    second = dict(inputs, pixel_values=inputs["pixel_values"].flip(-1) * 2)

    def turns(cache, step):
        calls = ((model.forward, inputs), (step, token), (step, second), (step, token))
        return torch.cat([f(**given, past_key_values=cache).logits for f, given in calls], 1)

    expected = turns(DynamicCache(config=model.config), model.forward)
    step = torch.compile(model.forward, backend=interpreted(self_check=False))
    assert relative_error(turns(XQuantCache(model.config, TOKENS, FULL), step), expected) < 1e-5

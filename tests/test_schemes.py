"""What each scheme of ``kernels/schemes`` promises: layout, schedule, and that store and load agree on both."""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import seeded
from states import bare_spec

from xquant_fx.kernels.decode_attention.arguments import FUSED_SCHEMES, why_not_fused
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.packing import codes_per_block
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.quantize_store.plain_torch import store
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.kernels.schemes.base import Scheme
from xquant_fx.kernels.schemes.per_token import VECTOR
from xquant_fx.kernels.shared_code_load.arguments import STORED, LoadArguments
from xquant_fx.kernels.shared_code_load.plain_torch import load_as_stored
from xquant_fx.plan.spec import KVSpec

EACH = pytest.mark.parametrize("scheme", SCHEMES)
DIM, GROUP, RESIDUAL, MAX_LEN = 16, 4, 8, 50


#: Mean error of numbers between 0 and 1 that are quantized by other fits than their range: of 1 bit as large as theirs.
NEAR = {1: 0.45, 2: 0.2, 3: 0.11, 4: 0.06}


def spec_of(scheme: str, bits: int) -> KVSpec:
    allowed = SCHEMES[scheme].SCALE_DTYPES
    return bare_spec(
        role="key", scheme=scheme, shape=(2, 1, MAX_LEN, DIM), bits=bits, group_size=GROUP, residual_length=RESIDUAL,
        scale_dtype=torch.float32 if torch.float32 in allowed else allowed[0],
        token_norms=SCHEMES[scheme].TOKEN_NORMS,
    )  # fmt: skip


@EACH
def test_a_scheme_has_all_that_the_protocol_names(scheme: str) -> None:
    module = SCHEMES[scheme]
    for name, declared in vars(Scheme).items():
        if inspect.isfunction(declared) and not name.startswith("_"):
            expected = list(inspect.signature(declared).parameters)[1:]
            assert list(inspect.signature(getattr(module, name)).parameters) == expected, name
    assert module.APPEND in ("blocks", "tokens", "ranked", "rotated", "folded")
    assert module.BITS and all(0 < bits < 16 for bits in module.BITS) and module.SCALE_DTYPES
    assert module.__doc__


@EACH
@given(data=st.data(), max_len=st.integers(1, 300), blocks=st.integers(1, 6), wide=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_layout_has_room_for_all_tokens(scheme: str, data, max_len: int, blocks: int, wide: bool) -> None:
    s, residual, dim = SCHEMES[scheme], blocks * GROUP, 96 if wide else 8
    bits = data.draw(st.sampled_from(s.BITS))
    tokens = s.stored_tokens(max_len, dim, bits, GROUP, residual)
    shapes = s.shapes(tokens, dim, bits, GROUP, torch.float16)
    codes, scale = (torch.Size((1, 1, *shapes[name][0])) for name in ("codes", "scale"))
    assert tokens >= max_len and s.tokens_of(codes, scale) == tokens
    assert codes.numel() * 32 >= tokens * 32 * round(bits * dim // 32) and scale.numel() * GROUP >= tokens * dim
    limits = [s.quantized_limit(past, GROUP, residual) for past in range(max_len + 1)]
    assert all(a <= b <= a + residual for a, b in itertools.pairwise(limits)), "it never goes back"
    assert all(past - limit <= 2 * residual and limit <= past for past, limit in enumerate(limits))


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name.startswith("per_token")])
@given(data=st.data(), max_len=st.integers(1, 300), dim=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_loads_of_whole_vectors_end_in_spare_rows(scheme: str, data, max_len: int, dim: int) -> None:
    """Of the words that hold the last token; the C++ kernel of attention relies on it."""
    per = codes_per_block(bits := data.draw(st.sampled_from(SCHEMES[scheme].BITS)))
    spare = SCHEMES[scheme].stored_tokens(max_len, dim, bits, 1, GROUP) // per - math.ceil(max_len / per)
    assert spare * dim >= VECTOR


@EACH
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [[1] * 30, [5, 8, 3, 8, 1], [40, 1], [13, 20]])
def test_load_reads_what_store_wrote(scheme: str, bits: int, steps: list[int]) -> None:
    """What is below the limit is near, everything else is exact; NaN is never read."""
    spec, past = spec_of(scheme, bits), 0
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in spec.tensor_shapes().items()}
    for name in {"scale", "zero", "ring"} & set(tensors):
        tensors[name].fill_(torch.nan if tensors[name].is_floating_point() else 0xFF)
    tensors = {**dict.fromkeys(("zero", "order", "center", "energy", "norm")), **tensors}
    tensors |= {"sink": None, "start": torch.zeros(2, dtype=torch.int64), "fault": torch.zeros(1, dtype=torch.int32)}
    x = torch.rand(2, 1, sum(steps), DIM, generator=seeded(0))
    for new in steps:
        ring = tensors["ring"].clone() if new > STEP_TOKENS else tensors["ring"]
        step, pos = x[:, :, past : past + new], torch.arange(past, past + new)
        store(StoreArguments(x=step, pos=pos, **tensors, **spec.store_constants()))
        seen = load_as_stored(
            LoadArguments(
                **{name: tensors[name] for name in (*STORED, "start") if name != "ring"},
                ring=ring,
                past=torch.tensor([past]),
                new_tokens=new,
                n=MAX_LEN,
                **spec.load_constants(),
                x=step if new > STEP_TOKENS else None,
            )
        )
        limit = max(SCHEMES[scheme].quantized_limit(past, GROUP, RESIDUAL), 0)
        past += new
        assert torch.equal(seen[:, :, limit:past], x[:, :, limit:past]) and not seen[:, :, past:].any()
        off = (seen[:, :, :limit] - x[:, :, :limit]).abs()
        if scheme in ("per_channel", "per_token"):  # by half a step at most
            assert off.max().item() <= 0.501 / (2**bits - 1) if limit else True
        else:
            assert off.mean().item() <= NEAR[bits] if limit else True
    assert not tensors["fault"].any() and tensors["length"].tolist() == [past, past]


def test_fused_pairs_are_of_schemes_that_are_there() -> None:
    assert all(set(pair) <= set(SCHEMES) for pair in FUSED_SCHEMES)


def test_why_a_pair_has_no_fused_kernel() -> None:
    assert why_not_fused("per_channel", 2, "per_token", 1) == ""
    assert why_not_fused("per_channel", 16, "per_token", 1) == "16-bit storage"
    assert why_not_fused("per_channel", 2, "per_token", 16) == "16-bit storage"
    crossed = "its keys are stored per token and its values per channel"
    assert why_not_fused("per_token", 2, "per_channel", 2) == crossed


def test_passes_know_no_scheme() -> None:
    """Adding one must not touch them."""
    folder = Path(__file__).parents[1] / "passes"
    named = [path.name for path in folder.glob("*.py") if any(name in path.read_text() for name in SCHEMES)]
    assert named == []

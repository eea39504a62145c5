"""Pieces of benchmarks/quality_trials.py: codes, widths, and that its pass is that of the product."""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from xquant_fx import XQuantConfig, ops
from xquant_fx.evaluate.simulate import Prefilled, simulated_logits
from xquant_fx.kernels.rotation import rotate, rotate_back
from xquant_fx.kernels.widths import DISTORTION, rank_widths
from xquant_fx.reports.quality import kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import quality_trials
import trial_codes
import trial_windows
from trial_codes import Trellis, gaussian_codebook, gaussian_trellis, nearest, ring_path, viterbi
from trial_list import TRIALS, trial
from trial_quantizers import Keys, Seen, fixed_widths, over_layer, over_pairs, turned, uniform_widths, water_filling

pytest_plugins = ["plain_torch"]

PROMPT, TOKENS = 640, 700


@pytest.fixture
def quick(monkeypatch):
    """Codes made of fewer samples, made anew."""
    monkeypatch.setattr(trial_codes, "SAMPLES", 2048)
    for made in (gaussian_codebook, gaussian_trellis):
        made.cache_clear()
    yield
    for made in (gaussian_codebook, gaussian_trellis):
        made.cache_clear()


@pytest.fixture(scope="module")
def window(trained) -> Prefilled:
    """The embedded model with a prompt of which 512 keys and 384 values are quantized."""
    model, ids = trained
    return Prefilled.of(model, ids[:, :TOKENS], PROMPT)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).square().mean())


def test_codebook_is_the_same_each_time(quick) -> None:
    first = gaussian_codebook(4, 16)
    gaussian_codebook.cache_clear()
    assert torch.equal(gaussian_codebook(4, 16), first)
    x = gaussian(512, 4)
    found = first[nearest(x, first)]
    torch.testing.assert_close((x - found).norm(dim=1), torch.cdist(x, first).amin(1))
    # Better than the two levels of one bit each, which leave 1 - 2 / pi of a Gaussian.
    assert error(x, found) < 0.3634


@pytest.mark.parametrize("bits", [1, 2])
def test_viterbi_finds_the_best_path(bits: int) -> None:
    """Against all strings of bits, open and closed to a ring."""
    log_states, steps = 3, 4
    trellis, x = Trellis(gaussian(2**log_states, seed=1), bits), gaussian(3, steps)
    paths = [path for path in itertools.product(range(2**log_states), repeat=steps) if follows(path, trellis)]
    errors = (x[:, None] - trellis.values[torch.tensor(paths)]).square().sum(2)
    found = viterbi(x, trellis)
    assert all(tuple(path) in paths for path in found.tolist())
    torch.testing.assert_close((x - trellis.values[found]).square().sum(1), errors.amin(1))
    for overlap in range(trellis.tails):
        closed = [i for i, p in enumerate(paths) if p[0] % trellis.tails == overlap == p[-1] >> bits]
        found = viterbi(x, trellis, torch.full((3,), overlap))
        torch.testing.assert_close((x - trellis.values[found]).square().sum(1), errors[:, closed].amin(1))


def follows(path: tuple[int, ...], trellis: Trellis) -> bool:
    return all(after % trellis.tails == before >> trellis.bits for before, after in itertools.pairwise(path))


def test_a_ring_is_read_from_its_bits_alone(quick) -> None:
    """The state of a number is eight bits of a string of one bit per number, wherever one begins."""
    trellis, x = gaussian_trellis(1), gaussian(8, 32)
    states = ring_path(x, trellis)
    newest = states >> 7
    window = torch.stack([newest.roll(7 - i, 1) << i for i in range(8)]).sum(0)
    assert torch.equal(window, states)
    assert error(x, trellis.values[states]) < 0.3634


@pytest.mark.parametrize("bits", [1.0, 1.5, 2.0, 3.0])
def test_widths_take_the_same_bits_in_every_head(bits: float) -> None:
    importance = gaussian(2, 3, 64).exp()
    for widths in (fixed_widths(bits), water_filling(bits)):
        assert (widths(importance).sum(2) == bits * 64).all()
    layer = over_layer(water_filling(bits))(importance)
    assert (layer.sum((1, 2)) == bits * 64 * 3).all() and layer.sum(2).unique().numel() > 1
    assert sorted(fixed_widths(bits)(importance)[0, 0].tolist(), reverse=True) == list(rank_widths(bits, 64))


def test_water_filling_has_the_least_error_there_is() -> None:
    every = torch.tensor([w for w in itertools.product(range(8), repeat=4) if sum(w) == 8])
    distortion = torch.tensor(DISTORTION)
    for importance in gaussian(20, 4).mul(3).exp():
        given = water_filling(2)(importance[None, None])[0, 0]
        errors = (importance * distortion[every]).sum(1)
        torch.testing.assert_close((importance * distortion[given]).sum(), errors.amin())


def test_keys_before_rope_are_those_that_rope_turned() -> None:
    angle = torch.arange(20)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    rope, x = (angle.cos(), angle.sin()), gaussian(1, 2, 20, 4)
    torch.testing.assert_close(turned(turned(x, rope, -1), rope, 1), x)
    torch.testing.assert_close(turned(x, rope, 1), apply_rotary_pos_emb(x, x, *(each[None] for each in rope))[1])
    assert over_pairs(torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])).tolist() == [[[2.0, 4.0, 2.0, 4.0]]]


@pytest.mark.parametrize("changes", [{}, {"before_rope": True}, {"token_norms": False}, {"rotated": True}], ids=str)
def test_keys_of_many_bits_come_back(changes: dict[str, bool]) -> None:
    """Whatever is done to keys before they are quantized is undone."""
    x = gaussian(1, 2, 256, 8) * torch.arange(1.0, 9.0)
    angle = torch.arange(256)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001] * 2)
    seen = Seen(x, 4, 128, energy=torch.ones(1, 2, 8), rope=(angle.cos(), angle.sin()))
    read = Keys(uniform_widths(7), **changes)(seen)
    assert error(x[:, :, 4:], read[:, :, 4:]) < 1e-2 * float(x.square().mean())
    coarse = Keys(uniform_widths(2), **changes)(seen)
    assert error(x[:, :, 4:], coarse[:, :, 4:]) > 2e-2 * float(x.square().mean())


def test_the_presets_own_quantizers_give_what_the_product_gives(window, monkeypatch) -> None:
    monkeypatch.setattr(ops, "LONG_CHUNK", TOKENS + 1)  # plain torch in both, which rounds alike
    keep = torch.arange(PROMPT, TOKENS - 1, 4)
    for base in ("xquant-2.2", "xquant-1.4"):
        product, _ = simulated_logits(window, keep, XQuantConfig.preset(base))
        assert torch.equal(quality_trials.trial_logits(window, keep, trial("same", base)), product)
    other = quality_trials.trial_logits(window, keep, trial("other", "xquant-2.2", key=Keys(uniform_widths(2))))
    assert kl_divergence(product, other) > 1e-5


def test_every_trial_runs(trained, quick, no_compiler) -> None:
    model, ids = trained
    args = argparse.Namespace(prompt=PROMPT, window=TOKENS, stride=16, only=["keys", "values", "windows: keys", "16"])
    rows = quality_trials.run(model, [ids[:, :TOKENS]], args)
    assert {row["name"] for row in rows} > {t.name for t in TRIALS if not t.chooses_windows}
    assert all(0 < row["kl"] < 0.2 and 1.3 < row["true_bits"] < 3 for row in rows)
    quality_trials.table(rows)


def test_chosen_windows_take_as_many_bytes(trained, monkeypatch, no_compiler) -> None:
    monkeypatch.setattr(trial_windows, "LENGTHS", (128, 256, 384))
    monkeypatch.setattr(trial_windows, "TEXT", trial_windows.Text(count=1, tokens=TOKENS, prompt=PROMPT, stride=8))
    model, _ = trained
    found = trial_windows.chosen_windows(model, next(t for t in TRIALS if t.chooses_windows))
    lengths = found["key"] + found["value"]
    assert len(lengths) == 2 * model.config.num_hidden_layers
    assert sum(lengths) <= 256 * len(lengths) and len(set(lengths)) > 1


def test_rotated_vectors_are_near_what_they_stand_for(quick) -> None:
    values = next(t for t in TRIALS if "vectors" in t.name).value
    x = gaussian(1, 2, 64, 64)
    read = values(Seen(x, 4))
    signs = rotate_back(rotate(x).sign())
    scale = (x * x).sum(3, keepdim=True) / (x * signs).sum(3, keepdim=True)
    assert error(x, read) < error(x, signs * scale)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="loops of x86 processors")
def test_other_loops_read_what_numpy_reads(tmp_path) -> None:
    """Those of benchmarks/code_paths.h that any x86 processor with AVX2 has."""
    import code_paths

    data = code_paths.inputs(2048, 32)
    run = code_paths.caller(code_paths.compiled("avx2", str(tmp_path)), data, 2048)
    there = code_paths.check(run, data, 32)
    assert "values: vectors of 8, table in memory" in there and "keys: turned as they are read" in there
    data["byte"] = data["byte"] + 1
    with pytest.raises(SystemExit, match="off by"):
        code_paths.check(run, data, 32)

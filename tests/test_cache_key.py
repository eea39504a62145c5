"""Inductor's caches on disk: hit when nothing changed, miss when our sources or settings did."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import generated_code
from states import layers_of, range_config
from torch import Tensor
from torch._inductor import codecache, compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn.functional import scaled_dot_product_attention

import xquant_fx
from xquant_fx import XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler import cache_key
from xquant_fx.plan.spec import KVSpec

SMALL = range_config(k_group_size=8, residual_length=8)
SHAPE = (1, 1, 32, 16)


def step(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)
    return scaled_dot_product_attention(q, keys, values)


def step_args(config: XQuantConfig = SMALL) -> tuple[Tensor, ...]:
    """Arguments of ``step`` with quantized buffers; fake ones under a FakeTensorMode."""
    buffers = [QuantizedKV.of(state) for state in layers_of(config, SHAPE, torch.float32)[0]]
    return (*torch.zeros(3, 1, 1, 1, 16), torch.zeros(1, dtype=torch.int64), *buffers)


class UserPass(CustomGraphPass):
    """A pass of the user's own."""

    def __init__(self, name: str | None = "mine") -> None:
        self.name, self.graphs = name, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> Any:
        return self.name


def key_pass(settings: str = "a", user: Any = None) -> cache_key.KeyPass:
    with inductor_config.patch(post_grad_custom_pre_pass=user):
        return cache_key.cache_key_patch(settings)["post_grad_custom_pre_pass"]


def test_uuid_follows_settings_sources_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_pass("a").uuid()
    assert before == key_pass("a").uuid()
    assert before != key_pass("b").uuid()
    for name, other in (("source_hash", b"other sources"), ("machine", ("another processor",))):
        with monkeypatch.context() as patched:
            patched.setattr(cache_key, name, lambda other=other: other)
            assert before != key_pass("a").uuid()


def test_stable_hash_of_a_buffer_follows_what_graphs_rely_on() -> None:
    *_, keys, values = step_args()
    *_, twin, _ = step_args()
    *_, coarser, _ = step_args(SMALL.replace(k_group_size=4))
    values.index_copy_(2, torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, 1, 16))
    hashes = [t._stable_hash_for_caching() for t in (keys, values, coarser, keys[:, :, :8])]
    assert len(set(hashes)) == len(hashes) and all(isinstance(h, str) for h in hashes)
    twin.index_copy_(2, torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, 1, 16))  # contents do not count
    assert twin._stable_hash_for_caching() == hashes[0]


OTHER = dict(
    role="value",
    scheme="per_token",
    layer=2,
    shape=(1, 1, 64, 16),
    dtype=torch.float16,
    bits=4,
    group_size=4,
    residual_length=16,
    rollback_tokens=9,
    window=16,
    any_room=True,
    token_norms=True,
    ragged=True,
    eta=0.25,
    sink_tokens=1,
    scale_dtype=torch.float32,
    partner=1,
    fit="minmax",
)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(KVSpec) if field.name != "reason"])
def test_every_field_of_a_spec_counts(name: str) -> None:
    """In what Dynamo guards on, and in what Inductor's caches key on."""
    spec = step_args()[-2].spec
    other = dataclasses.replace(spec, **{name: OTHER[name]})
    assert spec == dataclasses.replace(spec) and spec != other
    buffers = [QuantizedKV(s, torch.zeros(1)) for s in (spec, dataclasses.replace(spec), other)]
    hashes = [buffer._stable_hash_for_caching() for buffer in buffers]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_reason_is_for_people_only() -> None:
    spec = step_args()[-2].spec
    assert spec.reason and spec == dataclasses.replace(spec, reason="another")
    buffers = [QuantizedKV(s, torch.zeros(1)) for s in (spec, dataclasses.replace(spec, reason="another"))]
    assert len({buffer._stable_hash_for_caching() for buffer in buffers}) == 1


def test_source_hash_covers_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = shutil.copytree(Path(xquant_fx.__file__).parent, tmp_path / "xquant_fx")
    monkeypatch.setattr(cache_key, "__file__", str(package / "compiler" / "cache_key.py"))

    hashed, by_torch = list[Path](), cache_key.get_hash_for_files

    def get_hash(files: tuple[str, ...]) -> bytes:
        hashed.extend(map(Path, files))
        return by_torch.__wrapped__(files)  # which remembers what it hashed

    monkeypatch.setattr(cache_key, "get_hash_for_files", get_hash)
    compute = cache_key.source_hash.__wrapped__
    seen = {compute()}
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    assert sorted(hashed) == sorted(files) and {path.suffix for path in files} == {".py", ".cpp", ".h"}
    folders = {path.relative_to(package).parts[0] for path in files if path.parent != package}
    assert folders == {"cache", "compiler", "evaluate", "kernels", "passes", "plan", "reports"}
    for path in files[::50]:
        path.write_text(path.read_text() + "\n// changed\n")
        seen.add(compute())
    assert len(seen) == len(files[::50]) + 1


def test_uuid_of_the_users_pass_is_part_of_ours() -> None:
    uuids = [key_pass("a", user).uuid() for user in (None, UserPass("one"), UserPass("two"))]
    assert len(set(uuids)) == 3
    assert uuids[1] == key_pass("a", UserPass("one")).uuid()


@pytest.mark.parametrize("user", [UserPass(None), lambda graph: None], ids=["no uuid", "a plain function"])
def test_a_pass_without_uuid_switches_caching_off(user: Any) -> None:
    """As Inductor itself does with such a pass."""
    assert key_pass("a", user).uuid() is None


def test_several_passes() -> None:
    """Inductor takes a list from torch 2.13 on."""
    one, two = UserPass("one"), UserPass("two")
    both = key_pass("a", [one, two])
    both(torch.fx.Graph())
    assert (one.graphs, two.graphs) == (1, 1)
    assert both.uuid() != key_pass("a", [two, one]).uuid()
    assert key_pass("a", [one, UserPass(None)]).uuid() is None


def test_the_users_pass_still_runs() -> None:
    user = UserPass()
    with inductor_config.patch(post_grad_custom_pre_pass=user):
        generated_code(step, step_args)
    assert user.graphs == 1


def fx_graph_key(monkeypatch: pytest.MonkeyPatch, config: XQuantConfig = SMALL) -> str:
    """Key of a step in Inductor's cache of compiled graphs; nothing is compiled."""
    keys: list[str] = []

    def inner_compile(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        keys.append(codecache.compiled_fx_graph_hash(gm, inputs, kwargs, [])[0])
        return gm

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=inner_compile))
        torch._dynamo.reset()
        torch.compile(step, backend="xquant", dynamic=False)(*step_args(config))
    (key,) = keys
    return key


def test_key_of_the_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced graph is the same each time but for the last; only the uuid tells them apart."""
    before = fx_graph_key(monkeypatch)
    assert before == fx_graph_key(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(cache_key, "source_hash", lambda: b"other sources")
        assert before != fx_graph_key(monkeypatch)
    with inductor_config.patch(post_grad_custom_pre_pass=UserPass()):
        assert before != fx_graph_key(monkeypatch)
    assert before != fx_graph_key(monkeypatch, SMALL.replace(eta_1bit=0.1))


# Decodes 20 tokens over ordinary buffers: the first step takes them over, the second is compiled.
SCRIPT = """
import json, sys
import torch, xquant_fx
from torch._dynamo.utils import counters

torch._inductor.config.cpp.simdlen = 1  # finding out about vector units would take longer than all else

def step(q, k, v, pos, mask, keys, values):
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

compiled = torch.compile(step, backend="xquant", options=json.loads(sys.argv[1]), dynamic=False)
keys, values = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 32, 16)
x = torch.randn(20, 3, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    for i, qkv in enumerate(x):
        out = compiled(*qkv, torch.tensor([i]), (torch.arange(32) <= i)[None], keys, values)
counts = {name: counters[kind][name] for kind, name in (
    ("inductor", "fxgraph_cache_hit"), ("inductor", "fxgraph_cache_miss"),
    ("aot_autograd", "autograd_cache_hit"), ("aot_autograd", "autograd_cache_miss"))}
print(json.dumps({"out": out.flatten().tolist(), "counts": counts, "package": xquant_fx.__file__}))
"""


@pytest.mark.slow
def test_caches_across_processes(tmp_path: Path) -> None:
    package = shutil.copytree(Path(xquant_fx.__file__).parent, tmp_path / "copy" / "xquant_fx")
    env = {
        **os.environ, "PYTHONPATH": str(package.parent), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(**options: Any) -> tuple[list[float], dict[str, int]]:
        settings = json.dumps({"k_bits": 16, "k_group_size": 8, "residual_length": 8, **options})
        command = [sys.executable, "-c", SCRIPT, settings]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert Path(found["package"]).parent == package
        return found["out"], found["counts"]

    miss = {"fxgraph_cache_hit": 0, "fxgraph_cache_miss": 1, "autograd_cache_hit": 0, "autograd_cache_miss": 1}
    hit = {"fxgraph_cache_hit": 1, "fxgraph_cache_miss": 0, "autograd_cache_hit": 1, "autograd_cache_miss": 0}
    first, counts = run()
    assert counts == miss
    again, counts = run()
    assert counts == hit and again == first
    other, counts = run(v_bits=16)
    assert counts == miss and other != first

    # Values doubled by a change of the body of shared_code_load: stale code would give the old numbers.
    with (package / "kernels" / "shared_code_load" / "plain_torch.py").open("a") as file:
        file.write(
            "\n_load = load\ndef load(a):\n    return _load(a) * (2.0 if a.scheme.startswith('per_token') else 1.0)\n"
        )
    doubled, counts = run()
    assert counts == miss
    assert torch.allclose(torch.tensor(doubled), 2 * torch.tensor(first), rtol=1e-5)

"""Folders in Hugging Face's format: exact there and back, checked on the way in, read by transformers."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from llama4_jax import hf
from llama4_jax.axes import Execution
from llama4_jax.config import ModelConfig, Rope
from llama4_jax.text import abstract
from tools.record_golden import our_state, random_weights
from training import hf_import, safetensors_header
from training.config import MeshConfig
from training.export_params import save_hf
from training.hf_import import load_hf
from training.mesh import make_mesh, shardings
from training.model_folder import read_config

CFG = ModelConfig(vocab_size=64, embed_dim=32, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=8, dense_dim=48,
                  expert_dim=16, num_experts=4, moe_every=2, chunk=8, floor_scale=5, max_position=256,
                  rope=Rope(10_000.0, 16.0, original=32))  # fmt: skip
SHARD = 40_000
BF16 = np.dtype(ml_dtypes.bfloat16)


@cache
def params() -> nnx.State:
    return jax.tree.map(jax.numpy.asarray, our_state(CFG, random_weights(CFG)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A bf16 export in several shards. Not to be changed: see `folder`."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_hf(params(), CFG, folder, shard_bytes=SHARD)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported, tmp_path / "model")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Read by the safetensors library, independently of ours."""
    read: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        read |= safetensors.numpy.load_file(file)
    return read


def rewrite(folder: Path, change) -> None:
    """Put other tensors into the folder, as a single file."""
    tensors = tensors_of(folder)
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def assert_equal(got: nnx.State, want: nnx.State) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), (_, b) in zip(nnx.to_flat_state(got), nnx.to_flat_state(want), strict=True):
        assert a.get_value().dtype == np.float32
        np.testing.assert_array_equal(a.get_value(), b.get_value(), err_msg=str(path))


def test_shards_are_what_the_safetensors_library_and_the_index_say(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert not any(path.name.startswith(".") for path in exported.parent.iterdir())
    by_file = {file: safetensors.numpy.load_file(exported / file) for file in files}
    assert {name: file for file, ts in by_file.items() for name in ts} == index["weight_map"]
    sizes = {file: sum(x.nbytes for x in ts.values()) for file, ts in by_file.items()}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert all(size <= SHARD for size in sizes.values())
    want = random_weights(CFG)
    got = tensors_of(exported)
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.dtype == BF16
        np.testing.assert_array_equal(x, want[name].astype(BF16), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_is_bit_identical(dtype, tmp_path):
    save_hf(params(), CFG, tmp_path / "one", dtype=dtype)
    loaded = load_hf(tmp_path / "one")
    assert jax.tree.structure(loaded) == jax.tree.structure(nnx.split(abstract(CFG))[1])
    if dtype == "float32":
        assert_equal(loaded, params())
    save_hf(loaded, CFG, tmp_path / "two", dtype=dtype)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert read_config(tmp_path / "one") == CFG


def test_one_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path):
    save_hf(params(), CFG, tmp_path / "m", shard_bytes=1)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == len(list(hf.tensors(CFG)))
    assert_equal(load_hf(tmp_path / "m"), jax.tree.map(lambda x: x.astype(BF16).astype(np.float32), params()))


def test_weights_land_in_the_given_shardings_and_leave_from_them(exported, tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    places = shardings(mesh, Execution().specs(params()))
    loaded = load_hf(exported, shardings=places)
    for x, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(places), strict=True):
        assert x.sharding == place
    assert_equal(loaded, load_hf(exported))
    save_hf(loaded, CFG, tmp_path / "again", shard_bytes=SHARD)
    for file in exported.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(ValueError, match="shardings for 1 weights"):
        load_hf(exported, shardings=[jax.tree.leaves(places)[0]])


def test_only_what_local_devices_hold_is_read(exported, monkeypatch):
    """Experts over two devices and D over two: the last device alone needs rows 2 and 3, and half of D."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2), jax.devices()[:4])
    experts = next(t for t in hf.tensors(CFG) if t.name.endswith("gate_up_proj"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert", "fsdp"))

    def last(self, shape):  # what the map is in a process that holds the last device only
        return {d: i for d, i in self.devices_indices_map(shape).items() if d == jax.devices()[3]}

    assert hf_import.local_box(experts, sharding) == [(0, 4), (0, 32), (0, 16)]
    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", last)
    box = hf_import.local_box(experts, sharding)
    assert box == [(2, 4), (16, 32), (0, 16)]
    stored = safetensors_header.stored_tensors(safetensors_header.epath.Path(exported))[experts.name]
    whole = tensors_of(exported)[experts.name]
    np.testing.assert_array_equal(stored.read(2, 4), whole[2:4])
    for i in range(2):
        theirs = experts.theirs(dict(zip("EDF", box, strict=True)))[i]
        np.testing.assert_array_equal(stored.box(theirs), whole[2:4, 16:32, 16 * i : 16 * i + 16])


@pytest.mark.parametrize("gap", [0, 2**15])
def test_any_box_of_a_tensor_is_read(tmp_path, monkeypatch, gap):
    """With what lies between its stretches and without."""
    monkeypatch.setattr(safetensors_header, "GAP", gap)
    x = np.arange(3 * 5 * 7 * 2, dtype=np.int32).reshape(3, 5, 7, 2)
    safetensors.numpy.save_file({"x": x, "y": x[0, 0, 0]}, tmp_path / "model.safetensors")
    stored = safetensors_header.stored_tensors(safetensors_header.epath.Path(tmp_path))
    np.testing.assert_array_equal(stored["y"].whole(), x[0, 0, 0])
    rng = np.random.default_rng(0)
    for _ in range(100):
        box = [tuple(sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in x.shape]
        np.testing.assert_array_equal(stored["x"].box(box), x[tuple(slice(a, b) for a, b in box)])


class Few:
    """A stream that reads no more than so much at once."""

    def __init__(self, stream, most: int):
        self.seek, self.close = stream.seek, stream.close
        self.read = lambda n: stream.read(min(n, most))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("at_once", [10**9, 13])
def test_parts_side_by_side_are_read_apart(tmp_path, monkeypatch, at_once, local):
    """However little the system, or an object store, reads at once."""
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:at_once]], offset))
    if not local:
        monkeypatch.setattr(safetensors_header.Reader, "__init__", lambda self, file: vars(self).update(
            _file=file, _fd=None, _stream=Few(file.open("rb"), at_once)
        ))  # fmt: skip
    monkeypatch.setattr(safetensors_header, "VECTOR", 4)
    x = np.arange(3 * 5 * 6, dtype=np.int32).reshape(3, 5, 6)
    safetensors.numpy.save_file({"before": x[0], "x": x}, tmp_path / "model.safetensors")
    stored = safetensors_header.stored_tensors(safetensors_header.epath.Path(tmp_path))["x"]
    for first, last in ((0, 5), (1, 4), (4, 5)):
        found = stored.split([(2, 3), (first, last), (0, 6)], 2)
        np.testing.assert_array_equal(found, np.split(x[2:3, first:last], 2, axis=-1))
    for apart in ([(0, 1), (0, 5), (0, 4)], [(0, 2), (0, 5), (0, 6)]):
        with pytest.raises(ValueError, match="is not one stretch"):
            stored.split(apart, 2)


def test_an_interrupted_export_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    to_hf, calls = hf.Tensor.to_hf, []

    def failing(self, *ours):
        calls.append(self.name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return to_hf(self, *ours)

    monkeypatch.setattr(hf.Tensor, "to_hf", failing)
    with pytest.raises(KeyboardInterrupt):
        save_hf(params(), CFG, tmp_path / "m", shard_bytes=SHARD)
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.rglob("config.json"))
    save_hf(params(), CFG, tmp_path / "m", shard_bytes=SHARD)  # what was left is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="exists already"):
        save_hf(params(), CFG, tmp_path / "m")


def test_export_refuses_weights_of_another_model(tmp_path):
    with pytest.raises(ValueError, match=r"shared.wi_gate_DF is \(2, 32, 16\), .* has \(2, 32, 24\)"):
        save_hf(params(), replace(CFG, expert_dim=24), tmp_path / "m")
    flat = list(nnx.to_flat_state(params()))
    with pytest.raises(ValueError, match=r"unembedding.kernel_DV is nothing, .* has \(32, 64\)"):
        save_hf(nnx.from_flat_state(flat[:-1]), CFG, tmp_path / "m")
    extra = [*flat, (("vision", "kernel_DD"), flat[-1][1])]
    with pytest.raises(ValueError, match=r"vision.kernel_DD is \(32, 64\), .* has nothing"):
        save_hf(nnx.from_flat_state(extra), CFG, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_routers_bias_is_left_out_where_it_is_zero_and_refused_where_it_is_not(exported, tmp_path):
    """And a model that has one begins at zero with weights of a folder, on any mesh."""
    biased = replace(CFG, router_bias=True)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    places = shardings(mesh, Execution().specs(nnx.split(abstract(biased))[1]))
    for state in (load_hf(exported, router_bias=True), load_hf(exported, router_bias=True, shardings=places)):
        assert jax.tree.structure(state) == jax.tree.structure(nnx.split(abstract(biased))[1])
        rest = [(path, p) for path, p in nnx.to_flat_state(state) if path[-1] != "bias_E"]
        assert_equal(nnx.from_flat_state(rest), load_hf(exported))
        save_hf(state, biased, tmp_path / str(len(jax.tree.leaves(state)[0].devices())), shard_bytes=SHARD)
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in exported.iterdir())
        assert all((folder / path.name).read_bytes() == path.read_bytes() for path in exported.iterdir())

    bias = state["blocks"]["layers"][3]["ffn"]["bias_E"]  # of layers 3 and 7
    assert bias.get_value().shape == (2, 4) and not bias.get_value().any()
    for blocks, message in (
        ([[0, 0, 0, 0], [0, -2e-7, 0, 1e-9]], r"in 1 of 4 MoE layers, largest in layer 7 \(2e-07\)"),
        ([[0, 0.5, 0, 0], [0.25, 0, 0, 0]], r"in 2 of 4 MoE layers, largest in layer 3 \(0\.5\), .* later checkpoint"),
        ([[0, np.nan, 0, 0], [0, 0, 0, 0]], r"in 1 of 4 MoE layers, largest in layer 3 \(nan\)"),
    ):
        state["blocks"]["layers"][3]["ffn"]["bias_E"] = bias.replace(jax.numpy.asarray(blocks, np.float32))
        with pytest.raises(ValueError, match=message):
            save_hf(state, biased, tmp_path / "refused")
    assert not (tmp_path / "refused").exists() and not list(tmp_path.glob(".*"))


def drop(tensors):
    del tensors["model.layers.3.feed_forward.router.weight"]


def add(tensors):
    tensors["model.layers.8.input_layernorm.weight"] = np.ones(32, BF16)


def add_vision(tensors):
    tensors["vision_model.class_embedding"] = np.ones(32, BF16)


def transpose(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.ones((32, 16), BF16)


def integer(tensors):
    tensors["model.norm.weight"] = np.ones(32, np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"tensor model.layers.3.feed_forward.router.weight is missing: expected shape \(4, 32\)"),
        (add, r"tensor model.layers.8.input_layernorm.weight in .* is none of this model's"),
        (add_vision, r"tensor vision_model.class_embedding in .* is none of this model's"),
        (transpose, r"tensor model.layers.1.self_attn.k_proj.weight in .* has shape \(32, 16\), expected \(16, 32\)"),
        (integer, r"tensor model.norm.weight in .* has dtype I8, expected one of F32, BF16, F16"),
    ],
)
def test_import_names_the_tensor_that_is_wrong(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_hf(folder)


def test_a_single_file_without_index_is_read(exported, folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.full(32, 0.5, np.float16)}))
    loaded, original = load_hf(folder), load_hf(exported)
    np.testing.assert_array_equal(loaded["final_norm"]["scale_D"].get_value(), np.full(32, 0.5, np.float32))
    np.testing.assert_array_equal(
        loaded["embedding"]["table_VD"].get_value(), original["embedding"]["table_VD"].get_value()
    )


def test_the_text_part_of_a_whole_model_is_read(exported, folder):
    def whole(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_model.class_embedding"] = np.ones(32, BF16)
        tensors["multi_modal_projector.linear_1.weight"] = np.ones((32, 32), BF16)

    rewrite(folder, whole)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(model_type="llama4", text_config=text, vision_config={})))
    assert read_config(folder, vision=False) == CFG
    assert_equal(load_hf(folder, vision=False), load_hf(exported))


def damage_index(folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_damaged_folders_are_named(exported, tmp_path):
    def copy(name: str) -> Path:
        return shutil.copytree(exported, tmp_path / name)

    first = min(path.name for path in exported.glob("*.safetensors"))
    cases = []
    for name, change, message in (
        ("escape", {"lm_head.weight": "../other.safetensors"}, "is not the name of a file in this folder"),
        ("hidden", {"lm_head.weight": ".hidden"}, "is not the name of a file in this folder"),
        ("unplaced", {"lm_head.weight": first}, "holds tensor lm_head.weight, which .* does not place there"),
        ("ghost", {"ghost.weight": first}, "tensor ghost.weight is not in model-00001"),
    ):
        damage_index(folder := copy(name), lambda weight_map, change=change: weight_map.update(change))
        cases.append((folder, message))
    data = (exported / first).read_bytes()
    for name, content, message in (
        ("cut", data[:-1], "bytes, its header describes"),
        ("longer", data + b"\0", "bytes, its header describes"),
        ("empty", b"", "not in the safetensors format"),
        ("bloated", (1 << 40).to_bytes(8, "little") + data[8:], "not in the safetensors format"),
        ("garbled", data[:8] + b"#" + data[9:], "is not JSON"),
        ("overlapping", data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,'), "cannot lie at bytes 1"),
        ("listed", data.replace(b'"data_offsets":[0,', b'"data_offsetz":[0,'), "header is not in the safetensors"),
    ):
        (folder := copy(name)).joinpath(first).write_bytes(content)
        cases.append((folder, message))
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            load_hf(folder)
    (folder := copy("lost")).joinpath(first).unlink()
    with pytest.raises(FileNotFoundError, match=first):
        load_hf(folder)
    for file in ("config.json", "model.safetensors.index.json"):
        (folder := copy(f"no_{file}")).joinpath(file).unlink()
        with pytest.raises(FileNotFoundError, match=file):
            load_hf(folder)


def test_transformers_reads_the_folder_and_its_folders_are_read(exported, folder):
    pytest.importorskip("torch", reason="needs the extra [verify]")
    transformers = pytest.importorskip("transformers", reason="needs the extra [verify]")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "Llama4ForCausalLM"
    assert str(model.dtype) == "torch.bfloat16"
    model.save_pretrained(folder / "theirs")  # as transformers writes it, we read it
    assert read_config(folder / "theirs") == CFG
    assert_equal(load_hf(folder / "theirs"), load_hf(exported))

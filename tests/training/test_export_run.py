"""Checkpoints and Hugging Face folders, streamed: the same bytes there and back, whatever happens in between."""

from __future__ import annotations

import dataclasses
import json
import random
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

import configs
from data.tokenizer import from_bytes, train_bpe
from llama4_jax import hf
from llama4_jax.config import ModelConfig, Rope, VisionConfig, behemoth, maverick, scout, with_vision
from tools.quantised_loss import beside_transformers
from tools.record_golden import our_state, random_weights
from training import export, hf_import, manifest, quantised, transfer
from training.checkpoint import Checkpoints, restore_params
from training.checkpoint_arrays import ZARR, Arrays, chunk_sizes, create_array, write_chunks
from training.config import MeshConfig, RunConfig
from training.diff import compare, settings
from training.export import export_run
from training.export_params import save_hf
from training.hf_import import import_run, load_hf
from training.mesh import make_mesh
from training.model_folder import About
from training.safetensors_header import Stored, read_header, stored_tensors
from training.state import abstract_state, init_state
from training.verify import check_files
from training.weights import open_weights

SCOUT = ModelConfig(vocab_size=64, embed_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, dense_dim=48,
                    expert_dim=32, num_experts=4, chunk=8, floor_scale=5, max_position=256,
                    rope=Rope(10_000.0, 16.0, original=32))  # fmt: skip
MODELS = {
    "scout": SCOUT,
    "maverick": replace(
        SCOUT, dense_dim=64, num_layers=8, num_experts=8, moe_every=2, qk_norm=False, rope=Rope(10_000.0)
    ),
    "behemoth": replace(SCOUT, embed_dim=48, num_layers=8, num_heads=8, expert_dim=64),
    "vision": with_vision(
        SCOUT,
        VisionConfig(embed_dim=32, num_layers=2, num_heads=4, mlp_dim=128, image_size=24, patch_size=4, adapter_dim=20),
    ),
}
MEMORY = 20_000_000_000
BF16 = np.dtype(ml_dtypes.bfloat16)


@cache
def params(name: str) -> nnx.State:
    return jax.tree.map(jax.numpy.asarray, our_state(MODELS[name], random_weights(MODELS[name])))


def run_config(model: ModelConfig, out: Path) -> RunConfig:
    cfg = configs.find("pretrain:tiny")
    learner = replace(cfg.learners["scout"], model=model)
    return replace(cfg, learners={"scout": learner}, out=str(out))


def bring(folder: Path, to: Path, model: ModelConfig) -> None:
    import_run(folder, run_config(model, to), "tokens", lambda work: None, max_memory=MEMORY)


def send(run: Path, to: Path, **options) -> None:
    export_run(Arrays(run), to, about=About(), max_memory=MEMORY, **options)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Read by the safetensors library, independently of ours."""
    read: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        read |= safetensors.numpy.load_file(file)
    return read


def same_shards(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.glob("model*"))
    return names == sorted(p.name for p in b.glob("model*")) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


@pytest.fixture(scope="module", params=MODELS)
def imported(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """(name, a folder in bf16, the run that it was imported as). Not to be changed."""
    place = tmp_path_factory.mktemp(request.param)
    save_hf(params(request.param), MODELS[request.param], place / "hf", shard_bytes=40_000)
    bring(place / "hf", place / "run", MODELS[request.param])
    return request.param, place / "hf", place / "run"


def test_round_trips_are_bit_exact(imported, tmp_path, monkeypatch):
    """With chunks cut small on both ways, so that every tensor is of many pieces."""
    name, folder, run = imported
    send(run, tmp_path / "again", shard_bytes=40_000)
    assert same_shards(folder, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    digests = [json.loads((f / "llama4_manifest.json").read_text())["sha256"] for f in (folder, tmp_path / "again")]
    assert digests[0] == digests[1] and len(digests[0]) == len(tensors_of(folder))
    for module in (export, hf_import):
        monkeypatch.setattr(module, "PIECE_BYTES", 256)
    monkeypatch.setattr("training.checkpoint_arrays.CHUNK_BYTES", 512)
    bring(folder, tmp_path / "small", MODELS[name])
    send(tmp_path / "small", tmp_path / "third", shard_bytes=40_000)
    assert same_shards(folder, tmp_path / "third")


def test_orbax_restores_what_an_import_wrote_and_the_optimizer_begins_anew(imported):
    name, folder, run = imported
    restored = nnx.to_flat_state(restore_params(str(run)).params)
    for (path, got), (_, want) in zip(restored, nnx.to_flat_state(load_hf(folder)), strict=True):
        assert got.get_value().dtype == np.float32
        np.testing.assert_array_equal(got.get_value(), want.get_value(), err_msg=str(path))
    if name == "scout":
        cfg = run_config(MODELS[name], run)
        mesh = make_mesh(MeshConfig())
        with Checkpoints(str(run)) as checkpoints:
            state, place = checkpoints.restore(0, abstract_state(cfg, mesh))
        assert not place and not any(np.any(x) for x in jax.tree.leaves(state.learners["scout"].optimizer))


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_fresh_optimizers_are_all_zero(kind):
    """What a checkpoint of weights alone leaves out is filled with zeros."""
    cfg = run_config(replace(SCOUT, num_layers=2, nope_every=2), Path("x"))
    optimizer = replace(cfg.learners["scout"].optimizer, kind=kind)
    learner = init_state(replace(cfg, learners={"scout": replace(cfg.learners["scout"], optimizer=optimizer)}))
    for x in jax.tree.leaves((learner.learners["scout"].optimizer, learner.learners["scout"].weighting)):
        assert not np.any(x)


@pytest.mark.parametrize("way", ["export", "import"])
def test_what_was_broken_off_is_gone_on_with(imported, tmp_path, monkeypatch, way):
    name, folder, run = imported
    if name != "scout":
        pytest.skip("one model suffices")
    monkeypatch.setattr("training.transfer.SYNC_BYTES", 2000)
    monkeypatch.setattr(export, "PIECE_BYTES", 1024)
    monkeypatch.setattr(hf_import, "PIECE_BYTES", 1024)
    monkeypatch.setattr("training.checkpoint_arrays.CHUNK_BYTES", 1024)
    made: list[int] = []
    kind, method = (export._Plan, "read") if way == "export" else (hf_import, "_read")
    original, to = getattr(kind, method), tmp_path / "to"

    def start() -> None:
        send(run, to, shard_bytes=40_000, threads=2) if way == "export" else bring(folder, to, SCOUT)

    def counting(*args):
        made.append(1)
        if len(made) in (20, 45):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(kind, method, counting)
    pieces = 0
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            start()
        assert not to.exists() and not list(tmp_path.rglob("config.json"))
    hashed: list[Path] = []
    digest = manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda file: (hashed.append(Path(file)), digest(file))[1])
    start()
    monkeypatch.setattr(manifest, "digest", digest)
    pieces = len(made)
    monkeypatch.setattr(kind, method, original)
    if way == "export":
        assert same_shards(folder, to) and check_files(to).ok
    else:
        send(to, tmp_path / "again", shard_bytes=40_000)
        assert same_shards(folder, tmp_path / "again")
        assert not manifest.problems(epath.Path(to) / "checkpoints" / "0")
        chunks = {file for file in hashed if file.name[0].isdigit() and file.parent.name != "step"}
        assert hashed and not chunks  # those of all attempts were taken on the way
    made.clear()
    monkeypatch.setattr(kind, method, lambda *args: (made.append(2), original(*args))[1])
    to = tmp_path / "unbroken"
    start()
    assert len(made) <= pieces < 1.5 * len(made)  # little was done twice
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("way", ["export", "import"])
@pytest.mark.parametrize("sizes", [(1024, 4096), (4096, 1024)])
def test_other_pieces_than_before_are_not_taken_for_the_same(imported, tmp_path, monkeypatch, way, sizes):
    """What was broken off goes on with other memory or threads, which cut other pieces."""
    name, folder, run = imported
    if name != "scout":
        pytest.skip("one model suffices")
    monkeypatch.setattr("training.transfer.SYNC_BYTES", 2000)
    monkeypatch.setattr("training.checkpoint_arrays.CHUNK_BYTES", 1024)
    kind, method = (export._Plan, "read") if way == "export" else (hf_import, "_read")
    original, made, to = getattr(kind, method), [], tmp_path / "to"

    def counting(*args):
        made.append(1)
        if len(made) == 30:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(kind, method, counting)
    for size in sizes:
        monkeypatch.setattr(export if way == "export" else hf_import, "PIECE_BYTES", size)
        try:
            send(run, to, shard_bytes=40_000) if way == "export" else bring(folder, to, SCOUT)
        except KeyboardInterrupt:
            assert size == sizes[0]
    if way == "import":
        send(to, tmp_path / "again", shard_bytes=40_000)
    else:
        to.rename(tmp_path / "again")
    assert len(made) > 30 and same_shards(folder, tmp_path / "again")


@pytest.mark.parametrize("model", [scout, maverick, behemoth])
def test_full_size_is_imported_in_the_memory_of_the_default(model):
    cfg, budget = model(), transfer.Budget(20 * 10**9)
    budget.total = 1_500_000_000  # what 2 GB leave
    table = list(hf.tensors(cfg))
    stored = {t.name: Stored(epath.Path("x"), "BF16", t.shape, 0) for t in table}
    jobs = hf_import._plan_jobs(hf_import.Folder(epath.Path("x"), cfg, table, stored), "model", budget, 4)
    assert sum(job.nbytes for job in jobs) == sum(one.nbytes for one in stored.values())
    chunk = next(chunk_sizes(t, 2) for t in table if t.name.endswith("experts.down_proj"))
    assert chunk["E"] == 1 and 2**22 < 2 * chunk["F"] * chunk["D"] <= 2**26  # not thousands of little files


def test_what_does_not_fit_is_refused(imported, tmp_path):
    _, folder, run = imported
    with pytest.raises(ValueError, match="exists already"):
        send(run, folder)
    with pytest.raises(ValueError, match=r"--max-memory 0.10GB is too little: the least is \d"):
        export_run(Arrays(run), tmp_path / "x", about=About(), max_memory=100_000_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_chunks_are_the_files_that_tensorstore_writes(tmp_path, dtype):
    draw, state = np.random.default_rng(0), epath.Path(tmp_path)
    for n in range(12):
        shape = tuple(draw.integers(1, 9, size=draw.integers(1, 5)).tolist())
        chunk = tuple(int(draw.integers(-(-size // 3), size + 1)) for size in shape)
        order = draw.permutation(len(shape))
        values = draw.standard_normal([shape[i] for i in order]).astype(ZARR[dtype]).transpose(np.argsort(order))
        theirs, ours = (create_array(state, f"{who}{n}", shape, chunk, dtype) for who in ("theirs", "ours"))
        theirs.write(values).result()
        half = chunk[0] * draw.integers(0, -(-shape[0] // chunk[0]))  # in two pieces, the first of which may be empty
        digests = write_chunks(state / f"ours{n}", chunk, (0,) * len(shape), values[:half])
        digests |= write_chunks(state / f"ours{n}", chunk, (int(half), *(0,) * (len(shape) - 1)), values[half:])
        assert np.array_equal(ours.read().result(), values)
        files = {name: manifest.digest(file) for name, file in manifest.files(state / f"theirs{n}").items()}
        assert manifest.files(state / f"ours{n}").keys() == files.keys()
        assert digests == {name: files[name] for name in digests} and files.keys() - digests == {".zarray"}


# --- other layouts -------------------------------------------------------------------------------------------------


def apart(folder: Path, to: Path, cfg: ModelConfig) -> None:
    """The folder as quantised releases have it: experts one by one, [out, in]."""
    tensors = tensors_of(folder)
    for name in [n for n in tensors if ".experts." in n]:
        fused, start = tensors.pop(name), name.rsplit(".", 1)[0]
        for e, matrix in enumerate(fused):
            if name.endswith("gate_up_proj"):
                gate, up = np.split(matrix, 2, axis=-1)
                tensors |= {f"{start}.{e}.gate_proj.weight": gate.T.copy(), f"{start}.{e}.up_proj.weight": up.T.copy()}
            else:
                tensors[f"{start}.{e}.down_proj.weight"] = matrix.T.copy()
    to.mkdir()
    safetensors.numpy.save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())


def test_experts_one_by_one_are_read(imported, tmp_path):
    name, folder, _ = imported
    apart(folder, tmp_path / "apart", MODELS[name])
    bring(tmp_path / "apart", tmp_path / "run", MODELS[name])
    send(tmp_path / "run", tmp_path / "again", shard_bytes=40_000)
    assert same_shards(folder, tmp_path / "again")
    if name == "scout":
        for got, want in zip(
            jax.tree.leaves(load_hf(tmp_path / "apart")), jax.tree.leaves(load_hf(folder)), strict=True
        ):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("scheme", quantised.SCHEMES)
def test_quantised_weights_are_near_and_read_back(imported, tmp_path, scheme):
    name, folder, run = imported
    if name != "scout":
        pytest.skip("one model suffices")
    if scheme == "int4-g128":
        with pytest.raises(ValueError, match=r"needs rows of a multiple of 128 weights, .*q_proj.weight has 32"):
            send(run, tmp_path / "q", quant=quantised.SCHEMES[scheme])
        return
    send(run, tmp_path / "q", quant=quantised.SCHEMES[scheme])
    assert check_files(tmp_path / "q").ok
    stored, exact = tensors_of_any(tmp_path / "q"), open_weights(str(folder))
    assert any(key.endswith("experts.3.down_proj.weight_scale") for key in stored)
    got = open_weights(str(tmp_path / "q"))
    # What rounding to the nearest with a scale for the largest weight leaves, as even noise within a step.
    bound = {"int4-g32": 1 / 7.5 / 12**0.5, "int8": 1 / 127.5 / 12**0.5, "fp8": 2**-4 / 3**0.5}[scheme]
    for one in compare(got, exact):
        assert one.equal != one.name.rpartition(".")[2].startswith("w"), one
        if one.layer is not None and not one.equal:
            path = ("blocks", "layers", one.layer, *one.name.split("."))
            x, y = (w.read(path, (0,)) for w in (got, exact))
            assert np.sqrt(np.square(x - y).mean()) < bound * np.abs(y).max(), one


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4-g32", "int8", "fp8"])
def test_compressed_tensors_reads_the_same_weights(imported, tmp_path, scheme):
    """No tensor missing or left over, and the logits are our dequantised forward's, nearer than bf16 rounds."""
    pytest.importorskip("compressed_tensors", reason="needs the extra [verify-quantised]")
    name, _, run = imported
    if name in ("behemoth", "vision"):
        pytest.skip("two models suffice")
    send(run, tmp_path / "q", quant=quantised.SCHEMES[scheme])
    learner = replace(configs.find("pretrain:tiny").learners["scout"], model=MODELS[name])
    texts = [np.random.default_rng(1).integers(0, 64, 40, dtype=np.int32)]
    found = beside_transformers(tmp_path / "q", learner, load_hf(tmp_path / "q"), texts)
    assert found["off"] < 1e-5 < found["rounding"], found


def tensors_of_any(folder: Path) -> set[str]:
    return set(stored_tensors(epath.Path(folder)))


def test_codes_are_packed_as_documented_and_scales_beat_the_largest_weights():
    codes = np.random.default_rng(0).integers(-8, 8, (3, 16)).astype(np.int8)
    packed = quantised.pack(codes, 4)
    want = [
        [sum((int(c) + 8) << (4 * i) for i, c in enumerate(row[8 * j : 8 * j + 8])) for j in (0, 1)] for row in codes
    ]
    np.testing.assert_array_equal(packed.view(np.uint32), want)
    np.testing.assert_array_equal(quantised.unpack(packed, 4), codes)
    eight = np.random.default_rng(1).integers(-128, 128, (3, 8)).astype(np.int8)
    np.testing.assert_array_equal(quantised.unpack(quantised.pack(eight, 8), 8), eight)

    w = np.random.default_rng(2).standard_normal((64, 128)).astype(np.float32)
    scheme = quantised.SCHEMES["int4-g32"]
    packed, scale = scheme.quantise(w)
    ours = quantised.unpack(packed, 4) * np.repeat(scale.astype(np.float32), 32, axis=1)
    groups = w.reshape(-1, 32)
    plain = (np.abs(groups).max(axis=1, keepdims=True) / 7.5).astype(BF16).astype(np.float32)
    theirs = np.clip(np.round(groups / plain), -8, 7) * plain
    assert np.square(ours - w).sum() < 0.9 * np.square(theirs - groups).sum()


# --- verification --------------------------------------------------------------------------------------------------


def test_digests_and_differences_are_found(imported, tmp_path):
    name, _, run = imported
    if name != "maverick":
        pytest.skip("one model suffices")
    send(run, tmp_path / "one")
    files = check_files(tmp_path / "one")
    assert files.ok and files.digests
    a, b = open_weights(f"{run}@0"), open_weights(str(tmp_path / "one"))
    assert all(one.equal for one in compare(a, b)) and not settings(a.cfg, b.cfg)

    shard = next((tmp_path / "one").glob("*.safetensors"))
    entry = read_header(epath.Path(shard))["model.layers.5.feed_forward.experts.down_proj"]
    data = bytearray(shard.read_bytes())
    data[entry.start + entry.nbytes - 1] ^= 1
    shard.write_bytes(data)
    files = check_files(tmp_path / "one")
    assert not files.ok and len(files.problems) == 1 and "layers.5.feed_forward.experts.down_proj" in files.problems[0]
    b = open_weights(str(tmp_path / "one"))
    (wrong,) = [one for one in compare(a, b) if not one.equal]
    assert (wrong.layer, wrong.name) == (5, "ffn.experts.wo_EFD")
    other = dataclasses.replace(MODELS[name], qk_norm=True)
    assert settings(MODELS[name], other) == ["qk_norm: False != True"]


# --- damaged files -------------------------------------------------------------------------------------------------


def test_a_thousand_mutated_headers_and_indexes_are_refused_in_a_line(imported, tmp_path):
    """Or, where a mutation changed no meaning, read as they were; and no size that a file claims is believed."""
    name, folder, _ = imported
    if name != "scout":
        pytest.skip("one model suffices")
    rng = random.Random(0)
    shard = min(folder.glob("*.safetensors"))
    length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    for target, end in ((shard.name, length), ("model.safetensors.index.json", None)):
        place = tmp_path / target.split(".")[-1]
        place.mkdir()
        for file in folder.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        data = (folder / target).read_bytes()
        whole = tensors_of_any(folder)
        refused = 0
        for number in range(500):
            head, tail = bytearray(data[:end]), data[end:] if end else b""
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(len(head))
                kind = rng.randrange(4)
                if kind == 0:
                    head[at] = rng.randrange(256)
                elif kind == 1:
                    del head[at : at + rng.randrange(1, 9)]
                elif kind == 2:
                    head[at:at] = rng.choice((b"9", b"-1", b"[", b"{", b'"', b"null", b"1e999", b"\xff", b"9" * 30))
                else:
                    head[at : at + 8] = data[(start := rng.randrange(len(head))) : start + 8]
            (place / target).write_bytes(bytes(head) + tail)
            if watched := number % 10 == 0:
                tracemalloc.start()
            try:
                assert set(stored_tensors(epath.Path(place))) == whole
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1000
            if watched:
                assert tracemalloc.get_traced_memory()[1] < 20_000_000
                tracemalloc.stop()
        assert refused > 400


@pytest.mark.slow
def test_tokenizer_and_generation_settings_are_written(tmp_path):
    tokenizer = from_bytes(train_bpe(["a few words to train with, and more"] * 20, 300))
    cfg = replace(SCOUT, vocab_size=tokenizer.vocab_size)
    weights = jax.tree.map(jax.numpy.asarray, our_state(cfg, random_weights(cfg)))
    save_hf(weights, cfg, tmp_path / "m", tokenizer=tokenizer)
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id and generation["top_p"] == 0.9
    assert json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())["model_max_length"] == 256
    transformers = pytest.importorskip("transformers", reason="needs the extra [verify]")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "a few  words\n\t(more) \u00e9"
    assert theirs(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert hf.config_from_hf(json.loads((tmp_path / "m" / "config.json").read_text())) == cfg

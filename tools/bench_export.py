"""Export and import at size: their speed beside reading and writing the same bytes, their peak memory, and kills.

    python -m tools.bench_export --folder /tmp/bench --gb 12 --kills 10

Writes a synthetic checkpoint (fp32), exports it in bf16 and imports that again, each in a process of its own whose peak
memory the operating system tells. Beside each, in turn, a plain copy reads and writes as many bytes of the same files.
Then each is killed `--kills` times while it writes, wherever its bytes reach a random number, and started again: every
file must be that of the unbroken run, else the status is 1. `--no-copy` leaves the speed out. Needs three times `--gb`
of disk; the checkpoint stays there for the next time. Linux alone (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from etils import epath

import configs
from data.tokenizer import train_bpe
from llama4_jax import hf
from llama4_jax.config import ModelConfig, Rope
from training.checkpoint import WEIGHTS_ALONE
from training.checkpoint_arrays import array_name, create_array, weight_shapes, write_metadata
from training.record import run_record, write_config

BLOCK = 2**24


def model(gb: float) -> ModelConfig:
    """Scout's structure, of at least `gb` in fp32: 0.5 GB, and 7 GB for each four layers."""
    cfg = ModelConfig(vocab_size=32_768, embed_dim=2048, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=128,
                      expert_dim=4096, num_experts=16, rope=Rope(factor=16.0))  # fmt: skip
    layers = 4
    while True:
        cfg = replace(cfg, num_layers=layers)
        if sum(4 * int(np.prod(shape)) for shape in weight_shapes(cfg).values()) >= gb * 1e9:
            return cfg
        layers += 4


def write_checkpoint(run: Path, cfg: ModelConfig) -> None:
    """Random weights, a chunk at a time, in chunks as training and imports store them, without compression."""
    base = configs.find("pretrain:tiny")
    learner = replace(base.learners["scout"], model=cfg)
    tokenizer = run / "tokenizer.model"
    run.mkdir(parents=True)
    tokenizer.write_bytes(train_bpe(["a few words of text to fill it with"] * 9, 300))
    base = replace(base, learners={"scout": learner}, out=str(run), data=replace(base.data, tokenizer=str(tokenizer)))
    write_config(epath.Path(run), base)
    step, noise = epath.Path(run) / "checkpoints" / "0", np.random.default_rng(0).standard_normal(2**24, np.float32)
    arrays = {}
    tables = {path: t for t in hf.tensors(cfg) for path in t.paths}
    for path, shape in weight_shapes(cfg).items():
        stacked = len(tables[path].index)
        experts = str(path[-1]).endswith(("_EDF", "_EFD"))
        chunks = [1] * (stacked + experts) + list(shape[stacked + experts :])
        if 4 * np.prod(chunks) > 2**26:
            chunks[-2] = -(-chunks[-2] // int(-(-4 * np.prod(chunks) // 2**26)))
        array = create_array(step / "state", array_name("scout", path), shape, tuple(chunks), "float32")
        first: Path | None = None
        for n, index in enumerate(np.ndindex(*(-(-s // c) for s, c in zip(shape, chunks, strict=True)))):
            file = Path(step / "state" / array_name("scout", path) / ".".join(map(str, index)))
            if first is None:
                box = tuple(slice(0, min(c, s)) for c, s in zip(chunks, shape, strict=True))
                sizes = [b.stop for b in box]
                array[box].write(np.resize(noise, int(np.prod(sizes))).reshape(sizes)).result()
                first = file
            else:  # the same numbers but for a stamp, which are quicker to copy than to draw
                shutil.copyfile(first, file)
                with file.open("r+b") as f:
                    f.write(np.float32(n).tobytes() * 16)
        arrays[array_name("scout", path)] = (shape, chunks)
    from data import tokenizer as tokenizers

    write_metadata(step, arrays, data=WEIGHTS_ALONE, run=run_record(base, tokenizers.load(tokenizer).hash))


def files(folder: Path) -> Iterator[Path]:
    yield from (p for p in sorted(folder.rglob("*")) if p.is_file())


def forget(folder: Path) -> None:
    """Out of the page cache, so that what reads them reads the disk."""
    os.sync()
    for file in files(folder):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain_copy(source: Path, nbytes: int, to: Path) -> float:
    """Seconds to read all of `source` and write `nbytes` beside, onto the disk."""
    forget(source)
    total = sum(f.stat().st_size for f in files(source))
    begun, written, read = time.monotonic(), 0, 0
    with open(to, "wb") as out:
        for file in files(source):
            with open(file, "rb", buffering=0) as f:
                while data := f.read(BLOCK):
                    read += len(data)
                    size = min(len(data), nbytes * read // total - written) if nbytes <= total else len(data)
                    written += out.write(data[:size])
        out.flush()
        os.fsync(out.fileno())
    seconds = time.monotonic() - begun
    to.unlink()
    return seconds


def timed(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command in a process of its own, its bytes on the disk."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    assert process.returncode == 0, arguments
    return time.monotonic() - begun, usage.ru_maxrss * 1024


def digest(folder: Path) -> dict[str, str]:
    out = {}
    for file in files(folder):
        with open(file, "rb") as f:
            found = sha256()
            while data := f.read(BLOCK):
                found.update(data)
        out[str(file.relative_to(folder))] = found.hexdigest()
    return out


def written_by(process: subprocess.Popen) -> int:
    """Bytes that a process has asked to be written so far; 0 where it has gone."""
    try:
        return int(re.findall(r"wchar: (\d+)", Path(f"/proc/{process.pid}/io").read_text())[0])
    except (OSError, IndexError):
        return 0


def broken_off(arguments: list[str], to: Path, kills: int, nbytes: int, rng: random.Random) -> int:
    """Run a command that writes so many bytes to its end through so many kills; how many met it. What is there under
    the goal's name is taken as whole, and compared."""
    met = 0
    for _ in range(kills):
        until = rng.uniform(0, 1.5) * nbytes / kills
        process = subprocess.Popen([sys.executable, "-m", "launch.cli", *arguments], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None and written_by(process) < until:
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            met += 1
        if to.exists():
            break
    if not to.exists():
        timed(arguments)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--gb", type=float, default=12.0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--only", choices=("export", "import"), help="import: what an export has left there")
    parser.add_argument("--no-copy", action="store_true", help="no plain copy beside each, for the speed")
    args = parser.parse_args()
    place = Path(args.folder)
    run, out, back = place / "run", place / "hf", place / "imported"
    if not (run / "checkpoints" / "0" / "state" / "_METADATA").exists():
        shutil.rmtree(run, ignore_errors=True)
        write_checkpoint(run, model(args.gb))
    common = ["--max-memory", args.max_memory]
    export = ["export", str(run), "--to", str(out), *common]
    bring = ["import", str(out), "--to", str(back), *common]
    rng, facts = random.Random(0), {}
    for name, line, source, to in (("export", export, run, out), ("import", bring, out, back)):
        if args.only not in (None, name):
            continue
        ratios = []
        if not args.no_copy:
            plain_copy(source, 0, place / "copy")  # uncounted: a disk may be slow at what has not been read before
        for _ in range(args.repeats):
            shutil.rmtree(to, ignore_errors=True)
            forget(source)
            seconds, peak = timed(line)
            written = sum(f.stat().st_size for f in files(to))
            plain = 0.0 if args.no_copy else plain_copy(source, written, place / "copy")
            ratios.append(plain / seconds)
            read = sum(f.stat().st_size for f in files(source))
            facts[name] = dict(read_gb=read / 1e9, written_gb=written / 1e9, seconds=seconds, copy_seconds=plain,
                               ratios=ratios, peak_gb=peak / 1e9)  # fmt: skip
            print(name, json.dumps(facts[name]), flush=True)
        if args.kills:
            want = digest(to)  # of every file: the command is the same to the letter, so that its record is, too
            shutil.rmtree(to)
            met = broken_off(line, to, args.kills, written, rng)
            got = digest(to)
            facts[name] |= dict(kills=met, identical=got == want)
            print(name, json.dumps(facts[name]), flush=True)
            if got != want:
                other = sorted(file for file in want.keys() | got.keys() if want.get(file) != got.get(file))
                sys.exit(f"{name}: after {met} kills {', '.join(other)} differ from the unbroken run's")


if __name__ == "__main__":
    main()

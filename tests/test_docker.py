"""The container images: what a linter would say of their files, and their steps, run in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def steps(file: Path) -> list[tuple[str, str]]:
    """(instruction, what follows), comments left out and lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_linters_rules(file: Path):
    found = steps(file)
    bases = [rest for what, rest in found if what == "FROM"]
    assert len(bases) == 2 and all(
        re.match(r"\S+:[\w.-]*\d", base) and ":latest" not in base for base in bases
    )  # DL3006, DL3007
    assert all(rest.startswith("/") for what, rest in found if what == "WORKDIR")  # DL3000
    assert not any(
        re.search(r"\b(sudo|cd|apt-get upgrade)\b", rest) for what, rest in found if what == "RUN"
    )  # DL3003, DL3004
    assert all(
        "--no-cache-dir" in part
        for what, rest in found
        if what == "RUN"
        for part in rest.split("&&")
        if "pip install" in part
    )  # DL3042
    assert not any(what == "ADD" for what, _ in found)  # DL3020
    assert found[-1][0] == "CMD" and found[-1][1].startswith("[")  # DL3025
    assert [rest for what, rest in found if what == "USER"][-1] not in ("root", "0")  # DL3002
    copied = [w for what, rest in found if what == "COPY" and "--from" not in rest for w in rest.split()[:-1]]
    assert {"llama4_jax", "training", "data", "configs", "launch", "pyproject.toml", "constraints.txt"} <= {*copied}
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {*copied} <= kept


@pytest.mark.slow
def test_the_steps_of_an_image_make_one_that_runs(tmp_path: Path):
    """Of the one for CPUs, in a folder for a root; the Python that the tests run on stands for the base image's."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | {
        n: v for n, v in os.environ.items() if n.startswith("PIP_")
    }
    where = tmp_path
    for what, rest in steps(ROOT / "docker" / "cpu.Dockerfile"):
        if what == "ARG":
            name, _, value = rest.partition("=")
            env[name] = value
        elif what == "WORKDIR":
            where = tmp_path / rest.lstrip("/")
            where.mkdir(parents=True, exist_ok=True)
        elif what == "COPY" and "--from" not in rest:
            *names, to = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(
                        ROOT / name, where / to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(ROOT / name, where / to)
        elif what == "RUN" and not rest.startswith("useradd"):
            done = subprocess.run(["bash", "-c", rest], cwd=where, env=env, capture_output=True, text=True)
            assert done.returncode == 0, (rest, done.stderr[-2000:])
        elif what == "CMD":
            program = (
                tmp_path / "opt" / "llama4_jax" / ".venv" / "bin" / shlex.split(rest.strip("[]").replace(",", " "))[0]
            )
            done = subprocess.run([program, "train", "--help"], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0 and "pretrain:tiny" in done.stdout, done.stderr
            return
    raise AssertionError("no CMD")

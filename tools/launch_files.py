"""The files that `llama4 launch` renders of some jobs: golden ones for the tests, and those that docs/launch.md shows.

    python -m tools.launch_files

writes both anew. A job is a line of docs/launch.md itself: what the documentation says is what is rendered.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "launch.md"
GOLDEN = ROOT / "tests" / "golden" / "launch"
SHOWN = re.compile(r"```sh\n(llama4 launch .+?)\n```(.*?)<!-- rendered -->\n```\w*\n(.*?)```\n", re.DOTALL)
HERE = ["--program", "/shared/llama4_jax/.venv/bin/llama4", "--workdir", "/shared/llama4_jax"]
"""Of targets that run this machine's own files, in place of where this checkout happens to lie."""
OTHERS = {
    "slurm-cpu": "slurm pretrain:tiny --hosts 2 --processes 4 --out /shared/runs/tiny",
    "jobset-gpu": "jobset pretrain:tiny --topology h100:2x8 --train.batch 16 --out gs://bucket/runs/tiny "
    "--image registry/llama4:gpu --secret HF_TOKEN=tokens/hf --env NOTE='it costs $(ALL) of $$5' --spot",
    "jobset-slices": "jobset pretrain:tiny --topology v6e:4x4 --slices 2 --mesh.replica 2 --train.batch 32 "
    "--out gs://bucket/runs/tiny --image registry/llama4:tpu --queue research",
    "sky-tpu": "sky pretrain:tiny --topology v6e:4x4 --train.batch 16 --out gs://bucket/runs/tiny --spot",
    "ray-gpu": "ray pretrain:tiny --topology h100:2x8 --processes 8 --train.batch 16 --out gs://bucket/runs/tiny",
}
"""Jobs that the documentation does not show."""


def words(line: str) -> list[str]:
    """Of the command; where it would name this checkout, a place that is everybody's."""
    found = shlex.split(line)
    return ["launch", *found, *(HERE if found[0] in ("local", "slurm", "mpi") else [])]


def rendered(line: str) -> str:
    """What `llama4 launch` makes of a job, submitting nothing."""
    done = subprocess.run([sys.executable, "-m", "launch.cli", *words(line), "--json"], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        raise ValueError(f"llama4 launch {line}: {done.stderr}")
    return text_of(json.loads(done.stdout))


def text_of(made: dict[str, Any]) -> str:
    """As it is kept and shown."""
    after = [f"# {name}: {made[name]}" for name in ("watch", "stop", "resume")]
    return made["text"] + "\n".join([f"# submit: {shlex.join(made['submit'])}", *after]) + "\n"


def jobs() -> dict[str, str]:
    """Every job by the name of its golden file: those of the documentation by their targets."""
    lines = [found[0].replace("\\\n", " ").removeprefix("llama4 launch ") for found in SHOWN.findall(DOCS.read_text())]
    return {line.split()[0]: line for line in lines} | OTHERS


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    made = {name: rendered(line) for name, line in jobs().items()}
    for old in GOLDEN.iterdir():
        old.unlink()
    for name, text in made.items():
        (GOLDEN / f"{name}.txt").write_text(text)

    def shown(found: re.Match[str]) -> str:
        start, _, end = found[0].partition("<!-- rendered -->\n")
        fence = end.splitlines()[0]
        text = made[found[1].split()[2]]
        return f"{start}<!-- rendered -->\n{fence}\n{text}```\n"

    DOCS.write_text(SHOWN.sub(shown, DOCS.read_text()))
    print(f"{len(made)} files in {GOLDEN.relative_to(ROOT)}, and {DOCS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

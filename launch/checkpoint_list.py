"""`llama4 checkpoint list RUN`: the checkpoints of a run, and those that were set aside; nothing is verified."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    listed = checkpoints(args.run)
    if args.json:
        print(json.dumps(listed))
        return 0
    for one in listed["complete"]:
        print(f"step {one['step']:>8}  {one['bytes'] / 1e6:12,.1f} MB in {one['files']} files  {one['digest'][:16]}")
    for one in listed["incomplete"]:
        print(f"{one}: being written, or broken off")
    for one in listed["set_aside"]:
        print(f"{one['folder']}: set aside; {one['why']}")
    if not any(listed.values()):
        print(f"no checkpoints in {args.run}")
    return 0


def checkpoints(folder: str) -> dict[str, list[Any]]:
    """complete: step, bytes, files and digest of each; incomplete: folders; set_aside: folder and why."""
    from training import manifest
    from training.checkpoint import Checkpoints

    with Checkpoints(folder) as found:
        complete, incomplete = [], []
        for step in found.steps:
            try:
                files = manifest.read(found.path(step))
            except ValueError as error:
                incomplete.append(f"{found.path(step)} ({error})")
                continue
            size = sum(size for size, _ in files.values())
            complete.append(dict(step=step, bytes=size, files=len(files), digest=found.digest(step)))
        known = {str(step) for step in found.steps} | {"set-aside"}
        incomplete += [str(f) for f in sorted(found.folder.iterdir()) if f.name not in known and f.is_dir()]
        aside = found.folder / "set-aside"
        notes = sorted(aside.glob("*.txt")) if aside.exists() else ()
        listed = [dict(folder=str(f)[: -len(".txt")], why=f.read_text().strip()) for f in notes]
    return dict(complete=complete, incomplete=incomplete, set_aside=listed)

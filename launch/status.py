"""`llama4 status RUN`: how far a run is, from whatever machine sees its folder.

`--restart` is what a job's script asks once the job has ended: exit status 0 if it should be started again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--restart", action="store_true",
                        help="whether the job, which has ended, should be started again: 0 if so, else 1")  # fmt: skip
    parser.add_argument("--complete", action="store_true", help="whether it is complete: 0 if so, else 1")
    parser.add_argument("--since", type=float, default=0.0, metavar="SECONDS", help="with --restart: when it was "
                        "started, by date +%%s; what the folder says of earlier starts is not asked")  # fmt: skip
    parser.add_argument("--most", type=int, metavar="N", help="with --restart: at most so often, for schedulers that "
                        "do not count")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print all that is known as JSON")


def run(args: argparse.Namespace) -> int:
    from launch.place import job
    from training import status

    if args.restart:
        try:
            found = status.read(args.run)
        except FileNotFoundError:
            again, why = args.most is None, "it had not begun"
        else:
            again, why = status.restart(found, args.since, args.most, job())
        print(f"{args.run}: {'starting again' if again else 'not started again'}: {why}")
        return 0 if again else 1
    found = status.read(args.run)
    if args.complete:
        print(f"{args.run}: {found['state']}")
        return 0 if found["state"] == "complete" else 1
    print(json.dumps(found) if args.json else "\n".join(describe(found)))
    return 0


def describe(found: dict[str, Any]) -> Iterator[str]:
    """A line a fact."""
    last, steps = found["last"], found["steps"]
    share = f" of {steps:,} ({found['step'] / steps:.0%})" if steps else ""
    yield f"{found['folder']}: {found['state']}, step {found['step']:,}{share}{_why(found)}"
    if last:
        losses = [f"{name} {value:.4f}" for name, value in last.items() if name == "loss" or name.endswith("/loss")]
        rates = [f"{last['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in last else []
        rates += [f"MFU {last['mfu']:.1%}"] if "mfu" in last else []
        yield f"last record: {', '.join([*losses, *rates])}, {_ago(last.get('time'))}"
    if "seconds_per_step" in last and "seconds/save" in last:
        yield (f"a step takes {last['seconds_per_step']:.3g} s; saves have held steps up for "
               f"{last['seconds/save']:.3g} s since this start")  # fmt: skip
    if found["starts"]:
        start = found["starts"][-1]
        hosts = start.get("hosts") or []
        named = ", ".join(dict.fromkeys(hosts[:8])) + ", ..." * (len(hosts) > 8)
        count = len(found["starts"])
        yield (f"started {count} time{'s' * (count > 1)}, last {_ago(start['time'])} by {start.get('how')}: "
               f"{len(hosts)} process{'es' * (len(hosts) != 1)} on {named}")  # fmt: skip
    yield f"checkpoints: {', '.join(f'{step:,}' for step in found['saved']) or 'none'}"


def _why(found: dict[str, Any]) -> str:
    if found["state"] == "refused":
        return f"; {found['refused'].get('who')}: {found['refused'].get('error')}"
    if found["state"] == "stopped":
        return f", by {found['stopped'].get('signal')}; the same command goes on"
    if found["state"] == "silent":
        return "; nothing was heard of it for long: look at its log"
    return ""


def _ago(then: float | None) -> str:
    if not then:
        return "at an unknown time"
    seconds = time.time() - then
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{seconds:.0f} s ago"

"""Break runs in every way that is known to happen, and see what is lost: `python -m tools.chaos` (`make chaos`).

Each scenario draws its instants and places from the seed, and is a line or several of a table. `--only kill,corrupt`
runs some, `--share 0.1` a tenth of each. `--docs FILE` writes what a scenario showed into the file's table as soon as
it is done, in place of its lines there, so that scenarios may be run one by one. Exit status 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tools.chaos_run import Chaos, Row
from tools.chaos_scenarios import SCENARIOS

MARK = "<!-- chaos: results -->"
HEAD = ["| `--only` | what was done | times | held | | on |", "|---|---|---|---|---|---|"]


def run(name: str, chaos: Chaos) -> Iterator[Row]:
    """A scenario's rows; one that breaks down is a row, too."""
    try:
        yield from SCENARIOS[name](chaos)
    except (AssertionError, OSError, TimeoutError, ValueError, LookupError) as error:
        traceback.print_exc()
        yield Row(f"{name} broke down", 1, 0, f"{type(error).__name__}: {error}")
    finally:
        chaos.clear()


def lines(name: str, rows: list[Row], when: str) -> list[str]:
    """Of the table."""
    cells = [(f"`{name}`", row.scenario, row.injected, row.held, row.note, when) for row in rows]
    return ["| " + " | ".join(" ".join(str(x).replace("|", "/").split()) for x in cell) + " |" for cell in cells]


def merge(file: Path, name: str, new: list[str]) -> None:
    """Put a scenario's lines into a document, in place of those it has there; scenarios stay in their order."""
    before, _, rest = file.read_text().partition(MARK)
    old, _, after = rest.partition(MARK)
    found = [(m[1], line) for line in old.splitlines() if (m := re.match(r"\| `(\w+)` \|", line)) and m[1] != name]
    found += [(name, line) for line in new]
    found.sort(key=lambda pair: list(SCENARIOS).index(pair[0]))
    table = "\n".join([*HEAD, *(line for _, line in found)])
    file.write_text(f"{before}{MARK}\n{table}\n{MARK}{after}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"some of {', '.join(SCENARIOS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of how often each is done (1)")
    parser.add_argument("--docs", type=Path, help="a file with a table to write the results into")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(SCENARIOS)):
        parser.error(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    lost, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), args.seed, args.share)
        print(
            f"     the unbroken run took {time.monotonic() - began:.0f} s, a save {chaos.save_seconds:.2f}", flush=True
        )
        for name in names:
            since, rows = time.monotonic(), list[Row]()
            for row in run(name, chaos):
                rows.append(row)
                print(f"{'ok  ' if row.held == row.injected else 'LOST'} {row.scenario}: {row.held} of {row.injected}; "
                      f"{row.note}", flush=True)  # fmt: skip
            took = time.monotonic() - since
            print(f"     {name} took {took:.0f} s", flush=True)
            lost += sum(row.held != row.injected for row in rows)
            share = f", `--share {args.share:g}`" if args.share != 1 else ""
            if args.docs:
                merge(args.docs, name, lines(name, rows, f"{time.strftime('%Y-%m-%d')}, {took:.0f} s{share}"))
    print(f"{'something was lost' if lost else 'nothing was lost'}; {time.monotonic() - began:.0f} s in all")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())

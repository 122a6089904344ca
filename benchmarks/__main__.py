"""Run the benchmarks and print one table: `python -m benchmarks [PART ...]`, or `make bench`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import imports, norms, probes, steps, studies, workers
from benchmarks.table import Line, describe_machine, print_table, write_json
from bnbench.registry import BadInput, nearest

PARTS: dict[str, Callable[..., Iterator[Line]]] = {
    "steps": steps.measure,
    "studies": studies.measure,
    "workers": workers.measure,
    "probes": probes.measure,
    "norms": norms.measure,
    "imports": imports.measure,
}


def chosen(names: Sequence[str]) -> dict[str, Callable[..., Iterator[Line]]]:
    """The parts of these names, or all; raises BadInput where there is none of a name."""
    for name in names:
        if name not in PARTS:
            raise BadInput(f"no benchmark named {name!r}{nearest(name, PARTS)}")
    return {name: PARTS[name] for name in names or PARTS}


def run(
    parts: dict[str, Callable[..., Iterator[Line]]], console: Console, path: Path, rounds: int | None = None
) -> None:
    """Measure the parts, saying on stderr how far it is; print the table and write the file."""
    machine = describe_machine()
    options = {} if rounds is None else {"rounds": rounds}
    lines: list[Line] = []
    began = time.perf_counter()
    for name, measure in parts.items():
        print(f"{time.perf_counter() - began:6.0f} s  {name}", file=sys.stderr, flush=True)
        for line in measure(**options):
            lines.append(line)
            told = f"{line.name}: {line.median:.3g} {line.unit}"
            print(f"{time.perf_counter() - began:6.0f} s    {told}", file=sys.stderr, flush=True)
            # What has been measured is kept whatever comes after it.
            write_json(path, lines, machine)
    print_table(lines, machine, console)
    console.print(f"all times: {path}", highlight=False)


def main() -> int:
    """Run what the command line asks for; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure bnbench.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all by default"
    )
    parser.add_argument(
        "--rounds", type=int, help="rounds of every part, 1 for studies and 5 else by default"
    )
    parser.add_argument("--whole", action="store_true", help="let the plain script do all its trainings")
    parser.add_argument("--json", type=Path, default=Path("build") / "bench.json", help="the file to write")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    try:
        parts = chosen(arguments.parts)
        if arguments.whole and "studies" in parts:
            parts["studies"] = partial(studies.measure, stride=1)
        run(parts, console, arguments.json, arguments.rounds)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

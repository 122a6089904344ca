"""`bnbench selfcheck`: how often verdicts err, on random tables and on trainings whose answer is known."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as TextTable

from bnbench import placement
from bnbench.cli.recorded import existing_record
from bnbench.cli.run import Request, cell_line, run
from bnbench.engine.executors import LocalPool
from bnbench.engine.suite import judge_recorded, prepare
from bnbench.registry import BadInput
from bnbench.study.error_rates import PROMISES, Promise, Rate, measure_rates, pool_twice
from bnbench.study.load import load_study
from bnbench.study.verdicts import Verdict, to_json

STUDY = Path(__file__).parent / "same_arm_twice.py"
#: What the study must find of the effects that were planted in it.
PLANTED = {"planted": "SUPPORTED", "planted, denied": "REFUTED"}
_FEWEST_TABLES = 20


def check(
    tables: int,
    gpus: str,
    workers: int | None,
    runs: Path | None,
    data: Path,
    *,
    as_json: bool = False,
    promises: Sequence[Promise] = PROMISES,
    study: Path = STUDY,
) -> int:
    """Measure error rates, then train the same arm twice; 1 where one of them is not as it should be."""
    if tables < _FEWEST_TABLES:
        raise BadInput(f"--tables {tables} cannot show a rate; give {_FEWEST_TABLES} or more, as in 1000")
    console = Console(stderr=as_json, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140
    with contextlib.ExitStack() as stack:
        folder = runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        console.print(f"Judging {tables} random tables of each truth.", highlight=False)
        rates = _rates(promises, tables, workers)
        console.print(_rate_lines(rates))
        console.print("Training the same arm twice, and one that must be worse.", highlight=False)
        verdicts, faults = _train(study, folder, gpus, workers, data)
        for verdict in verdicts:
            console.print(cell_line(verdict), highlight=False)
    faults = [*map(_broken, (rate for rate in rates if not rate.is_kept)), *faults, *_wrong(verdicts)]
    for line in faults:
        console.print(f"[red]fault:[/] {line}", highlight=False)
    if not faults:
        console.print("No fault was found.")
    console.print(_CAVEAT, highlight=False)
    if as_json:
        said = {
            "rates": [{**dataclasses.asdict(rate), "border": rate.border} for rate in rates],
            "verdicts": [to_json(verdict) for verdict in verdicts],
            "faults": faults,
        }
        print(json.dumps(said, indent=1, ensure_ascii=False))
    return 1 if faults else 0


_CAVEAT = (
    "A sound judge finds a difference between an arm and itself in up to 5 % of such studies. The seeds are"
    " fixed, so that this one gives the same answer whenever it is asked on the same kind of machine."
)


def _rates(promises: Sequence[Promise], tables: int, workers: int | None) -> tuple[Rate, ...]:
    """The rates of all promises, each world in one worker, and the pooled one."""
    worlds = dict.fromkeys(promise.world for promise in promises)
    groups = [[p for p in promises if p.world == world] for world in worlds]
    with LocalPool(placement.plan_workers((), workers)) as pool:
        found = [rate for rates in pool.map(partial(measure_rates, tables=tables), groups) for rate in rates]
    return (*found, pool_twice(found))


def _rate_lines(rates: Sequence[Rate]) -> TextTable:
    table = TextTable(box=box.SIMPLE, pad_edge=False)
    for head in ("truth", "what is counted"):
        table.add_column(head, overflow="fold")
    for head in ("measured", "promised", "fault beyond"):
        table.add_column(head, justify="right")
    for rate in rates:
        table.add_row(
            rate.truth,
            rate.event,
            f"{rate.rate:.4f}",
            f"{rate.side} {rate.bound:g}",
            f"{rate.border:.4f}",
            style="" if rate.is_kept else "red",
        )
    return table


def _train(
    study: Path, runs: Path, gpus: str, workers: int | None, data: Path
) -> tuple[tuple[Verdict, ...], list[str]]:
    """The verdicts of the study of known answer, run as any other one, and what went wrong on the way."""
    request = Request(
        words=(str(study),),
        preset="quick",
        gpus=gpus,
        workers=workers,
        per_gpu=1,
        budget=None,
        runs=runs,
        data=data,
        offline=True,
        quiet=True,
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = run(request)
    with contextlib.closing(existing_record(runs)) as record:
        _, verdicts = judge_recorded(record, prepare(load_study(str(study)), "quick"), {})
    return verdicts, [f"the trainings failed: {' '.join(said.getvalue().split())}"] if code else []


def _broken(rate: Rate) -> str:
    return (
        f"{rate.truth}: {rate.event} in {rate.rate:.4f} of {rate.tables} tables, and {rate.side}"
        f" {rate.border:.4f} was to be seen"
    )


def _wrong(verdicts: Sequence[Verdict]) -> list[str]:
    """What the study says that is not so."""
    faults = []
    for verdict in verdicts:
        wanted = PLANTED.get(verdict.hypothesis)
        if wanted is not None:
            if verdict.decision != wanted:
                faults.append(f"what was planted was missed: {cell_line(verdict)}; {wanted} is right")
        elif verdict.low is None or verdict.high is None:
            faults.append(f"the same arm was not trained a second time: {cell_line(verdict)}")
        elif verdict.low > 0 or verdict.high < 0:
            faults.append(f"the same arm twice shows a difference: {cell_line(verdict)}")
    return faults

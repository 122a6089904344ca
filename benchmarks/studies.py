"""Whole studies, each in a fresh process with MLflow, Optuna's copy and the report, against the plain script.

The study has one cell, the arms "none" and "batch", a grid of seven learning rates that three replicates
choose from, and ten confirmed replicates, or twenty of an MLP, as the quick studies have. `plain_script.py`
trains the same networks on the same data, as many times for as many steps. The data sets are there before
anything is timed.

All trainings of the script take many minutes. By default it does a quarter of them, and the time that these
take, without what the script needs to start, is multiplied by four; with `--whole` it does them all.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rounds import Spent, Turns, as_times, run_program, speedups, usable_cores
from benchmarks.table import Line
from bnbench.data import default_folder, load_split
from bnbench.record import Record
from bnbench.study.design import TUNING_REPLICATES
from bnbench.study.programs import TUNING_SEEDS

SCRIPT = "the plain script"
#: The script does one in so many of its trainings.
STRIDE = 4
RATES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08)

STUDY = """
from functools import partial
from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

DESIGN = Design(
    base=Trial({row}, schedule="constant"),
    cells=(Cell("{name}"),),
    arms=(Arm("none", norm="none"), Arm("batch", norm="batch")),
    lr={rates},
    replicates={replicates},
    tuning="{tuning}",
)
STUDY = Study(
    name="{name}",
    question="What does batch normalization bring here?",
    baseline="none",
    hypotheses=(
        Hypothesis(
            name="B.a",
            claim="C1",
            sentence="Batch normalization raises the test accuracy.",
            estimand=partial(accuracy_difference, better="batch", other="none"),
            delta=1.0,
            better=("batch",),
            other=("none",),
            unit="pp",
        ),
    ),
    quick=DESIGN,
    full=DESIGN,
)
"""


@dataclass(frozen=True)
class Case:
    """A study and what the plain script is told to train the same.

    It is run with each of `fleets`; `least` is the goal of its speed with the first of them.
    """

    name: str
    net: str
    data: str
    steps: int
    options: dict[str, Any]
    least: float
    fleets: tuple[str, ...] = ("auto",)
    rates: tuple[float, ...] = RATES
    replicates: int = 10
    tuning: str = "once"

    def write(self, folder: Path) -> Path:
        """Write the study's file."""
        path = folder / f"{self.name}.py"
        row = f"data={self.data!r}, model={self.net!r}, model_options={self.options!r}, steps={self.steps}"
        path.write_text(
            STUDY.format(
                name=self.name,
                row=row,
                rates=self.rates,
                replicates=self.replicates,
                tuning=self.tuning,
            )
        )
        return path


CASES = (
    Case("mlp", "mlp", "mnist1d", 600, {}, 8.0, ("auto", "off"), replicates=20),
    Case("cnn", "cnn", "digits", 200, {"channels": 16}, 2.0),
)
#: A study of four or five trainings that each take longer than 10 s on one core.
LONG = Case("long", "mlp", "mnist1d", 20_000, {}, 0.0, ("off",), (0.02,), 1, "per_replicate")


@dataclass(frozen=True)
class Ran:
    """A whole run: what it spent, how many trainings that were, and where its processor time went."""

    spent: Spent
    trainings: int
    phases: dict[str, float]

    @property
    def each(self) -> Spent:
        """What a training spends, all told."""
        return self.spent / self.trainings

    def share(self, *phases: str) -> float:
        """The percentage of all processor time that some phases take."""
        return 100 * sum(self.phases.get(phase, 0.0) for phase in phases) / sum(self.phases.values())


def run_study(case: Case, fleet: str, workers: int) -> Ran:
    """Run the study with so many workers on as many cores."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        times, runs = folder / "times.json", folder / "runs"
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.conducted", times]
        command += ["run", case.write(folder), "--preset", "quick", "--gpus", "none", "--quiet"]
        command += ["--workers", str(workers), "--fleet", fleet, "--runs", runs]
        # Whatever the environment says, nothing is published elsewhere.
        command += ["--tracking-uri", f"sqlite:///{runs / 'mlflow.db'}"]
        spent, _ = run_program(command, usable_cores()[:workers])
        record = Record(runs / "bnbench.db")
        results = [result for _, result in record.rows()]
        record.close()
        odd = [f"{r.status} ({r.reason})" for r in results if r.status != "done"]
        if odd:
            raise RuntimeError(
                f"study {case.name}: a training ended as {odd[0]}, so the times compare nothing"
            )
        phases = json.loads(times.read_text())
        return Ran(Spent(spent.wall, sum(phases.values())), len(results), phases)


def run_script(case: Case, trainings: int, workers: int, stride: int = 1) -> Ran:
    """What the plain script spends on so many trainings, in so many processes on as many cores.

    It does one in `stride` of them; the others take as long as these.
    """
    tuned = 2 * TUNING_REPLICATES * len(case.rates)
    rates = case.rates[::stride]
    with tempfile.TemporaryDirectory() as folder:
        command: list[str | Path] = [sys.executable, Path(__file__).with_name("plain_script.py")]
        command += ["--net", case.net, "--data", case.data, "--steps", str(case.steps)]
        command += ["--lr", *map(str, rates), "--tests", str((trainings - tuned) // stride)]
        command += ["--jobs", str(workers), "--folder", folder]
        spent, said = run_program(command, usable_cores()[:workers])
    return Ran(spent * growth(spent.wall, said, trainings), trainings, {})


def growth(wall: float, said: str, trainings: int) -> float:
    """How much longer a run of the script takes that does so many trainings, from what it said of its own."""
    match = re.search(r"^(\d+) trainings in ([\d.]+) s$", said, re.MULTILINE)
    assert match is not None, said
    done, seconds = int(match[1]), float(match[2])
    return 1 + (trainings / done - 1) * seconds / wall


def make_data(case: Case) -> None:
    """Generate what the study reads, once and for all."""
    for start, count in ((0, case.replicates), (TUNING_SEEDS, TUNING_REPLICATES)):
        for seed in range(start, start + count):
            load_split(case.data, seed, folder=default_folder())


def lines_of(case: Case, workers: int, rounds: Sequence[dict[str, Ran]]) -> Iterator[Line]:
    """The lines of a study from what each way to run it took in each round."""
    turns: Turns = {name: [ran[name].each for ran in rounds] for name in rounds[0]}
    times: dict[str, Any] = {
        "trainings": [{name: r.trainings for name, r in ran.items()} for ran in rounds],
        "a training": as_times(turns),
    }
    cores = "one core" if workers == 1 else f"{workers} cores"
    for name in (name for name in turns if name != SCRIPT):
        wall, processor = speedups(turns, name, than=SCRIPT)
        least = case.least if name == case.fleets[0] else None
        yield Line(f"study {case.name} on {cores}, --fleet {name}", wall, processor, least, times=times)
    if workers == 1:
        yield from shares_of(case, [ran[case.fleets[0]] for ran in rounds], most=10.0)


def shares_of(case: Case, rans: Sequence[Ran], most: float) -> Iterator[Line]:
    """What is not training, as shares of the processor time."""
    times = {"phases": [ran.phases for ran in rans]}
    beside = tuple(ran.share("conducting", "publishing") for ran in rans)
    yield Line(f"study {case.name}: coordinator, record, tracking", beside, (), None, most, "%", times)
    rest = tuple(ran.share("start", "server", "report") for ran in rans)
    yield Line(f"study {case.name}: start and report", rest, unit="%")


def measure(
    cases: Sequence[Case] = CASES, long: Case | None = LONG, rounds: int = 1, stride: int = STRIDE
) -> Iterator[Line]:
    """Every study on one core and on two; the plain script runs as many trainings as the study did."""
    for case in cases:
        make_data(case)
        for workers in (1, 2) if len(usable_cores()) > 1 else (1,):
            found = []
            for _ in range(rounds):
                # What a second core brings to a study without fleets, the workers' own line says.
                fleets = case.fleets if workers == 1 else case.fleets[:1]
                ran = {fleet: run_study(case, fleet, workers) for fleet in fleets}
                ran[SCRIPT] = run_script(case, ran[case.fleets[0]].trainings, workers, stride)
                found.append(ran)
            yield from lines_of(case, workers, found)
    if long is not None:
        make_data(long)
        yield from shares_of(long, [run_study(long, long.fleets[0], 1)], most=1.0)

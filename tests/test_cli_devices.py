"""Studies whose rows need several devices: which of them a run takes, refuses, or leaves out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bnbench.cli.run import Request, _fitting
from bnbench.engine.suite import Job
from bnbench.registry import BadInput
from bnbench.study.load import load_studies
from bnbench.study.trial import Trial


def job(name: str, **changes: int) -> Job:
    return Job(load_studies()[name], "quick", name, (Trial(), Trial(**changes)))  # type: ignore[arg-type]


def fitting(gpus: int, *jobs: Job, words: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """The names of the studies that a run takes, and what it says of the others."""
    request = Request(words, "auto", "all", None, 1, None, Path("runs"), Path("data"))
    said = io.StringIO()
    taken = _fitting(list(jobs), gpus, request, Console(file=said, soft_wrap=True))
    return [one.study.name for one in taken], said.getvalue()


WIDE, PLAIN = ("batch_size", "convergence")


@pytest.mark.parametrize(("gpus", "devices"), [(0, 1), (0, 8), (1, 1), (2, 2), (8, 2)])
def test_what_fits_is_taken_in_silence(gpus: int, devices: int) -> None:
    assert fitting(gpus, job(WIDE, devices=devices), words=(WIDE,)) == ([WIDE], "")


@pytest.mark.parametrize(("gpus", "there"), [(1, "there is 1;"), (3, "there are 3;")])
def test_a_study_that_was_named_and_needs_more_gpus_is_refused_in_one_line(gpus: int, there: str) -> None:
    with pytest.raises(BadInput, match=rf"'{WIDE}' \(quick\).*4 GPUs.*{there}.*--gpus none") as caught:
        fitting(gpus, job(PLAIN), job(WIDE, devices=4), words=(PLAIN, WIDE))
    assert "\n" not in str(caught.value)


def test_where_no_study_was_named_it_is_left_out_with_a_note() -> None:
    taken, said = fitting(1, job(WIDE, devices=2), job(PLAIN))
    assert taken == [PLAIN]
    assert said.startswith(f"note: left out: study '{WIDE}' (quick)") and said.count("\n") == 1


@pytest.mark.parametrize("gpus", [0, 8])
def test_rows_over_several_machines_are_not_for_this_command(gpus: int) -> None:
    with pytest.raises(BadInput, match=r"2 machines.*torchrun or srun: bnbench train trial\.json"):
        fitting(gpus, job(WIDE, num_nodes=2), words=(WIDE,))

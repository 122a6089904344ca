"""A study that a test can run in seconds: real rows, real verdicts, nothing to learn from them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from bnbench.cli import app

TINY = '''"""A tiny study."""

from functools import partial

from bnbench.study import Arm, Cell, Design, Hypothesis, Study, Trial
from bnbench.study.estimands import accuracy_difference

DESIGN = Design(
    base=Trial(data="digits", model="mlp", model_options={"depth": 2, "width": 32}, schedule="constant"),
    cells=(Cell("short", steps=20), Cell("long", steps=60)),
    arms=(Arm("none", norm="none"), Arm("batch", norm="batch", dropout=0.1)),
    lr=(0.01, 0.1, 1.0),
    replicates=5,
    curve_points=4,
)

STUDY = Study(
    name="tiny",
    question="Does the machinery work?",
    baseline="none",
    hypotheses=(
        Hypothesis(
            name="T.a",
            claim="C1",
            sentence="Batch normalization is more accurate after a few steps.",
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
'''


def write_tiny(folder: Path, **replaced: str) -> Path:
    """Write the study's file, with some pieces of its text replaced."""
    text = TINY
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "tiny.py"
    path.write_text(text)
    return path


def start(*arguments: str | Path, folder: Path, data: Path, **more: Any) -> subprocess.Popen[str]:
    """Start `bnbench` in a folder and a process group of its own."""
    environment = {**os.environ, "BNBENCH_DATA": str(data), "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", "bnbench.cli", *map(str, arguments)],
        cwd=folder,
        env=environment,
        text=True,
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )


def call(*arguments: str | Path, folder: Path, data: Path, expect: int = 0) -> tuple[str, str]:
    """Run `bnbench` to its end; returns what it printed on both streams."""
    process = start(*arguments, folder=folder, data=data)
    out, err = process.communicate(timeout=240)
    assert process.returncode == expect, f"exit {process.returncode}, not {expect}\n{out}\n{err}"
    return out, err


def call_here(*arguments: str | Path, folder: Path, data: Path, expect: int = 0) -> tuple[str, str]:
    """As :func:`call`, in this process, which has long loaded what a new one would load for seconds."""
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("BNBENCH_DATA", str(data))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        code = app.call([str(word) for word in arguments])
    said = out.getvalue(), err.getvalue()
    assert code == expect, f"exit {code}, not {expect}\n{said[0]}\n{said[1]}"
    return said


def verdicts_of(runs: Path) -> bytes:
    """The bytes of verdicts.json."""
    return (runs / "report" / "verdicts.json").read_bytes()


def statuses(runs: Path) -> dict[str, int]:
    """How many recorded rows there are, by status."""
    import sqlite3

    with sqlite3.connect(runs / "bnbench.db") as db:
        return dict(db.execute("SELECT status, count(*) FROM rows GROUP BY status").fetchall())


def keys_of(runs: Path) -> set[str]:
    """The keys of all recorded rows."""
    import sqlite3

    with sqlite3.connect(runs / "bnbench.db") as db:
        return {key for (key,) in db.execute("SELECT key FROM rows")}


def children_of(pid: int) -> list[int]:
    """All living descendants of a process, the deepest last."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *children_of(child)]
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def metrics_of(runs: Path) -> dict[str, Any]:
    """The measured metrics of every row by key: all but times and memory."""
    import sqlite3

    with sqlite3.connect(runs / "bnbench.db") as db:
        rows = db.execute("SELECT key, metrics, curve FROM rows").fetchall()
    return {
        key: (
            {k: v for k, v in json.loads(metrics).items() if not k.startswith(("time/", "memory/"))},
            json.loads(curve),
        )
        for key, metrics, curve in rows
    }

"""Progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from bnbench.engine.cost import Costs, occupied_seconds, seconds_of
from bnbench.study.table import Result
from bnbench.study.trial import Trial

_EVERY = 15.0  # seconds between plain lines


def duration(seconds: float) -> str:
    """A duration for people: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_note(console: Console, text: object) -> None:
    """Something that a person should know, in one line; brackets in it are no markup."""
    console.print(f"[yellow]note:[/] {escape(str(text))}", highlight=False)


class Display:
    """Counts what is done, reused, running and failed, and says how much time is left.

    The time left rests on the expected seconds of the rows that are still missing, corrected by how the
    finished ones compared with theirs. Rows whose learning rate is not known yet are expected by number.
    """

    def __init__(
        self, console: Console, rows: Sequence[Trial], costs: Costs, width: int, quiet: bool
    ) -> None:
        self.console, self.costs, self.width, self.quiet = console, costs, width, quiet
        self.total = len(rows)
        self.expected = sum(occupied_seconds(trial, costs, width) for trial in rows)
        self.done = self.reused_rows = self.failed = self.diverged = self.running = 0
        self.passed = self.spent = self.spent_expected = 0.0
        self._seen: set[str] = set()
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                BarColumn(), TextColumn("{task.fields[text]}"), console=console, transient=True
            )
            self._task = self._bar.add_task("", total=max(self.expected, 1e-9), text="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def reused(self, trial: Trial) -> None:
        """A row was in the record."""
        if trial.key not in self._seen:
            self._seen.add(trial.key)
            self.reused_rows += 1
            self.passed += occupied_seconds(trial, self.costs, self.width)
            self._show()

    def started(self, trial: Trial) -> None:
        """A row goes to a worker."""
        self.running += 1
        self._show()

    def finished(self, trial: Trial, result: Result) -> None:
        """A row has a result."""
        self._seen.add(trial.key)
        self.running -= 1
        self.done += 1
        self.failed += result.status == "failed"
        self.diverged += result.status == "diverged"
        self.passed += occupied_seconds(trial, self.costs, self.width)
        if result.status == "done":
            self.spent += result.metrics["time/total_s"]
            self.spent_expected += seconds_of(trial, self.costs)
        if result.status == "failed":
            self.trouble(f"row {trial.key} failed: {result.brief}")
        # The next row is about to start, and a line would count one running too few.
        self._show(line=False)

    def trouble(self, line: str) -> None:
        """Something that a person should know; the work goes on."""
        print_note(self.console, line)

    @property
    def seconds_left(self) -> float:
        """Expected seconds until all rows are there."""
        correction = self.spent / self.spent_expected if self.spent_expected > 5 else 1.0
        return max(0.0, self.expected - self.passed) * correction / self.width

    def text(self) -> str:
        """The state in one line."""
        parts = [f"{self.done + self.reused_rows} of about {self.total} rows"]
        if self.reused_rows:
            parts.append(f"{self.reused_rows} reused")
        parts.append(f"{self.running} running")
        if self.diverged:
            parts.append(f"{self.diverged} diverged")
        parts.append(f"{self.failed} failed")
        parts.append(f"{duration(self.seconds_left)} left")
        return " · ".join(parts)

    def _show(self, *, line: bool = True) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.passed, text=self.text())
        elif line and time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            self.console.print(self.text(), highlight=False)

"""Should I use batch normalization here? The best norm wherever a study compared norms and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bnbench.report.recipes import Mean, mean_of, mean_words
from bnbench.report.result import Report, StudyResult, as_words
from bnbench.report.summaries import score
from bnbench.study.claims import FEWEST_REPLICATES
from bnbench.study.design import Arm, Cell
from bnbench.study.trial import Trial

Answer = Literal["yes", "no", "no clear winner", "too few replicates"]

#: What makes a norm, or stands in place of one: rows that differ in these alone, and in what is tuned, are
#: compared. So does an option of residual networks, `residual`, among those of the model.
_NORM = ("norm", "norm_options", "reparam", "adaptive_clip")
_RESIDUAL = "residual"
#: Fields of their own columns.
_SHOWN = ("model", "model_options", "data", "batch_size", "devices", "num_nodes")
#: Told only where two lines would else look alike.
_BUDGET = ("steps", "schedule", "warmup", "momentum", "clip_norm", "precision", "backend", "data_options")
_NOT_COMPARED: Mapping[str, Any] = {
    "norm": "none", "norm_options": {}, "reparam": None, "adaptive_clip": None, "lr": 0.1, "seed": 0,
    "data_seed": 0, "score_on": "val", "curve_points": 0,
}  # fmt: skip
#: So many norms are named that cannot be told from the best.
MOST_NAMED = 6


@dataclass(frozen=True)
class Advice:
    """One line of the table: the norms that were compared in one setting, by test accuracy.

    `accuracies` are in percent over the `n` replicates that all norms have, the best first. Leads are paired
    and in percentage points: `lead` is the best norm's over the second, `over_batch` its over plain batch
    normalization (None where that is the best). `level` are the norms whose paired interval to the best one
    holds 0, the best first.
    """

    study: str
    preset: str
    cell: str
    batch_size: str
    network: str
    data: str
    setting: str
    n: int
    accuracies: Mapping[str, Mean]
    diverged: Mapping[str, int]
    lead: Mean
    over_batch: Mean | None
    level: tuple[str, ...]
    answer: Answer

    @property
    def best(self) -> str:
        """The norm with the highest mean accuracy."""
        return next(iter(self.accuracies))


def advise(report: Report) -> tuple[Advice, ...]:
    """Every setting in which confirmed trainings compare batch normalization with another norm.

    Only arms of one cell that differ in nothing but the norm are compared, tuned alike: over the grid, or by
    a search of the learning rate alone. A line that is part of another one, from the same rows, is left out.
    Nothing here was registered: the lines are exploratory, and the best of several norms is flattered.
    """
    lines = [
        (row, line)
        for result in report.results
        if result.study.program == "search" and not result.design.smoke
        for cell in result.design.cells
        for row, line in _compare(result, cell)
    ]
    kept = [
        (row, line)
        for i, (row, line) in enumerate(lines)
        if not any(
            row.key == other.key and _contains(more, line, earlier=j < i)
            for j, (other, more) in enumerate(lines)
            if j != i
        )
    ]
    told = [replace(line, setting=_told_apart(row, line, kept)) for row, line in kept]
    return tuple(sorted(told, key=lambda a: (a.network, a.data, a.setting, _number(a.batch_size))))


def _contains(one: Advice, other: Advice, *, earlier: bool) -> bool:
    """Whether a line says all that another one says, with the same numbers: both read the same rows."""
    if one.accuracies == other.accuracies:
        return earlier
    return other.accuracies.items() <= one.accuracies.items()


def _compare(result: StudyResult, cell: Cell) -> list[tuple[Trial, Advice]]:
    groups: dict[tuple[str, str], list[tuple[Arm, Trial]]] = {}
    for arm in result.design.arms_in(cell.name):
        space = arm.space_in(cell.name)
        if all(dimension.name == "lr" for dimension in space):
            row = result.design.trial(cell, arm, 0)
            groups.setdefault((_around(row).key, repr(space)), []).append((arm, row))
    found = []
    for group in groups.values():
        line = _line(result, cell, group)
        if line is not None:
            found.append((_around(group[0][1]), line))
    return found


def _around(row: Trial) -> Trial:
    """The setting of a row: all but the norm and what is tuned."""
    options = {name: value for name, value in row.model_options.items() if name != _RESIDUAL}
    return row.replace(**_NOT_COMPARED, model_options=options)


def _line(result: StudyResult, cell: Cell, group: Sequence[tuple[Arm, Trial]]) -> Advice | None:
    if any(norm_words(row) == "batch" for _, row in group):
        # Its variants, such as a fixed scale, are questions of other studies.
        group = [(arm, row) for arm, row in group if row.norm != "batch" or norm_words(row) == "batch"]
    if len({row.norm for _, row in group}) < 2:
        return None
    scores: dict[str, dict[int, float]] = {}
    diverged: dict[str, int] = {}
    plain = ""
    for arm, row in group:
        entries = result.table.of(cell=cell.name, arm=arm.name, roles=("own",))
        there = {e.replicate: 100 * v for e in entries if (v := score(e, "test/acc")) is not None}
        name = norm_words(row)
        if there and name not in scores:
            scores[name] = there
            diverged[name] = sum(e.result.status == "diverged" for e in entries)
            plain = name if row.norm == "batch" else plain
    together = sorted(set.intersection(*(set(there) for there in scores.values()))) if scores else []
    if len(scores) < 2 or not plain or not together:
        return None

    def lead(one: str, other: str) -> Mean:
        found = mean_of([scores[one][r] - scores[other][r] for r in together])
        assert found is not None
        return found

    means = {name: mean_of([there[r] for r in together]) for name, there in scores.items()}
    ranked = {n: m for n, m in sorted(means.items(), key=lambda p: -(p[1].value if p[1] else 0.0)) if m}
    best, second, *_ = ranked
    over_batch = None if best == plain else lead(best, plain)
    row = _around(group[0][1])
    return Advice(
        study=result.study.name,
        preset=result.preset,
        cell=cell.name,
        batch_size=f"{row.batch_size} × {row.world_size}" if row.world_size > 1 else str(row.batch_size),
        network=" ".join(filter(None, (row.model, as_words(row.model_options)))),
        data=row.data,
        setting=", ".join(
            filter(
                None,
                (
                    _words(row, [name for name in row.changed() if name not in (*_BUDGET, *_SHOWN)]),
                    "learning rate searched" if group[0][0].space_in(cell.name) else "",
                ),
            )
        ),
        n=len(together),
        accuracies=ranked,
        diverged={name: count for name, count in diverged.items() if count},
        lead=lead(best, second),
        over_batch=over_batch,
        level=(best, *(name for name in ranked if name != best and not _clear(lead(best, name)))),
        answer=_answer(len(together), over_batch, lead(best, second)),
    )


def _clear(lead: Mean) -> bool:
    return lead.low is not None and lead.low > 0


def _answer(n: int, over_batch: Mean | None, lead: Mean) -> Answer:
    if n < FEWEST_REPLICATES:
        return "too few replicates"
    if over_batch is None:
        return "yes" if _clear(lead) else "no clear winner"
    return "no" if _clear(over_batch) else "no clear winner"


def norm_words(row: Trial) -> str:
    """The norm of a row for people: `ghost_batch ghost_size=16`, `group + weight_standardization`."""
    name = " ".join(filter(None, (row.norm, as_words(row.norm_options))))
    clipped = f"adaptive_clip={row.adaptive_clip:g}" if row.adaptive_clip is not None else None
    return " + ".join(filter(None, (name, row.reparam, row.model_options.get(_RESIDUAL), clipped)))


def _words(row: Trial, names: Sequence[str]) -> str:
    left_out = (*_NOT_COMPARED, *_NORM)
    values = row.as_dict()
    return ", ".join(f"{name}={as_words(values[name])}" for name in names if name not in left_out)


def _told_apart(row: Trial, line: Advice, lines: Sequence[tuple[Trial, Advice]]) -> str:
    """The line's setting, with those parts of the budget in which lines that look alike differ."""

    def look(a: Advice) -> tuple[str, ...]:
        return a.batch_size, a.network, a.data, a.setting

    others = [other.as_dict() for other, more in lines if look(more) == look(line)]
    varied = [name for name in _BUDGET if any(other[name] != row.as_dict()[name] for other in others)]
    return ", ".join(filter(None, (line.setting, _words(row, varied))))


def _number(batch_size: str) -> tuple[int, str]:
    return int(batch_size.split()[0]), batch_size


ADVICE_HEADS = (
    *("network", "data", "batch size", "n", "best norm", "test accuracy, %", "lead over the second, pp"),
    *("lead over batch, pp", "batch normalization?", "study"),
)


def advice_rows(report: Report) -> list[list[str]]:
    """The table as texts under `ADVICE_HEADS`; intervals hold 95 %, each by itself."""
    rows = []
    for a in advise(report):
        second = list(a.accuracies)[1]
        rows.append([
            a.network,
            f"{a.data}, {a.setting}" if a.setting else a.data,
            a.batch_size,
            str(a.n),
            a.best,
            mean_words(a.accuracies[a.best]),
            f"{mean_words(a.lead, sign=True)} ({second})",
            "–" if a.over_batch is None else mean_words(a.over_batch, sign=True),
            _in_words(a),
            a.study if a.preset == "quick" else f"{a.study} ({a.preset})",
        ])  # fmt: skip
    return rows


def _in_words(a: Advice) -> str:
    """`yes: batch`, `no: layer or group`, `no clear winner: batch, layer`."""
    lost = "".join(f"; {count} of “{name}” diverged" for name, count in a.diverged.items())
    if a.answer == "too few replicates":
        return a.answer + lost
    many = len(a.level) > MOST_NAMED
    named = [*a.level[: MOST_NAMED - 1], f"{len(a.level) - MOST_NAMED + 1} more"] if many else a.level
    joined = (", " if a.answer == "no clear winner" else " or ").join(named)
    return f"{a.answer}: {joined}{lost}"

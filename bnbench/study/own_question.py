"""A study's design with other data, another model or norm: a study of its own, all of it exploratory."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bnbench.registry import BadInput
from bnbench.study.design import Arm, Cell, Design
from bnbench.study.question import LONGEST_NAME, Question, word_for
from bnbench.study.reading import TARGET, constants_read
from bnbench.study.space import Choice, Space, fields_of
from bnbench.study.spec import Hypothesis, Study
from bnbench.study.trial import Trial

#: What tells cells apart only because their data or models differ, beside these themselves.
_FITTED = ("steps", "until_train_nll")


def ask(
    study: Study,
    question: Question,
    preset: str,
    *,
    check: Callable[[Trial], None],
    ignored: Collection[str] = (),
) -> tuple[Study, tuple[str, ...]]:
    """Ask a question in the design of one preset: the study, which has no other, and notes for people.

    With other data there is one cell for each model, with another model one for each data set. It is
    otherwise as that of those for which it stands of which most hypotheses speak, primary ones first; else as
    one that has this model and data anyway, else as the first. What `check` refuses is left out, and with it
    each hypothesis that reads it; so is what sets one of the `ignored` fields, which the model does not read,
    and what became the same as another arm. No hypothesis is primary. Raises BadInput where nothing is left,
    and where a target is needed that was not given.
    """
    design = study.design("full" if preset == "smoke" else preset)
    _refuse_compared(study, design, question)
    asked = _Asked(study, design, question, check, frozenset(ignored))
    return asked.study(), tuple(asked.notes)


class _Asked:
    """One design on its way to another one; `notes` say what was left out."""

    def __init__(
        self,
        study: Study,
        design: Design,
        question: Question,
        check: Callable[[Trial], None],
        ignored: frozenset[str],
    ) -> None:
        self.old, self.design, self.question = study, design, question
        self.check, self.ignored = check, ignored
        self.notes: list[str] = []
        self.faults: dict[tuple[str, str], list[str]] = {}
        self.base = self._base()
        self.origins = self._cells()
        self.names = self._arm_names()

    def _base(self) -> Trial:
        base, asked = self.design.base, self.question
        new: dict[str, Any] = {}
        if asked.data is not None:
            new |= {"data": asked.data, "data_options": {}}
        if asked.model is not None:
            new |= {"model": asked.model, "model_options": {}}
        if asked.norm is not None and base.norm == "batch":
            new["norm"] = asked.norm
        new |= asked.changes
        if asked.data is not None:
            new["data_options"] = {**new["data_options"], **asked.data_options}
        if lost := [name for name in base.changed() if name in self.ignored and name not in new]:
            self.notes.append(f"{asked.model} does not read {', '.join(lost)}")
            new |= {name: Trial().as_dict()[name] for name in lost}
        return base.replace(**new)

    def _cells(self) -> list[tuple[Cell, Cell]]:
        """The new cells, each with the one that it comes from."""
        asked = self.question
        replaced = set(asked.changes)
        replaced |= {"data", "data_options"} if asked.data is not None else set()
        replaced |= {"model", "model_options"} if asked.model is not None else set()
        fitted = replaced | {*_FITTED, *(["augment"] if asked.model is not None else [])}
        groups: dict[str, list[tuple[Cell, Cell]]] = {}
        for cell in self.design.cells:
            if lost := self._ignored_in(cell.changes):
                self.notes.append(f"left out: cell {cell.name!r}, since {asked.model} does not read {lost}")
                continue
            row = self.design.base.replace(**cell.changes)
            kind = {name: value for name, value in row.as_dict().items() if name not in fitted}
            key = json.dumps([kind, row.until_train_nll is None]) if asked.moves else cell.name
            changes = {name: value for name, value in cell.changes.items() if name not in replaced}
            new = Cell(
                self._cell_name(cell, row),
                constants=self._constants(cell),
                replicates=asked.replicates or cell.replicates,
                **self._with_norm(changes),
            )
            groups.setdefault(key, []).append((new, cell))
        pairs: list[tuple[Cell, Cell]] = []
        for group in groups.values():
            new, cell = max(group, key=lambda pair: self._suits(*pair)) if len(group) > 1 else group[0]
            twin = next((old for other, old in pairs if other.name == new.name), None)
            if twin is not None:
                row, other = (self.design.base.replace(**old.changes) for old in (cell, twin))
                name = _told_apart(new.name, row, other, fitted)
                new = Cell(name, constants=new.constants, replicates=new.replicates, **new.changes)
            pairs.append((new, cell))
        if origins := [f"{new.name} as {old.name}" for new, old in pairs if new.name != old.name]:
            self.notes.append(f"cells, with steps and all else of the study's own: {'; '.join(origins)}")
        return pairs

    def _suits(self, new: Cell, old: Cell) -> tuple[int, int, bool]:
        """How well a cell stands for others: what it answers, then whether it has what is asked anyway."""
        row, asked = self.design.base.replace(**old.changes), self.question
        same = asked.model in (None, row.model) and asked.data in (None, row.data)
        can = {arm.name for arm in self.design.arms_in(old.name) if self._trains(arm, new)}
        there = [h for h in self.old.hypotheses if h.cells is None or old.name in h.cells]
        told = [h for h in there if self._reads(h) <= can]
        return sum(h.primary for h in told), len(told), same

    def _trains(self, arm: Arm, new: Cell) -> bool:
        try:
            self.check(self.base.replace(**{**new.changes, **self._arm_changes(arm)}))
        except BadInput:
            return False
        return not self._ignored_in(arm.changes)

    def _reads(self, h: Hypothesis) -> set[str]:
        """The arms that a hypothesis reads."""
        return {*h.better, *h.other, *_names_in(h.estimand, {arm.name for arm in self.design.arms})}

    def _cell_name(self, cell: Cell, row: Trial) -> str:
        """The cell's name with the new model and data in place of its own, where it names them."""
        model, found, more = cell.name.partition(f"-{row.data}")
        if not found or not self.question.moves:
            return cell.name
        model = word_for(self.question.model) if self.question.model else model
        return _shortened(f"{model}-{self.question.data_label or row.data}{more}")

    def _constants(self, cell: Cell) -> dict[str, float]:
        constants = dict(cell.constants)
        if TARGET in constants and self.question.target is not None:
            constants[TARGET] = self.question.target
        elif self.question.moves:
            constants.pop(TARGET, None)
        return constants

    def _with_norm(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        swapped = self.question.norm is not None and changes.get("norm") == "batch"
        return {**changes, "norm": self.question.norm} if swapped else dict(changes)

    def _ignored_in(self, changes: Mapping[str, Any]) -> str:
        default = Trial().as_dict()
        return ", ".join(n for n, value in changes.items() if n in self.ignored and value != default[n])

    def _arm_names(self) -> dict[str, str]:
        """New names by the old ones: an arm whose norm is replaced is not called "batch" any longer."""
        names = {arm.name: arm.name for arm in self.design.arms}
        for arm in self.design.arms if self.question.norm is not None else ():
            if arm.changes.get("norm", self.design.base.norm) == "batch":
                name = re.sub(r"\bbatch\b", word_for(self.question.norm or ""), arm.name)
                names[arm.name] = name if name not in names.values() else arm.name
        return names

    def _arm_changes(self, arm: Arm) -> dict[str, Any]:
        changes = self._with_norm(arm.changes)
        if "model_options" in changes:
            # They are what is compared; what was given for every row stays beside them.
            changes["model_options"] = {
                **self.question.changes.get("model_options", {}), **changes["model_options"]
            }  # fmt: skip
        return changes

    def _arms(self) -> dict[str, dict[str, Space]]:
        """The cells of every arm that is left, with what it searches there, by the old names of arms."""
        arms: dict[str, dict[str, Space]] = {}
        first = sorted(self.design.arms, key=lambda arm: arm.name != self.old.baseline)
        for new, old in self.origins:
            seen: dict[tuple[Trial, str], Arm] = {}
            there = [arm.name for arm in self.design.arms_in(old.name)]
            for arm in (arm for arm in first if arm.name in there):
                row, space = self._fitting(arm, new, old)
                if row is None:
                    continue
                twin = seen.setdefault((_in_effect(row), repr(space)), arm)
                if twin is not arm and self._row(twin, old) != self._row(arm, old):
                    self._left_out(arm, new, f"it trains as {self.names[twin.name]!r} does")
                else:
                    arms.setdefault(arm.name, {})[new.name] = space
        together: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (name, why), cells in self.faults.items():
            together.setdefault((why, tuple(cells) if name in arms else ()), []).append(name)
        for (why, places), names in together.items():
            where = f" of {', '.join(places)}" if places else ""
            self.notes.append(f"left out{where}: {_listed('arm', names)}, since {why}")
        return arms

    def _row(self, arm: Arm, cell: Cell) -> tuple[Trial, str]:
        return self.design.base.replace(**{**cell.changes, **arm.changes}), repr(arm.space_in(cell.name))

    def _left_out(self, arm: Arm, cell: Cell, why: str) -> None:
        self.faults.setdefault((arm.name, why), []).append(cell.name)

    def _fitting(self, arm: Arm, new: Cell, old: Cell) -> tuple[Trial | None, Space]:
        """The arm's row in a cell with what it searches, or None where the row cannot be."""
        if lost := self._ignored_in(arm.changes):
            self._left_out(arm, new, f"{self.question.model} does not read {lost}")
            return None, ()
        try:
            row = self.base.replace(**{**new.changes, **self._arm_changes(arm)})
            self.check(row)
        except BadInput as error:
            self._left_out(arm, new, str(error))
            return None, ()
        return row, self._searched(arm, new, old, row)

    def _searched(self, arm: Arm, new: Cell, old: Cell, row: Trial) -> Space:
        """What is left of an arm's space: dimensions that the model reads, and levels that can be."""
        left: list[Any] = []
        searches = f"{new.name}: arm {arm.name!r} searches"
        for dimension in arm.space_in(old.name):
            if lost := [name for name in fields_of(dimension) if name in self.ignored]:
                why = f"{self.question.model} does not read {', '.join(lost)}"
                self.notes.append(f"{searches} no {dimension.name}: {why}")
            elif isinstance(dimension, Choice):
                levels = {k: v for k, v in dimension.levels.items() if self._can_be(row, v)}
                left += [Choice(dimension.name, levels)] if levels else []
                if lost := [label for label in dimension.levels if label not in levels]:
                    self.notes.append(f"{searches} {dimension.name} without {', '.join(lost)}")
            else:
                left.append(dimension)
        return tuple(left)

    def _can_be(self, row: Trial, changes: Mapping[str, Any]) -> bool:
        options = {n: {**getattr(row, n), **v} for n, v in changes.items() if isinstance(v, Mapping)}
        try:
            self.check(row.replace(**{**changes, **options}))
        except BadInput:
            return False
        return True

    def study(self) -> Study:
        """The new study."""
        old, design, asked = self.old, self.design, self.question
        arms = self._arms()
        kept = [(new, cell) for new, cell in self.origins if new.name in arms.get(old.baseline, {})]
        for new, _ in self.origins:
            if all(new is not other for other, _ in kept):
                self.notes.append(f"left out: cell {new.name!r}, since its baseline {old.baseline!r} is")
        cells = {new.name for new, _ in kept}
        arms = {name: {c: s for c, s in there.items() if c in cells} for name, there in arms.items()}
        found = {h.name: self._hypothesis(h, arms, kept) for h in old.hypotheses}
        hypotheses = [h for h in found.values() if h is not None]
        here = [
            h.name for h in old.hypotheses if any(h.cells is None or c.name in h.cells for c in design.cells)
        ]
        if lost := [name for name in here if found[name] is None]:
            self.notes.append(f"left out: {_listed('hypothesis', lost)}, for want of arms or cells")
        if not hypotheses:
            raise BadInput(f"study {old.name!r} has nothing left to compare {asked.words}: {self._why()}")
        trials = design.trials
        if isinstance(trials, Mapping):
            trials = {new.name: trials[cell.name] for new, cell in kept if cell.name in trials}
        new_design = replace(
            design,
            base=self.base,
            cells=tuple(new for new, _ in kept),
            arms=tuple(
                Arm(
                    self.names[arm.name],
                    space={cell: space for cell, space in there.items() if space},
                    cells=() if len(there) == len(cells) else tuple(there),
                    **self._arm_changes(arm),
                )
                for arm in design.arms
                if (there := arms.get(arm.name))
            ),
            trials=trials,
            replicates=asked.replicates or design.replicates,
        )
        if asked.moves and asked.target is None:
            self._require_no_target(hypotheses, new_design)
        return Study(
            name=asked.name_for(old.name),
            question=f"{old.question} (A question of one's own: {asked.words}.)",
            hypotheses=tuple(hypotheses),
            quick=new_design,
            full=new_design,
            baseline=self.names[old.baseline],
            program=old.program,
            ranked=old.ranked,
        )

    def _why(self) -> str:
        """Why nothing is left: what befell the baseline, else the first arm that was left out."""
        whys = [why for (name, why) in self.faults if name == self.old.baseline]
        return next(
            (text for text in (*whys, *self.notes) if text in whys or text.startswith("left out")), ""
        )

    def _hypothesis(
        self, h: Hypothesis, arms: Mapping[str, Mapping[str, Space]], kept: Sequence[tuple[Cell, Cell]]
    ) -> Hypothesis | None:
        """The hypothesis in those cells in which all arms that it reads are left."""
        spoken = [new.name for new, old in kept if h.cells is None or old.name in h.cells]
        cells = [cell for cell in spoken if all(cell in arms.get(name, {}) for name in self._reads(h))]
        if not cells:
            return None
        norm = self.question.norm
        return replace(
            h,
            primary=False,
            sentence=f"With norm {norm} in place of batch normalization: {h.sentence}"
            if norm
            else h.sentence,
            estimand=_renamed(h.estimand, self.names),
            better=tuple(self.names[name] for name in h.better),
            other=tuple(self.names[name] for name in h.other),
            cells=tuple(cells),
            half_width={},
        )

    def _require_no_target(self, hypotheses: Sequence[Hypothesis], design: Design) -> None:
        for h in hypotheses:
            if TARGET in constants_read(h, design, design.cell((h.cells or ("",))[0])):
                raise BadInput(
                    f"study {self.old.name!r} counts to a target accuracy, and its own fit no other data or"
                    " model: give --target, such as 0.9, a share of validation samples that the arm"
                    f" {self.names[self.old.baseline]!r} reaches late in its training"
                )


def _in_effect(row: Trial) -> Trial:
    """The row that trains the same: without a norm it does not matter on which side of the activation."""
    beside = row.norm == "none" and row.order in ("norm-act", "act-norm")
    return row.replace(order="norm-act") if beside else row


def _refuse_compared(study: Study, design: Design, question: Question) -> None:
    """Raise BadInput where arms differ in a field that is to be the same in all of them."""
    moved = {"data": question.data, "model": question.model}
    fixed = [*question.changes, *(name for name, value in moved.items() if value is not None)]
    for arm in design.arms:
        spaces = arm.space.values() if isinstance(arm.space, Mapping) else [arm.space]
        searched = [name for space in spaces for dimension in space for name in fields_of(dimension)]
        for name in fixed:
            if name in (*arm.changes, *searched) and not name.endswith("_options"):
                raise BadInput(
                    f"{name!r} cannot be set for all of study {study.name!r}: its arm {arm.name!r} sets it"
                )


def _names_in(value: Any, names: Collection[str]) -> set[str]:
    """Those of some names that are bound to an estimand, at any depth."""
    if isinstance(value, functools.partial):
        return _names_in([value.func, *value.args, *value.keywords.values()], names)
    if isinstance(value, str):
        return {value} & set(names)
    if isinstance(value, Mapping):
        return _names_in([*value, *value.values()], names)
    if isinstance(value, list | tuple | set):
        return set().union(*(_names_in(part, names) for part in value))
    return set()


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """An estimand with other names of arms bound to it, at any depth."""
    if isinstance(value, functools.partial):
        keywords = {name: _renamed(part, names) for name, part in value.keywords.items()}
        return functools.partial(_renamed(value.func, names), *_renamed(value.args, names), **keywords)
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, Mapping):
        return {_renamed(name, names): _renamed(part, names) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_renamed(part, names) for part in value)
    return value


def _listed(kind: str, names: Sequence[str]) -> str:
    many = {"arm": "arms", "hypothesis": "hypotheses"}
    return f"{kind if len(names) == 1 else many[kind]} {', '.join(map(repr, names))}"


def _told_apart(name: str, row: Trial, other: Trial, fitted: Collection[str]) -> str:
    """A cell's name with the fields in which it differs from another one, as `cross` writes them."""
    values = other.as_dict()
    more = [f"{n}={v}" for n, v in row.as_dict().items() if v != values[n] and n not in fitted]
    return _shortened(" · ".join([name, *(word_for(part) for part in more)]))


def _shortened(name: str) -> str:
    return name[:LONGEST_NAME].rstrip(" ·.,-=")

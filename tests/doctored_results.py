"""Plausible results of studies that were never trained, for the tests of the report."""

import itertools
import math
import random
from dataclasses import replace
from functools import partial

from bnbench.engine.search import draw
from bnbench.report import Report, StudyResult
from bnbench.study import Arm, Cell, Claim, Design, Entry, Hypothesis, Range, Result, Study, Table, Trial
from bnbench.study.claims import adjust, family_sizes, judge, judge_claim
from bnbench.study.estimands import accuracy_difference, log_steps_ratio, lr_width_difference
from bnbench.study.programs import programs_of
from bnbench.study.recipes import recipe_space
from tests.pilot_study import drive

GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
CLAIMS = (
    Claim("C1", "It speeds up training.", ("Ioffe & Szegedy (2015): 2.3 times <fewer> steps.",)),
    Claim("C2", "It tolerates more learning rates."),
    Claim("C5", "It generalizes better."),
    Claim("P5", "Combine it with dropout."),
)


def doctored_studies(replicates: int) -> tuple[Study, Study]:
    arms = (Arm("none", norm="none"), Arm("batch"), Arm("layer · ü", norm="layer"))
    cells = (
        Cell("mlp · mnist1d", constants={"target": 0.6}),
        Cell("cnn · mnist1d", model="cnn", constants={"target": 0.6}),
        Cell("cnn · B=8", model="cnn", batch_size=8, constants={"target": 0.6}),
        Cell("mlp · digits", data="digits", constants={"target": 0.6}),
    )
    base = Trial(steps=400, curve_points=12)
    design = Design(base, cells, arms, GRID, replicates=replicates)
    pair = {"better": "batch", "other": "none"}
    arms_read = {"better": ("batch",), "other": ("none",)}
    convergence = Study(
        "convergence",
        "How many steps does batch normalization save?",
        (
            Hypothesis("C1.a", "C1", "Fewer steps at own best rates.", partial(log_steps_ratio, **pair),
                       math.log(1.25), **arms_read, unit="log steps"),
            Hypothesis("C1.b", "C1", "Fewer steps at the common rate.",
                       partial(log_steps_ratio, **pair, role="common"), math.log(1.25), **arms_read,
                       unit="log steps", primary=False),
            Hypothesis("C5.a", "C5", "Higher accuracy.", partial(accuracy_difference, **pair), 1.0,
                       **arms_read, unit="pp"),
        ),
        design, design, baseline="none",
    )  # fmt: skip
    sweep = replace(design, arms=arms[:2], cells=cells[:2])
    stability = Study(
        "lr stability",
        "How wide is the range of usable learning rates?",
        (Hypothesis("C2.a", "C2", "Wider.", partial(lr_width_difference, **pair), 0.5, **arms_read,
                    unit="decades"),),
        sweep, sweep, baseline="none", program="sweep",
    )  # fmt: skip
    return convergence, stability


def _result(trial: Trial, arm: str, replicate: int, noise: random.Random) -> Result:
    """A training that never was: accuracy rises over log steps to a peak at the arm's best learning rate."""
    best, width, height, speed = {
        "none": (0.1, 0.7, 0.68, 1.0), "batch": (0.3, 1.4, 0.70, 2.0), "layer · ü": (0.1, 1.0, 0.67, 1.3),
    }[arm]  # fmt: skip
    if arm == "batch":
        height += {"cnn64": -0.018, "cnn8": -0.05, "mlp64": 0.0}[f"{trial.model}{trial.batch_size}"]
    if trial.data == "digits":
        height += noise.gauss(-0.01 * (arm == "batch"), 0.012)
    data = random.Random(f"{replicate}/{trial.data}/{trial.model}").gauss(0, 0.01)
    lift = 0.26 if trial.model == "cnn" else 0.0
    off = abs(math.log10(trial.lr / best)) / width
    top = max(0.1, height + lift - 0.25 * off**2 + data + noise.gauss(0, 0.004))
    if arm == "none" and trial.lr >= 1:
        lost = {"chance": 0.1, "val/acc": 0.1, "train/loss": 2.4, "time/total_s": 0.2}
        return Result("diverged", lost, {"step": (1, 2), "val/acc": (0.1, 0.1)}, "loss was NaN at step 3")
    steps = tuple(round(400 ** (i / 11)) for i in range(12))
    curve = tuple(0.1 + (top - 0.1) * (1 - math.exp(-speed * s / 60)) for s in steps)
    metrics = {
        "chance": 0.1, "val/acc": top, "val/loss": 1.2 - top, "train/loss": 0.3, "train/acc": 0.98,
        "test/acc": top - 0.005, "test/loss": 1.25 - top, "test/ece": 0.05, "test/gap": 0.4,
        "time/step_ms": 1.5, "time/total_s": 0.8,
    }  # fmt: skip
    return Result("done", metrics, {"step": steps, "val/acc": curve, "train/loss": curve})


def _table(study: Study, noise: random.Random) -> Table:
    design, entries = study.quick, []
    for cell in design.cells:
        for r in range(design.replicates):
            for arm in design.arms:
                role = "sweep" if study.program == "sweep" else "tune"
                grid = []
                for lr in design.lr:
                    trial = design.trial(cell, arm, r, lr=lr)
                    grid.append(
                        Entry(cell.name, arm.name, r, role, trial, _result(trial, arm.name, r, noise))
                    )
                entries += grid
                if role == "tune":
                    own = max(grid, key=lambda e: e.result.metrics.get("val/acc", 0.1)).trial.lr
                    for name, lr in (("own", own), ("common", 0.1)):
                        trial = design.trial(
                            cell, arm, r, lr=lr, score_on="test", curve_points=12 + (name == "own")
                        )
                        entries.append(
                            Entry(cell.name, arm.name, r, name, trial, _result(trial, arm.name, r, noise))
                        )
    return Table(tuple(entries))


def doctored_report(replicates: int = 10, *, drop: int = 0) -> Report:
    """Plausible results of two studies; `drop` rows of the last cell are missing, one row failed."""
    studies = doctored_studies(replicates)
    sizes = family_sizes(studies, "quick")
    results = []
    for study in studies:
        table = _table(study, random.Random(study.name))
        planned = len(table.entries)
        if drop:
            lines = list(table.entries[: planned - drop])
            lines[7] = replace(
                lines[7], result=Result("failed", reason="MemoryError: <b>too</b> wide\n  in line 3")
            )
            table = Table(tuple(lines))
        old = study.definition("quick") | {"replicates": 8, "question": "An older <question>?"}
        versions = (
            ("0ld0ld0ld0ld", 1.7e9, old),
            (study.hash("quick"), 1.7e9 + 3600, study.definition("quick")),
        )
        verdicts = judge(study, "quick", table, sizes)
        results.append(StudyResult(study, "quick", study.hash("quick"), table, verdicts, planned, versions))
    verdicts = adjust([v for result in results for v in result.verdicts], sizes)
    results = [replace(r, verdicts=tuple(v for v in verdicts if v.study == r.study.name)) for r in results]
    claims = tuple((claim, judge_claim(claim.id, verdicts)) for claim in CLAIMS)
    return Report(tuple(results), claims, {"torch": "2.13.0", "machine": "a <made-up> one"})


def recipe_study(replicates: int = 6, *, trials: int = 12, searches: int = 3, **changes: object) -> Study:
    """Two norms with their recipes searched, the learning rate alone beside them, and a grid."""
    cells = (Cell("mlp · mnist1d", steps=300), Cell("cnn · small", model="cnn", steps=200))
    arms = (
        *(
            Arm(norm, norm=norm, space={
                cells[0].name: recipe_space(norm=norm, examples=19_200),
                cells[1].name: recipe_space(("batch_size", "dropout"), norm=norm, examples=12_800),
            })
            for norm in ("none", "batch")
        ),
        *(Arm(f"{norm}, lr alone", norm=norm, space=(Range("lr", 1e-3, 3.0),)) for norm in ("none", "batch")),
        Arm("the article", norm="batch"),
    )  # fmt: skip
    design = Design(
        Trial(), cells, arms, GRID, replicates=replicates, tuning="once", trials=trials, batch=4,
        searches=searches,
    )  # fmt: skip
    design = replace(design, **changes)
    better = partial(accuracy_difference, better="batch", other="none")
    hypothesis = Hypothesis("C5.r", "C5", "Its best recipe is better.", better, 1.0, ("batch",), ("none",))
    return Study("recipe", "Which recipe is best?", (hypothesis,), design, design, baseline="the article")


def recipe_result(trial: Trial) -> Result:
    """A training that never was: batch size, dropout and most of all the learning rate matter."""
    best = {"none": 0.05, "batch": 0.3}[trial.norm]
    noise = random.Random(trial.key).gauss(0, 0.01)
    data = random.Random(f"{trial.data_seed}/{trial.model}").gauss(0, 0.01)
    top = 0.7 + 0.02 * (trial.norm == "batch") + data + noise - 0.1 * math.log10(trial.lr / best) ** 2
    top += 0.03 * (trial.batch_size == 32) - 0.1 * trial.dropout
    if trial.norm == "none" and trial.lr > 1:
        lost = {"chance": 0.1, "val/acc": 0.1, "val/loss": 9.0, "train/loss": 9.0, "test/acc": 0.1}
        return Result("diverged", lost, reason=f"loss was NaN at step {1 + trial.batch_size}")
    metrics = {
        "chance": 0.1, "val/acc": top, "val/loss": 1 - top, "train/loss": 0.3, "train/acc": 0.98,
        "test/acc": top - 0.01 + random.Random(trial.key + "test").gauss(0, 0.005), "test/loss": 1.0,
        "test/ece": 0.05, "test/gap": 0.2, "time/step_ms": 1.5, "time/total_s": 0.8,
    }  # fmt: skip
    return Result("done", metrics)


def recipe_report(study: Study) -> StudyResult:
    """The result of a study whose trainings never were, searched by the real sampler."""
    entries = [e for _, p in programs_of(study, "quick", draw) for e in drive(p, recipe_result)[0]]
    table = Table(tuple(entries))
    verdicts = adjust(judge(study, "quick", table, sizes := family_sizes([study], "quick")), sizes)
    planned = len({e.trial.key for e in entries})
    return StudyResult(study, "quick", study.hash("quick"), table, tuple(verdicts), planned)


SCALES = (0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 10.0)


def wide_study(replicates: int = 10) -> Study:
    """Fourteen arms: two norms at seven scales of the initial weights; three hypotheses of one claim."""
    arms = tuple(
        Arm(f"{norm} ×{scale:g}", norm=norm, init_scale=scale)
        for norm in ("none", "batch")
        for scale in SCALES
    )
    cells = (
        Cell("mlp · mnist1d", constants={"target": 0.6}),
        Cell("cnn · mnist1d", model="cnn", constants={"target": 0.6}),
    )
    design = Design(
        Trial(steps=400), cells, arms, (0.03, 0.1, 0.3, 1.0), replicates=replicates, timing_steps=20
    )
    narrow, wide = {"better": "batch ×1", "other": "none ×1"}, {"better": "batch ×10", "other": "batch ×1"}
    far = {"better": "batch ×10", "other": "none ×10"}

    def arms_of(pair: dict[str, str]) -> dict[str, tuple[str]]:
        return {side: (arm,) for side, arm in pair.items()}

    hypotheses = (
        Hypothesis("C2.b", "C2", "It helps at the usual scale.", partial(accuracy_difference, **narrow), 1.0,
                   **arms_of(narrow), unit="pp"),
        Hypothesis("C2.c", "C2", "Ten times the scale changes nothing.", partial(accuracy_difference, **wide),
                   1.0, **arms_of(wide), kind="equivalent", unit="pp"),
        Hypothesis("C2.d", "C2", "At ten times the scale it is faster.", partial(log_steps_ratio, **far),
                   math.log(1.25), **arms_of(far), unit="log steps"),
    )  # fmt: skip
    return Study(
        "init stability", "Which scales of the initial weights train?", hypotheses, design, design,
        baseline="none ×1",
    )  # fmt: skip


def wide_result(trial: Trial, replicate: int) -> Result:
    """A training that never was: without normalization every decade from 1 costs, and ×10 mostly diverges."""
    noise = random.Random(f"{trial.key}").gauss(0, 0.004)
    data = random.Random(f"{replicate}/{trial.model}").gauss(0, 0.008)
    off = abs(math.log10(trial.init_scale))
    plain = trial.norm == "none"
    if plain and trial.init_scale == 10 and replicate % 3:
        lost = {"chance": 0.1, "val/acc": 0.1, "test/acc": 0.1, "test/loss": 2.4, "train/loss": 2.4}
        return Result("diverged", lost, {"step": (1, 2), "val/acc": (0.1, 0.1)}, "loss was NaN at step 3")
    top = 0.68 + 0.02 * (not plain) + 0.2 * (trial.model == "cnn") - (0.25 if plain else 0.004) * off
    top += data + noise - 0.06 * abs(math.log10(trial.lr / 0.3))
    steps = tuple(round(400 ** (i / 11)) for i in range(12))
    speed = 1.0 if plain else 2.0
    curve = tuple(0.1 + (top - 0.1) * (1 - math.exp(-speed * s / 60)) for s in steps)
    metrics = {
        "chance": 0.1, "val/acc": top, "val/loss": 1.2 - top, "train/loss": 0.3, "train/acc": 0.98,
        "test/acc": top - 0.005, "test/loss": 1.25 - top, "test/ece": 0.05, "test/gap": 0.4,
        "time/step_ms": 1.5 if plain else 2.25, "time/total_s": 0.8, "train/reached": float(off < 1),
    }  # fmt: skip
    return Result("done", metrics, {"step": steps, "val/acc": curve})


def wide_report(replicates: int = 10, *, links: bool = False) -> Report:
    """The study of fourteen arms: trainings that diverge, censored targets, step times measured alone."""
    study = wide_study(replicates)
    design, entries = study.quick, []
    for cell, arm in itertools.product(design.cells, design.arms):
        for r in range(replicates):
            roles = [("tune", {"lr": lr}) for lr in design.lr]
            roles += [(role, {"lr": 0.3, "score_on": "test"}) for role in ("own", "common")]
            roles.append(("timing", {"lr": 0.1, "steps": 20, "alone": True}))
            for role, point in roles:
                trial = design.trial(cell, arm, r, **point)
                entries.append(Entry(cell.name, arm.name, r, role, trial, wide_result(trial, r)))
    table = Table(tuple(entries))
    sizes = family_sizes([study], "quick")
    verdicts = adjust(judge(study, "quick", table, sizes), sizes)
    own = [e.trial.key for e in entries if e.role == "own" and links]
    pages = {key: f"http://127.0.0.1:5000/#/runs/{key * 2}" for key in own}
    found = tuple(verdicts)
    result = StudyResult(study, "quick", study.hash("quick"), table, found, len(entries), links=pages)
    return Report((result,), ((CLAIMS[1], judge_claim("C2", verdicts)),))

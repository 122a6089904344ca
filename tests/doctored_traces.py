"""Plausible traces of probes that never ran, for the tests of the report."""

import itertools
import math
import random
from dataclasses import replace
from functools import partial

from bnbench.probes import Trace
from bnbench.report import StudyResult
from bnbench.study import Arm, Cell, Design, Entry, Factor, Hypothesis, Result, Study, Table, Trial, cross
from bnbench.study.estimands import accuracy_difference
from bnbench.study.estimands.gradients import mean_field_factor

STEPS = tuple(range(0, 201, 10))
LAYERS = 12
SIZES = (8, 32, 128)
ARMS = (Arm("none", norm="none"), Arm("batch"), Arm("layer", norm="layer"))
#: By how much the gradient's norm changes from a layer to the one below, at the start.
GROWTH = {"none": 0.71, "batch": 1.21, "layer": 1.0}


def traces_of(arm: str, noise: random.Random, steps: tuple[int, ...] = STEPS) -> dict[str, Trace]:
    """The gradient's growth calms down over 40 steps; the loss varies least along the gradient of `batch`."""

    def shaky(value: float) -> float:
        return value * math.exp(noise.gauss(0, 0.1))

    growth = [GROWTH[arm] ** math.exp(-step / 40) * math.exp(noise.gauss(0, 0.005)) for step in steps]
    gradient = tuple(
        tuple(shaky(0.01 * g ** (LAYERS - layer)) for layer in range(1, LAYERS + 1)) for g in growth
    )
    loss = [2.3 * math.exp(-step / 80) + 0.2 for step in steps]
    spread = 0.15 if arm == "batch" else 0.8
    return {
        "gradient_flow": Trace(
            "layer",
            tuple(f"hidden.{3 * i}" for i in range(LAYERS)),
            steps,
            {"factor": tuple(growth), "log_factor": tuple(map(math.log, growth))},
            {"gradient": gradient},
        ),
        "landscape": Trace(
            "step size",
            (0.5, 1.0, 2.0, 4.0),
            steps,
            {"beta_common": tuple(shaky(20 * spread) for _ in steps)},
            {"loss": tuple(tuple(shaky(v * (1 + k * spread)) for k in (-0.1, 0, 0.2, 1)) for v in loss)},
        ),
        "a plug-in's": Trace("", (), steps, {"some_value": tuple(shaky(1.0 + step) for step in steps)}),
    }  # fmt: skip


def traced_study(name: str = "gradient_flow") -> Study:
    """Three arms in a cell with readings in training, and at three batch sizes at initialization."""
    cells = (Cell("mlp · digits"), *cross((Cell("deep mlp"),), Factor("batch_size", SIZES)))
    design = Design(Trial(steps=200), cells, ARMS, (0.1, 0.3), replicates=4)
    better = partial(accuracy_difference, better="batch", other="none")
    hypothesis = Hypothesis("C4.b", "C4", "It helps.", better, 1.0, ("batch",), ("none",), unit="pp")
    return Study(name, "Do gradients flow?", (hypothesis,), design, design, baseline="none")


def traced_result(study: Study) -> StudyResult:
    """The study's confirmed rows with their traces, and no others."""
    design, entries = study.quick, []
    metrics = {"chance": 0.1, "val/acc": 0.7, "test/acc": 0.7, "time/total_s": 0.8}
    for cell, r, arm in itertools.product(design.cells, range(design.replicates), design.arms):
        noise = random.Random(f"{cell.name}/{arm.name}/{r}")
        size = cell.changes.get("batch_size")
        traces = traces_of(arm.name, noise, (0,) if size else STEPS)
        if size and arm.name == "batch":
            factor = mean_field_factor(size) * math.exp(noise.gauss(0, 0.005))
            traces["gradient_flow"] = replace(traces["gradient_flow"], values={"factor": (factor,)})
        trial = design.trial(cell, arm, r, lr=0.1, score_on="test")
        found = Result("done", metrics, traces=traces)
        entries.append(Entry(cell.name, arm.name, r, "own", trial, found))
    return StudyResult(study, "quick", study.hash("quick"), Table(tuple(entries)), (), len(entries))

"""A small study and invented results, for the tests of what surrounds the training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from bnbench import NormClassifier
from bnbench.probes import Moment, Trace, build_probe
from bnbench.study import Arm, Cell, Design, Entry, Hypothesis, Result, Study, Trial
from bnbench.study.estimands import accuracy_difference
from bnbench.study.programs import Program, Wanted

ARMS = (Arm("none", norm="none"), Arm("batch"), Arm("group", norm="group", norm_options={"num_groups": 4}))
CELLS = (Cell("mlp", constants={"target": 0.5}), Cell("cnn", model="cnn", constants={"target": 0.6}))


def design(**changes: Any) -> Design:
    values = {"base": Trial(steps=8), "cells": CELLS, "arms": ARMS, "lr": (0.01, 0.1, 1.0), "replicates": 2}
    return Design(**{**values, **changes})


def hypothesis(**changes: Any) -> Hypothesis:
    values: dict[str, Any] = {
        "name": "C1.a",
        "claim": "C1",
        "sentence": "It is more accurate.",
        "estimand": partial(accuracy_difference, better="batch", other="none"),
        "delta": 1.0,
        "better": ("batch",),
        "other": ("none",),
    }
    return Hypothesis(**{**values, **changes})


def study(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "name": "pilot",
        "question": "Does it help?",
        "hypotheses": (hypothesis(),),
        "quick": design(),
        "full": design(),
        "baseline": "none",
    }
    return Study(**{**values, **changes})


def invented(trial: Trial) -> Result:
    """What a training of this row might give: some function of its key."""
    luck = int(trial.key, 16) % 9973 / 9973
    loss = {"train/loss": 0.1 + luck, "val/loss": 0.2 + luck, "test/loss": 0.3 + luck}
    accuracy = {f"{part}/acc{kind}": 0.6 + 0.39 * luck for part in ("train", "val", "test")
                for kind in ("", "_precise")}  # fmt: skip
    curve = {"step": (1.0, 4.0, float(trial.steps)), "val/acc": (0.05, 0.1 + 0.1 * luck, 0.99)}
    loss |= {f"{name}_{kind}": value for name, value in loss.items() for kind in ("precise", "calibrated")}
    metrics = {"chance": 0.1, "test/gap": 0.2, "test/gap_calibrated": 0.2 + luck, "norm/gamma": 0.5 + luck}
    metrics |= {"time/total_s": luck, "time/step_ms": 1 + luck, **loss, **accuracy}
    traces = {name: invented_trace(name, trial, luck) for name in trial.probes}
    return Result(
        "done", metrics, curve if trial.curve_points else {}, provenance={"host": "h"}, traces=traces
    )


def invented_trace(name: str, trial: Trial, luck: float) -> Trace:
    """What a probe might measure at the steps that the row asks for, NaN where it must be."""
    steps = build_probe(name, **trial.probes[name]).due_steps(trial.steps)
    values = {
        value: tuple(first if n == 0 else 0.1 + luck / (1 + step) for n, step in enumerate(steps))
        for value, first in first_reading(name).items()
    }
    return Trace(steps=tuple(steps), values=values)


@functools.cache
def first_reading(name: str) -> Mapping[str, float]:
    """What a probe measures first, in a small network; NaN what it can say only of a change since then."""
    model = NormClassifier("mlp", in_shape=(4,), num_classes=3, model_options={"depth": 4, "width": 8})
    x, y = torch.randn(64, 4), torch.arange(64) % 3
    return build_probe(name, samples=64).measure(model, x, y, Moment(0, 0.1, 8, (x, y))).values


def drive(
    program: Program, train: Callable[[Trial], Result] = invented
) -> tuple[list[Entry], list[list[Wanted]]]:
    """Run a program to its end; returns its lines and what it asked for, request by request."""
    requests: list[list[Wanted]] = []
    results: Mapping[str, Result] | None = None
    while True:
        try:
            wanted = next(program) if results is None else program.send(results)
        except StopIteration as stop:
            return stop.value, requests
        requests.append(wanted)
        results = {row.trial.key: train(row.trial) for row in wanted}

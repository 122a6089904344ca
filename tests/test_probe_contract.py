"""The contract of a probe: holds over the registry, so that a new probe is tested by being there.

Above all: a probe changes nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnbench.probes
from bnbench import NormClassifier
from bnbench.data import Arrays
from bnbench.engine.chunked import Blocks, ChunkedClassifier
from bnbench.engine.distributed import quiet_lightning, trainer_for
from bnbench.engine.train import Place, train
from bnbench.probes import PROBES, Moment, Probe, Trace, build_probe
from bnbench.probes.passes import untouched
from bnbench.registry import BadInput
from bnbench.study.trial import Trial

every_probe = pytest.mark.parametrize("name", PROBES)
NORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "batch": {},
    "ghost_batch": {"ghost_size": 4},
    "noisy_batch": {},
    "virtual_batch": {},
}
STEPS = 3


def samples(count: int = 128) -> Arrays:
    draw = torch.Generator().manual_seed(0)
    return Arrays(torch.randn(count, 2, 12, generator=draw), torch.randint(4, (count,), generator=draw))


def arguments(norm: str = "batch", **more: Any) -> dict[str, Any]:
    return {
        "model": "cnn",
        "norm": norm,
        "norm_options": NORMS[norm],
        "model_options": {"depth": 3, "channels": 8},
        "in_shape": (2, 12),
        "num_classes": 4,
        "dropout": 0.2,
        "steps": STEPS,
        **more,
    }


def fit_chunked(norm: str, probes: list[Probe]) -> ChunkedClassifier:
    """Train by the engine's trainer, with readings after every step."""
    module = ChunkedClassifier(
        train=samples(), batch_size=8, training_seed=(3, "val"), **arguments(norm, seed=3)
    )
    module.held_out = samples(16)
    trial = Trial(steps=STEPS)
    blocks = Blocks(0, STEPS, [], lambda: False, splits=range(STEPS))
    with quiet_lightning():
        trainer_for(trial, "cpu", callbacks=probes).fit(module, train_dataloaders=blocks)
    return module


def fit_plain(norm: str, probes: list[Probe]) -> NormClassifier:
    """Train by Lightning's automatic optimization."""
    torch.manual_seed(0)
    module = NormClassifier(**arguments(norm))
    data = samples()
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=8, shuffle=True, drop_last=True)
    with quiet_lightning():
        plain_trainer(probes).fit(module, loader)
    return module


def plain_trainer(probes: list[Probe]) -> L.Trainer:
    """A Trainer as anyone has it, for a few steps."""
    return L.Trainer(
        max_steps=STEPS,
        callbacks=list(probes),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def state_of(module: L.LightningModule) -> list[Tensor]:
    return [*module.state_dict().values()]


def is_same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fit", [fit_chunked, fit_plain])
def test_a_run_with_all_probes_ends_with_the_bits_of_one_without(fit: Callable[..., Any], norm: str) -> None:
    probes = [build_probe(name, every=1) for name in PROBES]
    assert is_same(state_of(fit(norm, probes)), state_of(fit(norm, [])))
    assert all(probe.trace.steps == tuple(range(STEPS + 1)) for probe in probes)


@pytest.fixture(scope="module")
def unprobed() -> list[Tensor]:
    return state_of(fit_chunked("batch", []))


@every_probe
def test_a_probe_by_itself_changes_nothing(name: str, unprobed: list[Tensor]) -> None:
    """Together with others a probe might put right what another one did."""
    module = fit_chunked("batch", [build_probe(name, every=1)])
    assert is_same(state_of(module), unprobed)
    assert all(p.grad is None for p in module.parameters())


@every_probe
@pytest.mark.parametrize("training", [True, False])
def test_a_measurement_leaves_no_trace(name: str, training: bool) -> None:
    """Weights, buffers, gradients, modes, plain attributes, hooks and random states are as before."""
    module = NormClassifier(**arguments())
    data = samples()
    module.loss(module(data.x), data.y).backward()  # type: ignore[no-untyped-call]
    module.train(training)
    module.model.layers[0].eval()  # type: ignore[union-attr, index]
    gradients = [p.grad for p in module.parameters()]
    values = [None if g is None else g.clone() for g in gradients]

    def everything() -> list[Any]:
        return [
            *(t.tolist() for t in (*module.parameters(), *module.buffers())),
            *(m.training for m in module.modules()),
            *(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()),
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[index]
            torch.is_grad_enabled(),
        ]

    before = everything()
    probe = build_probe(name, samples=64)
    with untouched(module):
        reading = probe.measure(module, data.x[:64], data.y[:64], Moment(0, 0.1, 8, (data.x, data.y)))
    assert everything() == before
    assert all(p.grad is g for p, g in zip(module.parameters(), gradients, strict=True))
    assert all(g is None or v is None or torch.equal(g, v) for g, v in zip(gradients, values, strict=True))
    assert reading.values
    assert len(reading.values) <= 8
    assert all(isinstance(value, float) for value in reading.values.values())


@every_probe
def test_two_measurements_are_equal_and_plain_json(name: str) -> None:
    traces = []
    for _ in range(2):
        probe = build_probe(name, steps=[0, 2])
        fit_chunked("batch", [probe])
        traces.append(json.dumps(probe.trace.to_json(), allow_nan=False))
    assert traces[0] == traces[1]
    assert json.dumps(Trace.from_json(json.loads(traces[0])).to_json()) == traces[0]


@every_probe
def test_the_function_beside_the_callback_is_found_by_its_name(name: str) -> None:
    entry = PROBES[name]
    assert getattr(bnbench.probes, entry.probe.__name__) is entry.probe
    assert callable(getattr(bnbench.probes, f"measure_{name}"))
    assert entry.probe.__doc__


@every_probe
def test_the_default_schedule_keeps_to_a_share_of_the_steps(name: str) -> None:
    """Counted in training steps; what a reading really takes is measured by the benchmark."""
    probe = build_probe(name)
    for steps in (probe.every, 10 * probe.every):
        assert len(probe.due_steps(steps)) * probe.passes <= 0.05 * steps + 1e-9


@every_probe
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evry": 3}, "did you mean"),
        ({"every": 0}, "every must be 1 or more"),
        ({"every": "often"}, "every must be"),
        ({"steps": []}, "steps must be whole numbers"),
        ({"steps": [-1]}, "steps must be whole numbers"),
        ({"every": 2, "steps": [1]}, "not both"),
        ({"samples": 0}, "samples must be 1 or more"),
    ],
)
def test_bad_options_are_one_line_that_names_the_probe(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        build_probe(name, **options)
    assert f"probe {name!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@every_probe
def test_a_probe_works_on_a_module_that_is_not_ours(name: str) -> None:
    class Foreign(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv1d(2, 6, 3),
                nn.BatchNorm1d(6),
                nn.ReLU(inplace=True),
                nn.Conv1d(6, 6, 3),
                nn.ReLU(inplace=True),
                nn.Flatten(),
                nn.Linear(48, 8),
                nn.Tanh(),
                nn.Linear(8, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    ended = []
    for probes in ([], [build_probe(name, every=2)]):
        torch.manual_seed(1)
        data = samples(64)
        loader = DataLoader(TensorDataset(data.x, data.y), batch_size=8, shuffle=True)
        module = Foreign()
        plain_trainer(probes).fit(module, loader)
        ended.append(state_of(module))
    assert is_same(*ended)
    assert probes[0].trace.steps == (0, 2)


@pytest.mark.parametrize("change", [{"precision": "64-true"}, {"precision": "bf16-mixed"}, {"model": "mlp"}])
def test_a_row_with_all_probes_has_the_numbers_of_the_row_without(
    change: dict[str, Any], tmp_path: Path
) -> None:
    place = Place(tmp_path / "data", tmp_path / "runs")
    options = {"model": "cnn", "model_options": {"depth": 2}, **change}
    plain = Trial(data="digits", n_train=64, batch_size=8, steps=4, curve_points=4, n_eval=64, **options)
    without = train(plain, place)
    probed = train(plain.replace(probes={name: {"steps": [0, 3]} for name in PROBES}), place)
    assert without.status == probed.status == "done", probed.reason
    assert probed.measured() == without.measured()
    assert probed.curve == without.curve
    assert all(probed.traces[name].steps == (0, 3) for name in PROBES)


def test_a_norm_without_dropout_in_the_run_is_probed_too(tmp_path: Path) -> None:
    place = Place(tmp_path / "data", tmp_path / "runs")
    row = Trial(data="digits", n_train=64, batch_size=8, steps=2, model_options={"depth": 2}, n_eval=64)
    for norm in ("group", "frozen_batch", "sync_batch"):
        found = train(row.replace(norm=norm, probes={name: {"steps": [0]} for name in PROBES}), place)
        assert found.status == "done", found.reason

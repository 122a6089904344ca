"""What a training step keeps for its backward pass, against sizes counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bnbench.engine.evaluate import saved_for_backward
from bnbench.engine.train import Place, train
from bnbench.study import Trial

MIB = 2**20


def saved(model: nn.Module, x: torch.Tensor) -> float:
    """Bytes."""
    own = [*model.parameters(), *model.buffers()]
    return MIB * saved_for_backward(lambda: model(x).sum(), own)


def test_a_linear_map_keeps_its_input_and_no_weight() -> None:
    assert saved(nn.Linear(5, 300), torch.randn(8, 5)) == 4 * 8 * 5


def test_what_two_layers_share_counts_once() -> None:
    """The second map's input is what the activation keeps: its output."""
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    assert saved(model, torch.randn(8, 5)) == 4 * 8 * (5 + 7)


def test_batch_norm_keeps_its_input_and_two_numbers_a_channel() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    assert saved(model, torch.randn(8, 5)) == 4 * (8 * (5 + 7 + 7) + 2 * 7)


def test_doubles_take_twice_as_much_and_no_gradient_takes_none() -> None:
    assert saved(nn.Linear(5, 3).double(), torch.randn(8, 5).double()) == 8 * 8 * 5
    assert saved(nn.Linear(5, 3).requires_grad_(False), torch.randn(8, 5)) == 0


def small(**changes: Any) -> Trial:
    row: dict[str, Any] = {
        "data": "digits",
        "steps": 3,
        "batch_size": 16,
        "model_options": {"depth": 2, "width": 8},
    }
    return Trial(**{**row, **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("rows")
    return Place(folder, folder)


def test_a_row_that_is_timed_has_the_memory_of_its_step(place: Place) -> None:
    found = train(small(norm="none", alone=True), place).metrics["memory/saved_mib"]
    # Images, the outputs of two activations, the logarithms of the probabilities, their sum, the labels.
    numbers = 16 * (64 + 8 + 8 + 10)
    assert MIB * found == pytest.approx(4 * numbers + 8 * 16, abs=8)


@pytest.mark.parametrize("norm", ["batch", "virtual_batch", "noisy_batch"])
def test_to_measure_it_changes_no_other_number(norm: str, place: Place) -> None:
    timed, plain = (train(small(norm=norm, alone=alone), place) for alone in (True, False))
    assert timed.measured() == plain.measured()
    assert "memory/saved_mib" not in plain.metrics
    assert timed.metrics["memory/saved_mib"] > 0

"""Tests of the Trainer of a row: nothing from outside of the row reaches it, and it says nothing."""

from __future__ import annotations

import logging

import lightning as L
import pytest

from bnbench.engine.distributed import quiet_lightning, trainer_for
from bnbench.lit import NormClassifier
from bnbench.study.trial import Trial


def test_variables_of_the_environment_change_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_STEPS", "3"), ("LIMIT_TRAIN_BATCHES", "1"), ("OVERFIT_BATCHES", "1")):
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    trainer = trainer_for(Trial(), "cpu")
    assert (trainer.max_steps, trainer.limit_train_batches, trainer.overfit_batches) == (-1, 1.0, 0.0)
    # Other Trainers of the process still heed them.
    assert L.Trainer(logger=False, enable_checkpointing=False, barebones=False).max_steps == 3


def test_lightning_is_quiet_and_speaks_again(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch")
    caplog.set_level(logging.INFO, logger.name)
    with quiet_lightning():
        assert not logger.isEnabledFor(logging.WARNING)
        with quiet_lightning():
            assert not logger.isEnabledFor(logging.WARNING)
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.level == logging.INFO


def test_metrics_are_made_for_a_trainer_that_evaluates() -> None:
    module = NormClassifier(in_shape=(4,), num_classes=3, model_options={"depth": 1})
    assert [name for name, _ in module.named_children()] == ["model"]
    module.setup("fit")
    made = dict(module.named_children())
    module.setup("test")
    assert dict(module.named_children()) == made
    assert {"val_loss", "val_acc", "val_ece", "test_loss", "test_acc", "test_ece"} < made.keys()

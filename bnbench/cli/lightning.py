"""`bnbench fit|validate|test`: a LightningCLI over NormClassifier and the data sets."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, MLFlowLogger

from bnbench.data import DataModule
from bnbench.engine.distributed import cluster_environment
from bnbench.lit import NormClassifier


class LogConfig(SaveConfigCallback):
    """Keep the configuration where the logger keeps things.

    Lightning's own callback writes to the logger's folder, and an MLFlowLogger on a database has none.
    """

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Log the YAML as an artifact of the MLflow run, or as a hyperparameter elsewhere."""
        text = self.parser.dump(self.config, skip_none=False)
        if isinstance(trainer.logger, MLFlowLogger):
            trainer.logger.experiment.log_text(trainer.logger.run_id, text, self.config_filename)
        elif isinstance(trainer.logger, Logger):
            trainer.logger.log_hyperparams({"config": text})


class ClassifierCLI(LightningCLI):
    """The model learns its input shape and its number of classes from the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what the data knows to the model."""
        for name in ("in_shape", "num_classes"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Name the cluster environment, where the user names no plugin."""
        if not self._get(self.config_init, "trainer.plugins"):
            kwargs["plugins"] = [cluster_environment()]
        return super().instantiate_trainer(**kwargs)


def run_lightning(arguments: list[str]) -> int:
    """Run a verb of LightningCLI; it ends the process itself where an argument is wrong (exit code 2)."""
    trainer_defaults: dict[str, Any] = {"max_epochs": 10, "enable_progress_bar": True}
    ClassifierCLI(
        NormClassifier,
        DataModule,
        args=arguments,
        save_config_callback=LogConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=trainer_defaults,
        seed_everything_default=False,
        parser_kwargs={"prog": "bnbench"},
    )
    return 0

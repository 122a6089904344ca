"""Norms that follow the training: reference batches, and batch normalization that is frozen on the way."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bnbench.data import Arrays, generator, load_split, step_indices
from bnbench.engine.checkpoint import Checkpoint
from bnbench.engine.chunked import ChunkedClassifier
from bnbench.engine.rows import module_arguments, normalized_together
from bnbench.engine.train import Place, train
from bnbench.lit import NormClassifier
from bnbench.registry import BadInput
from bnbench.study.trial import Trial
from bnbench.tracking.draft import _normalization_batch_size

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
MLP = {"model": "mlp", "model_options": {"depth": 2, "width": 12}}
ROW = Trial(data="digits", n_train=200, batch_size=16, steps=20, lr=0.05, score_on="test", **MLP)
NOISE_FREE = {"norm": "virtual_batch", "norm_options": {"own_weight": 0, "reference_size": 100}}
FROZEN = {"norm": "frozen_batch", "norm_options": {"freeze_after": 0.3, "learn_affine": True}}
NORMS = {"virtual": {"norm": "virtual_batch"}, "noise-free": NOISE_FREE, "frozen": FROZEN}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def place(folder, tmp_path):
    return Place(folder, tmp_path)


def weights_of(row: Trial, place: Place) -> dict[str, torch.Tensor]:
    return load_file(place.runs / "weights" / f"{row.key}.safetensors")


def train_part(row: Trial, folder) -> Arrays:
    return load_split(row.data, row.data_seed, folder=folder, n_train=row.n_train).train


def batches_of(row: Trial, folder) -> list[tuple[torch.Tensor, torch.Tensor]]:
    part = train_part(row, folder)
    indices = step_indices(len(part), row.batch_size, 0, row.steps, row.seed, row.score_on)
    return [(part.x[i].to(torch.float64), part.y[i]) for i in indices]


def reference_of(row: Trial, folder, size: int) -> torch.Tensor:
    part = train_part(row, folder)
    order = torch.randperm(len(part), generator=generator(row.seed, row.score_on, "reference", "order", 0))
    return part.x[order[:size]].double()


MODELS = {
    "mlp": MLP,
    "signals": {
        "model": "cnn",
        "model_options": {"depth": 2, "channels": 6},
        "data": "mnist1d",
        "n_train": 200,
    },
    "images": {"model": "cnn", "model_options": {"depth": 2, "channels": 6}, "augment": "crop-flip"},
    "residual": {"model": "resnet20", "model_options": {"width": 4}},
}


@each_norm
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_each_model_learns_with_it(norm, model, place):
    result = train(ROW.replace(**norm, **model, curve_points=3), place)
    assert result.status == "done", result.reason
    assert result.metrics["train/loss"] < result.metrics["train/loss_initial"]


# Against other computations


@each_norm
def test_the_engine_equals_a_plain_trainer(norm, place):
    row = ROW.replace(precision="64-true", clip_norm=0.5, dropout=0.0, **norm)
    assert train(row, place).status == "done"
    module = NormClassifier(**module_arguments(row))
    if row.norm == "virtual_batch":
        module.reference = reference_of(row, place.data, row.norm_options.get("reference_size", 16))
    trainer = L.Trainer(
        **QUIET, enable_checkpointing=False, max_epochs=1, precision="64-true", gradient_clip_val=0.5
    )
    trainer.fit(module, train_dataloaders=DataLoader(batches_of(row, place.data), batch_size=None))
    assert module.model.training
    torch.testing.assert_close(
        weights_of(row, place), dict(module.model.state_dict()), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("own_weight", [None, 0])
def test_the_engine_equals_a_bare_loop_that_runs_the_reference_first(own_weight, place):
    row = ROW.replace(precision="64-true", norm="virtual_batch", norm_options={"own_weight": own_weight})
    assert train(row, place).status == "done"
    module = NormClassifier(**module_arguments(row)).double()
    reference, w = reference_of(row, place.data, 16), 1 / 17 if own_weight is None else 0.0
    parameters = dict(module.model.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=row.lr, momentum=row.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, row.steps)

    def run(x: torch.Tensor, known: list | None) -> tuple[torch.Tensor, list]:
        """Logits, and each layer's statistics of x; where some are known, x is normalized by mixtures."""
        hidden, statistics = x.flatten(1), []
        for at in range(2):
            name = f"layers.{at}"
            z = hidden @ parameters[f"{name}.linear.weight"].T
            mean, square = z.mean(0), z.square().mean(0)
            statistics.append((mean, square))
            if known:
                mean, square = (1 - w) * known[at][0] + w * z, (1 - w) * known[at][1] + w * z.square()
            z = (z - mean) / (square - mean**2 + 1e-5).sqrt()
            hidden = (z * parameters[f"{name}.norm.weight"] + parameters[f"{name}.norm.bias"]).relu()
        return hidden @ parameters["head.weight"].T + parameters["head.bias"], statistics

    for x, y in batches_of(row, place.data):
        optimizer.zero_grad()
        logits, _ = run(x, run(reference, None)[1])
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        schedule.step()
    saved = weights_of(row, place)
    for name, value in parameters.items():
        torch.testing.assert_close(saved[name], value.detach(), rtol=1e-9, atol=1e-9)
    for at, (mean, square) in enumerate(run(reference, None)[1]):
        torch.testing.assert_close(saved[f"layers.{at}.norm.running_mean"], mean.detach())
        torch.testing.assert_close(saved[f"layers.{at}.norm.running_var"], (square - mean**2).detach())


def test_the_reference_is_of_the_size_asked_for_and_evaluation_needs_no_other_statistics(place):
    row = ROW.replace(**NOISE_FREE)
    result = train(row, place)
    assert int(weights_of(row, place)["layers.0.norm.reference_samples"]) == 100
    for part in ("val", "test"):
        for score in ("loss", "acc"):
            assert result.metrics[f"{part}/{score}"] == result.metrics[f"{part}/{score}_precise"]


def test_until_it_is_frozen_a_row_is_that_of_batch_normalization_to_the_last_bit(place):
    batch, frozen = (
        train(ROW.replace(curve_points=20, norm=norm, norm_options=options), place)
        for norm, options in (("batch", {}), ("frozen_batch", {"freeze_after": 0.99, "learn_affine": True}))
    )
    assert frozen.curve["step"] == batch.curve["step"]
    assert frozen.curve["train/loss"] == batch.curve["train/loss"]
    # Curves are drawn with precise statistics; the last point comes after the layers have been frozen.
    assert frozen.curve["val/loss"][:-1] == batch.curve["val/loss"][:-1]
    assert frozen.curve["val/loss"][-1] != batch.curve["val/loss"][-1]
    assert frozen.metrics["test/loss"] == batch.metrics["test/loss"] != batch.metrics["test/loss_precise"]
    assert frozen.metrics["test/loss_precise"] == frozen.metrics["test/loss"]


def test_frozen_statistics_stay_those_of_the_moment_of_freezing(place):
    row = ROW.replace(**FROZEN)
    train(row, place)
    short = row.replace(
        steps=6, schedule="constant", norm_options={"freeze_after": 0.99, "learn_affine": True}
    )
    whole = row.replace(schedule="constant")
    for each in (short, whole):
        train(each, place)
    before, after = weights_of(short, place), weights_of(whole, place)
    for name in before:
        assert torch.equal(before[name], after[name]) == ("running" in name), name


# Stopped and resumed


class Stopped(BaseException):
    """What ends a training in a test, as a killed process would."""


# Blocks end at the curve's points, the steps 2, 5, 12 and 20; the layers are frozen after step 6.
@each_norm
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_resumed_training_is_bitwise_the_undisturbed_one(norm, number, folder, tmp_path, monkeypatch):
    row = ROW.replace(**norm, dropout=0.2, curve_points=0)
    monkeypatch.setattr("bnbench.engine.replica.curve_steps", lambda steps, points: [2, 5, 12, 20])
    undisturbed = train(row, Place(folder, tmp_path / "undisturbed"))
    save, seen = Checkpoint.maybe_save, []

    def stop_after_saving(self, model, optimizer, progress):
        save(self, model, optimizer, progress)
        seen.append(progress.step)
        if len(seen) == number:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpoint, "maybe_save", stop_after_saving)
        train(row, Place(folder, tmp_path), save_every=0.0)
    assert seen == [2, 5, 12, 20][:number]
    resumed = train(row, Place(folder, tmp_path))
    assert (resumed.measured(), resumed.curve) == (undisturbed.measured(), undisturbed.curve)
    first, second = (weights_of(row, Place(folder, runs)) for runs in (tmp_path, tmp_path / "undisturbed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# What the record and MLflow say


@pytest.mark.parametrize(
    ("norm", "options", "size"),
    [
        ("virtual_batch", {"reference_size": 100}, None),
        ("frozen_batch", {}, None),
        ("frozen_batch", {"freeze_after": 0.3}, 16),
    ],
)
def test_the_record_says_how_many_samples_are_normalized_together(norm, options, size):
    row = ROW.replace(norm=norm, norm_options=options)
    assert normalized_together(row) == _normalization_batch_size(row) == size


# What cannot be


def test_a_reference_larger_than_the_data_is_refused_in_one_line(place):
    row = ROW.replace(norm="virtual_batch", norm_options={"reference_size": 201})
    with pytest.raises(
        BadInput, match="reference_size is 201, but there are 200 training samples; use 2 to 200"
    ):
        train(row, place)


def test_layers_that_want_different_references_are_refused_in_one_line(place):
    row = ROW.replace(norm="virtual_batch", last_norm_options={"reference_size": 100})
    with pytest.raises(BadInput, match="reference_size is 16 and 100 in one model"):
        train(row, place)


# Under a plain Trainer


def classifier(norm: str = "virtual_batch", **options) -> NormClassifier:
    return NormClassifier(
        "mlp",
        norm,
        norm_options=options,
        in_shape=(6,),
        num_classes=3,
        model_options={"depth": 1, "width": 5},
    )


def loader(batches: int = 5) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(batches)],
        batch_size=None,
    )


def trainer_of(tmp_path, **arguments) -> L.Trainer:
    return L.Trainer(**QUIET | {"default_root_dir": tmp_path, "max_epochs": 1} | arguments)


def test_a_plain_trainer_takes_the_first_batch_and_keeps_its_statistics_current(tmp_path):
    module, data = classifier(), loader()
    trainer_of(tmp_path, enable_checkpointing=False).fit(module, data, data)
    first = next(iter(data))[0]
    assert torch.equal(module.reference, first)
    hidden = module.model.layers[0].linear(first)
    norm = module.model.layers[0].norm
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, hidden.var(0, correction=0))


def test_a_plain_trainer_asks_for_a_reference_that_the_first_batch_is_too_small_for(tmp_path):
    with pytest.raises(BadInput, match=r"reference_size is 16, the first batch 8: set `module\.reference`"):
        trainer_of(tmp_path, enable_checkpointing=False).fit(classifier(reference_size=16), loader())


def test_a_reference_of_a_plain_trainer_outlasts_a_checkpoint(tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="last")
    module = classifier()
    trainer_of(tmp_path, callbacks=[saved]).fit(module, loader())
    again = classifier()
    other = DataLoader([(torch.ones(8, 6) * torch.arange(8)[:, None], torch.arange(8) % 3)], batch_size=None)
    trainer = trainer_of(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(again, other, ckpt_path=saved.best_model_path, weights_only=True)
    assert trainer.global_step == 6
    assert torch.equal(again.reference, module.reference)


def test_a_plain_trainer_freezes_at_its_share_of_the_training(tmp_path):
    module, seen = classifier("frozen_batch", freeze_after=0.5), []
    norm = module.model.layers[0].norm
    norm.register_forward_hook(lambda layer, inputs, output: seen.append(layer.running_mean.clone()))
    trainer_of(tmp_path, enable_checkpointing=False).fit(module, loader(6))
    moved = [not torch.equal(a, b) for a, b in zip([torch.zeros(5), *seen[:-1]], seen, strict=True)]
    assert moved == [True, True, True, False, False, False]


def test_devices_of_a_plain_trainer_do_not_choose_a_reference_each_for_itself(monkeypatch, tmp_path):
    module, trainer = classifier(), trainer_of(tmp_path, enable_checkpointing=False)
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    module.trainer = trainer
    module.on_fit_start()
    with pytest.raises(BadInput, match="each device would take its own first batch"):
        module.run_training_batch(torch.randn(8, 6))
    module.reference = torch.randn(8, 6)
    assert module.run_training_batch(torch.randn(4, 6)).shape == (4, 3)


def test_the_engine_draws_the_same_reference_again_and_another_for_another_seed():
    data = Arrays(torch.randn(40, 6), torch.arange(40) % 3)
    references = [
        ChunkedClassifier(
            model="mlp",
            norm="virtual_batch",
            train=data,
            batch_size=8,
            training_seed=(seed, "test"),
            in_shape=(6,),
            num_classes=3,
            steps=10,
        ).reference
        for seed in (0, 0, 1)
    ]
    assert torch.equal(references[0], references[1])
    assert not torch.equal(references[0], references[2])
    assert all(any(torch.equal(row, x) for x in data.x) for row in references[0])
    assert len(references[0].unique(dim=0)) == 8

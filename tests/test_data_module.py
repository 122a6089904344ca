"""The LightningDataModule under a real Trainer."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from bnbench.data import DataModule, load_split, load_test, step_indices
from bnbench.registry import BadInput

DIGITS = {"name": "digits", "batch_size": 100, "data_seed": 2, "n_train": 250, "label_noise": 0.1}


class Recorder(L.LightningModule):
    """Keep every batch, train one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch):
        self.seen["train"].append((self.current_epoch, *batch))
        return self.number

    def validation_step(self, batch):
        self.seen["val"].append(batch)

    def test_step(self, batch):
        self.seen["test"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path):
    return L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )


# Of Lightning: advice on small runs, and a call that torch 2.13 calls outdated.
LIGHTNING_TALK = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging interval",
    "ignore:.*LeafSpec:FutureWarning",
)


@LIGHTNING_TALK
def test_fit_and_test_see_the_data_of_load_split_and_load_test(trainer, tmp_path):
    data, model = DataModule(**DIGITS, folder=tmp_path), Recorder()
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    split = load_split("digits", 2, folder=tmp_path, n_train=250, label_noise=0.1)
    order = step_indices(250, 100, 0, 4, 2)
    assert [epoch for epoch, _, _ in model.seen["train"]] == [0, 0, 1, 1]
    for (_, x, y), index in zip(model.seen["train"], order, strict=True):
        assert torch.equal(x, split.train.x[index])
        assert torch.equal(y, split.train.y[index])
    epoch = model.seen["val"][: len(model.seen["val"]) // 2]
    assert torch.equal(torch.cat([x for x, _ in epoch]), split.val.x)
    assert torch.equal(torch.cat([y for _, y in epoch]), split.val.y)
    test = load_test("digits", 2, folder=tmp_path)
    assert torch.equal(torch.cat([x for x, _ in model.seen["test"]]), test.x)
    assert torch.equal(torch.cat([y for _, y in model.seen["test"]]), test.y)


@LIGHTNING_TALK
def test_data_are_prepared_by_the_trainer(trainer, tmp_path):
    data = DataModule("cifar10", batch_size=500, folder=tmp_path, options={"synthetic": True})
    model = Recorder()
    trainer.fit(model, data)
    assert [x.shape for _, x, _ in model.seen["train"]] == [(500, 3, 32, 32)] * 4
    assert (data.in_shape, data.num_classes) == ((3, 32, 32), 10)


def test_impossible_modules_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no data set named 'digit'; did you mean 'digits'"):
        DataModule("digit")
    with pytest.raises(BadInput, match="has no option 'synthetic'"):
        DataModule("digits", options={"synthetic": True})
    with pytest.raises(BadInput, match="batch_size is 0"):
        DataModule("digits", batch_size=0)
    with pytest.raises(BadInput, match="batch_size is 1078, but there are 1077"):
        DataModule("digits", batch_size=1078, folder=tmp_path).setup("fit")
    with pytest.raises(BadInput, match=r"call setup\('test'\)"):
        DataModule("digits", folder=tmp_path).test_dataloader()


def test_training_and_validation_do_not_load_the_test_data(tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("test data were read")

    monkeypatch.setattr("bnbench.data.module.load_test", forbidden)
    data = DataModule("digits", folder=tmp_path)
    for stage in ("fit", "validate"):
        data.setup(stage)
    assert len(data.train_dataloader()) == 1077 // 64
    assert len(data.val_dataloader()) == 6

"""One row on two devices: the numbers, against one process on the joined batch and against a bare loop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from safetensors.torch import load_file
from torch.nn import functional as F

from bnbench.cli.lightning import run_lightning
from bnbench.data import load_split, step_indices
from bnbench.engine.chunked import ChunkedClassifier
from bnbench.engine.distributed import Group, cluster_environment, launcher
from bnbench.engine.ranks import run_ranks
from bnbench.engine.rows import check_trial, module_arguments
from bnbench.engine.train import Place, train
from bnbench.lit import NormClassifier
from bnbench.record import Record
from bnbench.registry import BadInput
from bnbench.study.table import Entry
from bnbench.study.trial import Trial
from bnbench.tracking import publish
from tests.test_engine_train import assert_plain, folder
from tests.tracking_records import MAIN, STUDY_HASH, definition, empty_store, runs, runs_of, store

__all__ = ["empty_store", "folder", "runs", "store"]  # fixtures

MLP = {"model": "mlp", "model_options": {"depth": 2, "width": 12}}
CNN = {"model": "cnn", "model_options": {"depth": 2, "channels": 6}}
#: Two devices with half of the batch each.
ROW = Trial(
    data="digits",
    n_train=200,
    norm="sync_batch",
    batch_size=8,
    devices=2,
    steps=20,
    lr=0.05,
    precision="64-true",
    score_on="test",
    curve_points=4,
    **MLP,
)
VARIANTS = {
    "synchronized": {},
    "images": CNN,
    "decay, clipping, smoothing": {"weight_decay": 0.01, "clip_norm": 0.3, "label_smoothing": 0.1},
    "one sample a device": {"batch_size": 1},
    "no norm": {"norm": "none"},
    "group": CNN | {"norm": "group"},
    "reference batch": CNN | {"norm": "virtual_batch"},
}


def joined(row: Trial) -> Trial:
    """The same training on one device."""
    norm = "batch" if row.norm == "sync_batch" else row.norm
    return row.replace(devices=1, batch_size=row.global_batch, norm=norm)


def assert_close(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-9, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )


def weights_of(row: Trial, place: Place) -> dict[str, torch.Tensor]:
    return load_file(place.runs / "weights" / f"{row.key}.safetensors")


# Against one process


def take_steps(row: Trial, data: str) -> dict[str, torch.Tensor]:
    """Gradients of the first and the last step, and the state after both; in a rank, those of the group."""
    group = Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group()
    part = load_split(row.data, row.data_seed, folder=Path(data), n_train=row.n_train).train
    x_all = part.x.double()
    module = ChunkedClassifier(
        train=part,
        batch_size=row.batch_size,
        training_seed=(0, "test"),
        clip_norm=row.clip_norm,
        group=group,
        **module_arguments(row),
    ).double()
    optimizer = module.prepare()
    seen: dict[str, torch.Tensor] = {}
    update = optimizer.step
    names = [n for p in optimizer.parameters for n, q in module.model.named_parameters() if p is q]

    def keep(gradients, lr) -> None:
        if step in (0, row.steps - 1):
            seen.update({f"{step}: {n}": g.clone() for n, g in zip(names, gradients, strict=True)})
        update(gradients, lr)

    optimizer.step = keep
    module.train()
    for step, index in enumerate(step_indices(len(part), row.global_batch, 0, row.steps, 0, "test")):
        share = group.share_of(index)
        seen[f"{step}: loss"] = module._step(step, x_all[share], part.y[share]).clone()
        if step in (0, row.steps - 1):
            seen |= {f"{step}: state of {k}": v.clone() for k, v in module.model.state_dict().items()}
    return seen


def take_steps_of_all(rows: list[Trial], data: str) -> list[list[dict[str, torch.Tensor]]]:
    """What every rank has seen of every row."""
    told: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(told, [take_steps(row, data) for row in rows])
    return told


@pytest.fixture(scope="module")
def seen_by_ranks(folder):
    rows = [ROW.replace(**changes) for changes in VARIANTS.values()]
    arguments = {"rows": rows, "data": str(folder)}
    by_rank = run_ranks(take_steps_of_all, arguments, 2, device="cpu", timeout=60.0)
    return dict(zip(VARIANTS, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_rank_steps_as_one_process_on_the_joined_batch(name, seen_by_ranks, folder):
    """Losses of all steps; gradients, weights and running statistics after 1 and 20 steps."""
    wanted = take_steps(joined(ROW.replace(**VARIANTS[name])), str(folder))
    assert sum("state of" in key for key in wanted) > 8
    for of_a_rank in seen_by_ranks[name]:
        assert_close(of_a_rank, wanted)


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory) -> Place:
    return Place(folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def synchronized(place):
    return train(ROW, place)


@pytest.fixture(scope="module")
def local(place):
    return train(ROW.replace(norm="batch"), place)


def test_a_synchronized_row_is_measured_as_its_joined_one(synchronized, place):
    alone = train(joined(ROW), place)
    assert (synchronized.status, synchronized.reason) == ("done", "")
    assert_plain(synchronized)
    assert synchronized.measured() == pytest.approx(alone.measured(), rel=1e-9)
    assert synchronized.curve["step"] == alone.curve["step"]
    for name, series in alone.curve.items():
        assert synchronized.curve[name] == pytest.approx(series, rel=1e-9)
    assert_close(weights_of(ROW, place), weights_of(joined(ROW), place))


def test_local_statistics_are_those_of_a_bare_loop_over_both_shares(local, synchronized, place):
    """Each share is normalized alone, gradients are averaged, and running statistics are rank 0's."""
    row = ROW.replace(norm="batch")
    assert local.status == "done", local.reason
    assert local.measured() != synchronized.measured()
    model = NormClassifier(**module_arguments(row)).model.double().train()
    part = load_split("digits", 0, folder=place.data, n_train=200).train
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=row.momentum)
    for step, index in enumerate(step_indices(200, 16, 0, row.steps, row.seed, "test")):
        optimizer.param_groups[0]["lr"] = row.lr * 0.5 * (1 + math.cos(math.pi * step / row.steps))
        optimizer.zero_grad()
        before = [value.clone() for value in model.buffers()]
        (F.cross_entropy(model(part.x[index[8:]].double()), part.y[index[8:]]) / 2).backward()
        for value, earlier in zip(model.buffers(), before, strict=True):
            value.copy_(earlier)
        (F.cross_entropy(model(part.x[index[:8]].double()), part.y[index[:8]]) / 2).backward()
        optimizer.step()
    assert_close(weights_of(row, place), model.state_dict())


def state_of_all(row: Trial, place: Place) -> list[dict[str, torch.Tensor]]:
    """Train in a rank, and gather the states in which all ranks end."""
    states = []
    end = ChunkedClassifier.on_train_batch_end

    def keep(self, outputs, batch, batch_idx) -> None:
        end(self, outputs, batch, batch_idx)
        states[:] = [{name: value.clone() for name, value in self.model.state_dict().items()}]

    ChunkedClassifier.on_train_batch_end = keep
    assert train(row, place).status == "done"
    told: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(told, states[0])
    return told


@pytest.mark.parametrize("changes", [{"norm": "batch"}, {"norm": "batch", "dropout": 0.3, **CNN}])
def test_all_ranks_end_with_one_state(changes, folder, tmp_path):
    row = ROW.replace(**changes)
    arguments = {"row": row, "place": Place(folder, tmp_path)}
    first, second = run_ranks(state_of_all, arguments, 2, device="cpu", timeout=60.0)
    assert any("running_var" in name for name in first)
    for name, value in first.items():
        assert torch.equal(second[name], value), name
    assert_close(first, weights_of(row, arguments["place"]))


def test_ranks_draw_dropout_for_themselves(folder, monkeypatch):
    monkeypatch.setattr(Group, "average", lambda self, loss, gradients, buffers: (loss, gradients))
    part = load_split("digits", 0, folder=folder, n_train=200).train
    losses = []
    for group in (Group(), Group(0, 2), Group(1, 2)):
        module = ChunkedClassifier(
            train=part,
            batch_size=8,
            training_seed=(0, "test"),
            group=group,
            **module_arguments(ROW.replace(norm="none", dropout=0.5, precision="32-true")),
        )
        module.prepare()
        losses.append(float(module.train()._step(0, part.x[:8], part.y[:8])))
    assert losses[0] == losses[1] != losses[2]


def test_bf16_on_two_devices_keeps_statistics_in_single_precision(place):
    row = ROW.replace(precision="bf16-mixed", curve_points=0)
    result = train(row, place)
    assert result.status == "done", result.reason
    assert {v.dtype for v in weights_of(row, place).values()} == {torch.float32, torch.int64}


def test_a_loss_that_is_not_finite_on_one_rank_ends_the_training_of_both(place):
    row = ROW.replace(model=f"{__name__}:InfiniteOnRank1", model_options={}, norm="none")
    result = train(row, place)
    assert (result.status, result.reason) == ("diverged", "the loss became infinite or NaN")


class InfiniteOnRank1(torch.nn.Module):
    """A linear classifier whose logits become NaN on the second rank alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x.flatten(1))
        return logits * float("nan") if self.training and dist.get_rank() == 1 else logits


class DrawsAnywhere(torch.nn.Module):
    """A linear classifier whose weights no seed determines."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, num_classes)
        torch.nn.init.constant_(self.linear.weight, dist.get_rank() if dist.is_initialized() else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


def test_ranks_that_begin_with_different_weights_are_found_out(place):
    row = ROW.replace(model=f"{__name__}:DrawsAnywhere", model_options={}, norm="none")
    result = train(row, place)
    assert result.status == "failed"
    assert result.brief.endswith(
        "the ranks have different initial weights; draw them with torch alone, which is seeded"
    )


def test_provenance_names_world_and_batches(synchronized, local):
    for result, nbs in ((synchronized, 16), (local, 8)):
        sizes = {name: result.provenance[name] for name in ("world_size", "global_batch", "nbs")}
        assert sizes == {"world_size": 2, "global_batch": 16, "nbs": nbs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch", "batch_size": 1}, "cannot train on a batch of 1 sample"),
        ({"num_nodes": 2}, "num_nodes is 2: start the row on all nodes at once, by torchrun"),
        ({"batch_size": 101}, "batch_size is 101 on each of 2 devices, but there are 200 training samples"),
        ({"norm": "ghost_batch", "norm_options": {"ghost_size": 16}}, "does not divide the batch of 8"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(changes, message, place):
    with pytest.raises(BadInput, match=message) as refusal:
        train(ROW.replace(**changes), place)
    assert "\n" not in str(refusal.value)
    check_trial(ROW.replace(batch_size=1))  # two samples share the statistics


# Who started it

BATCH_JOB = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.parametrize(
    ("environ", "started_by", "kind"),
    [
        ({}, None, LightningEnvironment),
        (BATCH_JOB, None, LightningEnvironment),
        (BATCH_JOB | {"SLURM_STEP_NUM_TASKS": "1"}, None, LightningEnvironment),
        (BATCH_JOB | {"SLURM_STEP_NUM_TASKS": "2"}, "srun", SLURMEnvironment),
        (BATCH_JOB | {"TORCHELASTIC_RUN_ID": "none"}, "torchrun", TorchElasticEnvironment),
    ],
)
def test_the_launcher_is_known_by_its_own_variables(environ, started_by, kind, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert launcher(environ) == launcher() == started_by
    environment = cluster_environment()
    assert type(environment) is kind
    assert not getattr(environment, "auto_requeue", False)


class TellsItsPlace(torch.nn.Module):
    """A linear classifier that writes down how many processes there are and what SIGUSR1 would do."""

    def __init__(self, num_classes: int, path: str) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, num_classes)
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import signal

        if self.training:
            said = [dist.get_world_size(), str(signal.getsignal(signal.SIGUSR1))]
            Path(f"{self.path}.{dist.get_rank()}").write_text(json.dumps(said))
        return self.linear(x.flatten(1))


def test_two_devices_in_a_batch_job_are_two_and_put_nothing_into_the_queue(place, tmp_path, monkeypatch):
    for name, value in BATCH_JOB.items():
        monkeypatch.setenv(name, value)
    by_itself = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    assert by_itself.world_size == 1, "Lightning has learnt; the environment need not be named any more"
    options = {"path": str(tmp_path / "said")}
    row = ROW.replace(model=f"{__name__}:TellsItsPlace", model_options=options, norm="none", steps=2)
    assert train(row, place).status == "done"
    for rank in (0, 1):
        assert json.loads((tmp_path / f"said.{rank}").read_text()) == [2, "0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Lightning's use of jsonargparse
@pytest.mark.parametrize(("devices", "world_size"), [("1", 1), ("2", 2)])
def test_bnbench_fit_names_the_cluster_environment_too(devices, world_size, monkeypatch):
    for name, value in BATCH_JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["bnbench"])
    trainers = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, *arguments, **options: trainers.append(self))
    arguments = ["fit", "--data.name", "digits", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    run_lightning([*arguments, "--trainer.devices", devices, "--trainer.enable_progress_bar", "false"])
    (trainer,) = trainers
    assert trainer.world_size == world_size
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)


# What is published


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow and SQLAlchemy use what each other has
def test_a_row_of_two_processes_is_one_run_in_mlflow(local, synchronized, runs, store):
    results = {"batch": local, "sync_batch": synchronized}
    entries = [
        Entry("pair", norm, 0, "own", ROW.replace(norm=norm), result) for norm, result in results.items()
    ]
    record = Record(runs / "bnbench.db")
    record.register(STUDY_HASH, definition(["pair"], list(results)))
    record.append([(entry.trial, entry.result) for entry in entries])
    record.enroll(STUDY_HASH, entries)
    publish(record, store)
    record.close()
    trainings = [run for run in runs_of(store, MAIN) if run.data.tags["bnbench.level"] == "training"]
    shown = {run.data.params["norm"]: run.data for run in trainings}
    assert len(trainings) == len(shown) == 2
    for norm, nbs in (("batch", "8"), ("sync_batch", "16")):
        assert shown[norm].metrics["test/acc"] == results[norm].metrics["test/acc"]
        assert shown[norm].tags["bnbench.world_size"] == "2"
        params = {name: shown[norm].params[name] for name in ("devices", "batch_size", "nbs", "global_batch")}
        assert params == {"devices": "2", "batch_size": "8", "nbs": nbs, "global_batch": "16"}

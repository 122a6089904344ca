"""Stopping a training, by whatever means, and going on from its checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time

import pytest
import torch
from torch import nn

from bnbench.engine.checkpoint import Checkpoint, Progress
from bnbench.engine.chunked import ChunkedClassifier, FusedSGD
from bnbench.engine.train import Place, train
from bnbench.study.trial import Trial

ROW = Trial(
    data="digits",
    n_train=100,
    label_noise=0.1,
    augment="crop-flip",
    model="cnn",
    model_options={"depth": 2, "channels": 4},
    norm="batch",
    dropout=0.2,
    weight_decay=1e-3,
    warmup=0.1,
    clip_norm=1.0,
    batch_size=10,
    steps=75,
    curve_points=5,
)


class Stopped(BaseException):
    """What ends a training in a test, as a killed process would."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    return train(ROW, Place(folder, tmp_path_factory.mktemp("runs")))


def stop_at_block(monkeypatch, number: int) -> list[int]:
    """Make the training stop once, after this block was saved; returns the steps at which blocks end."""
    seen: list[int] = []
    save = Checkpoint.maybe_save

    def stop_after_saving(self, model, optimizer, progress):
        save(self, model, optimizer, progress)
        seen.append(progress.step)
        if len(seen) == number:
            raise Stopped

    monkeypatch.setattr(Checkpoint, "maybe_save", stop_after_saving)
    return seen


def same(result, other) -> bool:
    return result.status == other.status and result.has_same_numbers(other)


# The blocks end at the steps 32, 43, 49, 57, 65 and 75: at curve points and between them.
@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_a_resumed_training_is_bitwise_the_undisturbed_one(
    number, undisturbed, folder, tmp_path, monkeypatch
):
    place = Place(folder, tmp_path)
    seen = stop_at_block(monkeypatch, number)
    with pytest.raises(Stopped):
        train(ROW, place, save_every=0.0)
    assert (tmp_path / "checkpoints" / f"{ROW.key}.pt").exists()
    stopped_at, begun = seen[-1], []
    block = ChunkedClassifier.training_step
    monkeypatch.setattr(
        ChunkedClassifier,
        "training_step",
        lambda self, batch, index: (begun.append(batch[0]), block(self, batch, index))[1],
    )
    resumed = train(ROW, place)
    assert begun[:1] == ([stopped_at] if stopped_at < ROW.steps else [])
    assert undisturbed.status == "done"
    assert same(resumed, undisturbed)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("where", ["first block", "middle", "last block"])
def test_a_row_with_a_target_stops_where_it_stops_undisturbed(where, folder, tmp_path, monkeypatch):
    """A checkpoint of its last block knows that the target is reached."""
    row = ROW.replace(curve_points=2, until_train_nll=2.316)
    with monkeypatch.context() as patch:
        blocks = stop_at_block(patch, 0)
        whole = train(row, Place(folder, tmp_path / "whole"))
    assert whole.metrics["train/reached"] == 1.0
    assert 8 <= whole.metrics["train/steps"] == blocks[-1] < 65
    number = {"first block": 1, "middle": len(blocks) // 2, "last block": len(blocks)}[where]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_block(patch, number)
        train(row, Place(folder, tmp_path), save_every=0.0)
    assert same(train(row, Place(folder, tmp_path)), whole)


def test_a_training_may_be_stopped_again_and_again(undisturbed, folder, tmp_path, monkeypatch):
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at_block(patch, 2)
            train(ROW, Place(folder, tmp_path), save_every=0.0)
    assert same(train(ROW, Place(folder, tmp_path)), undisturbed)


class NaNAfter32(nn.Module):
    """A poor classifier whose logits are NaN from the 33rd step on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps.add_(1)
        return 30 * self.linear(x.flatten(1)) * (float("nan") if self.steps > 32 else 1.0)


def test_the_last_finite_loss_outlasts_a_stop(folder, tmp_path, monkeypatch):
    row = ROW.replace(model=f"{__name__}:NaNAfter32", model_options={}, lr=1e-9, curve_points=0)
    whole = train(row, Place(folder, tmp_path))
    assert whole.status == "diverged"
    assert whole.metrics["val/loss"] > 3
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_block(patch, 1)
        train(row, Place(folder, tmp_path), save_every=0.0)
    assert same(train(row, Place(folder, tmp_path)), whole)


class Evil:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return os.mkdir, ("evil was here",)


def of_another_torch(whole: bytes, path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"torch": "1.0"}, path)


def of_another_shape(whole: bytes, path) -> None:
    state = torch.load(path, weights_only=True)
    state["tensors"][0] = state["tensors"][0][1:]
    torch.save(state, path)


SPOILT = {
    "empty": lambda whole, path: path.write_bytes(b""),
    "half written": lambda whole, path: path.write_bytes(whole[: len(whole) // 2]),
    "a few bytes wrong": lambda whole, path: path.write_bytes(whole[:200] + b"wrong" + whole[205:]),
    "something else": lambda whole, path: torch.save([1, 2], path),
    "another torch": of_another_torch,
    "another shape": of_another_shape,
    "code": lambda whole, path: path.write_bytes(pickle.dumps(Evil())),
    "code in a zip": lambda whole, path: torch.save(Evil(), path),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_checkpoint_that_cannot_be_used_is_ignored(spoil, undisturbed, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoints" / f"{ROW.key}.pt"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at_block(patch, 3)
        train(ROW, Place(folder, tmp_path), save_every=0.0)
    whole = path.read_bytes()
    spoil(whole, path)
    assert path.read_bytes() != whole
    model, optimizer = nn.Linear(2, 2), FusedSGD([], 0.9)
    assert Checkpoint(path).restore(model, optimizer) == Progress()
    assert same(train(ROW, Place(folder, tmp_path)), undisturbed)
    assert not (tmp_path / "evil was here").exists()
    assert not path.exists()


def test_what_a_killed_process_left_half_written_is_removed_and_others_stay(folder, tmp_path):
    left, other = tmp_path / "checkpoints" / f"{ROW.key}.4711", tmp_path / "checkpoints" / "0123.pt"
    left.parent.mkdir()
    left.write_bytes(b"half")
    other.write_bytes(b"of another row")
    assert train(ROW.replace(steps=2), Place(folder, tmp_path)).status == "done"
    assert left.exists()
    assert train(ROW, Place(folder, tmp_path)).status == "done"
    assert [file.name for file in left.parent.iterdir()] == [other.name]


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_training(undisturbed, folder, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert same(train(ROW, Place(folder, tmp_path), save_every=0.0), undisturbed)


def test_checkpoints_are_written_as_often_as_asked(tmp_path):
    model, optimizer = nn.Linear(2, 2), FusedSGD([], 0.9)
    rare, often = Checkpoint(tmp_path / "rare.pt", every=1000.0), Checkpoint(tmp_path / "often.pt", every=0.0)
    for checkpoint in (rare, often):
        checkpoint.maybe_save(model, optimizer, Progress(step=3))
    assert not rare.path.exists()
    assert often.restore(nn.Linear(2, 2), optimizer).step == 3


def test_only_a_training_that_has_lasted_can_be_asked(tmp_path):
    assert not Checkpoint.ask()
    with Checkpoint(tmp_path / "short.pt", least=1000.0).during():
        assert not Checkpoint.ask()
    assert not Checkpoint.ask()


def test_a_training_that_fails_leaves_nobody_to_ask(tmp_path):
    with pytest.raises(RuntimeError), Checkpoint(tmp_path / "long.pt", least=0.0).during():
        raise RuntimeError
    assert not Checkpoint.ask()


LONG = ROW.replace(steps=1_000_000, curve_points=0)


def train_until_stopped(folder, runs, least: float, where: str) -> None:
    """A worker whose handler of SIGTERM asks for a checkpoint; it sends itself the signal at some place."""

    def end(signum, frame) -> None:
        if not Checkpoint.ask():
            os._exit(143)

    signal.signal(signal.SIGTERM, end)
    torch.set_num_threads(1)
    count = 0

    def act_once() -> None:
        nonlocal count
        count += 1
        if count == 3 and where == "from outside":
            (runs / "started").touch()
        elif count == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    step, save = ChunkedClassifier._step, Checkpoint.maybe_save
    if where == "after a block was saved":
        Checkpoint.maybe_save = lambda self, *a: (save(self, *a), act_once())[0]
    else:
        ChunkedClassifier._step = lambda self, *a: (act_once(), step(self, *a))[1]
    train(LONG, Place(folder, runs), save_least=least)


@pytest.fixture(scope="module")
def start():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bnbench.engine.train"])
    begun = []

    def start(*arguments):
        process = context.Process(target=train_until_stopped, args=arguments, daemon=True)
        process.start()
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    ("where", "least", "step"),
    [
        ("in a step", 0.0, 32),
        ("in a step", 1000.0, None),
        ("after a block was saved", 0.0, None),
    ],
)
def test_sigterm_ends_a_training_with_143_and_saves_a_long_one(where, least, step, start, folder, tmp_path):
    process = start(folder, tmp_path, least, where)
    process.join(60)
    assert process.exitcode == 143
    path = tmp_path / "checkpoints" / f"{LONG.key}.pt"
    assert path.exists() == (step is not None)
    if step is not None:
        assert torch.load(path, weights_only=True)["progress"]["step"] == step


def test_sigterm_from_outside_ends_a_long_training_with_a_checkpoint(start, folder, tmp_path):
    process = start(folder, tmp_path, 0.0, "from outside")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    saved = torch.load(tmp_path / "checkpoints" / f"{LONG.key}.pt", weights_only=True)
    assert saved["progress"]["step"] % 32 == 0

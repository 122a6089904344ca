"""Training a row: what it measures, and what becomes of it when something goes wrong."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import nn
from torch.nn import functional as F

from bnbench.data import load_split, load_test
from bnbench.engine import replica
from bnbench.engine.chunked import ChunkedClassifier
from bnbench.engine.conduct import train_row
from bnbench.engine.rows import module_arguments
from bnbench.engine.train import Place, train
from bnbench.lit import NormClassifier
from bnbench.norms.recalibrate import recalibrate
from bnbench.study.trial import Trial
from bnbench.tracking.live import LiveLog, read_live

ROW = Trial(
    data="digits",
    n_train=200,
    model="mlp",
    model_options={"depth": 2, "width": 16},
    batch_size=20,
    steps=40,
    lr=0.05,
)
K = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def place(folder, tmp_path):
    return Place(folder, tmp_path)


def assert_plain(result) -> None:
    json.dumps([result.metrics, result.curve, result.provenance, result.reason], allow_nan=False)
    assert len({len(series) for series in result.curve.values()}) <= 1


# What is measured


def test_a_confirmed_row_is_scored_as_its_saved_weights_say(place):
    row = ROW.replace(score_on="test", curve_points=4)
    result = train(row, place)
    assert result.status == "done", result.reason
    assert_plain(result)
    split = load_split("digits", 0, folder=place.data, n_train=200)
    test = load_test("digits", 0, folder=place.data)
    model = rebuilt(row, place)
    metrics = result.metrics
    for part, arrays in (("val", split.val), ("test", test)):
        logits = model(arrays.x)
        assert metrics[f"{part}/loss"] == pytest.approx(nll(logits, arrays.y), rel=1e-5)
        assert metrics[f"{part}/acc"] == pytest.approx(accuracy(logits, arrays.y))
    # The first 512 training samples, here 200, in batches as in training.
    recalibrate(model, split.train.x.split(20))
    model.eval()
    for part, arrays in (("val", split.val), ("test", test)):
        logits = model(arrays.x)
        assert metrics[f"{part}/loss_precise"] == pytest.approx(nll(logits, arrays.y), rel=1e-5)
        assert metrics[f"{part}/acc_precise"] == pytest.approx(accuracy(logits, arrays.y))
        assert metrics[f"{part}/loss_precise"] != metrics[f"{part}/loss"]
    assert metrics["train/loss"] == pytest.approx(nll(model(split.train.x), split.train.y), rel=1e-5)
    assert metrics["test/gap"] == pytest.approx(metrics["test/loss_precise"] - metrics["train/loss"])
    assert 0 <= metrics["test/ece"] <= 1
    assert metrics["chance"] == 0.1
    # The last point of the curve is the end of the training, with precise statistics.
    assert result.curve["step"][-1] == 40
    assert result.curve["val/loss"][-1] == pytest.approx(metrics["val/loss_precise"], rel=1e-5)


def rebuilt(row: Trial, place: Place) -> nn.Module:
    from safetensors.torch import load_file

    model = NormClassifier(**module_arguments(row)).model
    model.load_state_dict(load_file(place.runs / "weights" / f"{row.key}.safetensors"))
    return model.eval()


def nll(logits, y) -> float:
    return -logits.double().log_softmax(1)[torch.arange(len(y)), y].mean().item()


def accuracy(logits, y) -> float:
    return (logits.argmax(1) == y).float().mean().item()


def test_the_initial_loss_is_that_of_the_untrained_model(place):
    row = ROW.replace(norm="none")
    model = NormClassifier(**module_arguments(row)).model.eval()
    part = load_split("digits", 0, folder=place.data, n_train=200).train
    assert train(row, place).metrics["train/loss_initial"] == pytest.approx(
        nll(model(part.x), part.y), rel=1e-5
    )


def test_precise_recalibration_changes_the_scores_and_nothing_else(place):
    plain, precise = (train(ROW.replace(recalibration=kind), place) for kind in ("none", "precise"))
    changed = {name for name, value in plain.measured().items() if precise.measured()[name] != value}
    assert changed - {"val/acc"} == {"val/loss"}
    assert precise.metrics["val/loss"] == plain.metrics["val/loss_precise"]


def test_points_of_the_curve_do_not_change_what_is_learnt(place):
    without, many = (train(ROW.replace(curve_points=points), place) for points in (0, 20))
    assert without.curve == {}
    assert len(many.curve["step"]) > 10
    assert without.measured() == many.measured()


def test_running_statistics_are_those_of_the_training_alone(place, monkeypatch):
    """Measuring with precise statistics leaves the buffers as they were."""
    weights = []
    for points in (0, 20):
        row = ROW.replace(score_on="test", curve_points=points)
        train(row, place)
        weights.append(rebuilt(row, place).state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    monkeypatch.setattr(replica, "RECALIBRATION_SAMPLES", 40)
    train(row, place)
    for name, value in rebuilt(row, place).state_dict().items():
        assert torch.equal(weights[0][name], value), name


def test_label_noise_is_scored_against_both_labels(place):
    row = ROW.replace(label_noise=0.3, score_on="test", norm="none", steps=80)
    metrics = train(row, place).metrics
    split = load_split("digits", 0, folder=place.data, n_train=200, label_noise=0.3)
    assert (split.train.y != split.train_clean_y).sum() == 60
    logits = rebuilt(row, place)(split.train.x)
    assert metrics["train/loss"] == pytest.approx(nll(logits, split.train.y), rel=1e-5)
    assert metrics["train/loss_clean"] == pytest.approx(nll(logits, split.train_clean_y), rel=1e-5)
    assert metrics["train/acc_clean"] == pytest.approx(accuracy(logits, split.train_clean_y))
    assert metrics["train/loss"] != metrics["train/loss_clean"]


def test_label_smoothing_acts_in_training_only(place):
    row = ROW.replace(label_smoothing=0.3, score_on="test", norm="none", curve_points=1, steps=1)
    result = train(row, place)
    split = load_split("digits", 0, folder=place.data, n_train=200)
    logits = rebuilt(row, place)(split.val.x)
    assert result.metrics["val/loss"] == pytest.approx(nll(logits, split.val.y), rel=1e-5)
    assert train(row.replace(label_smoothing=0.0), place).curve["train/loss"] != result.curve["train/loss"]


def test_a_last_batch_of_one_sample_is_evaluated(place, monkeypatch):
    whole = train(ROW, place).measured()
    monkeypatch.setattr("bnbench.engine.evaluate.EVAL_BATCH", 359)
    assert train(ROW, place).measured() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(("norm", "dropout"), [("batch", 0.0), ("none", 0.2)])
def test_losses_are_calibrated_by_one_temperature_of_the_validation_data(norm, dropout, place):
    row = ROW.replace(score_on="test", norm=norm, dropout=dropout, label_noise=0.2, steps=120)
    metrics = train(row, place).metrics
    split = load_split("digits", 0, folder=place.data, n_train=200, label_noise=0.2)
    test = load_test("digits", 0, folder=place.data)
    model = rebuilt(row, place)
    recalibrate(model, split.train.x.split(20))
    model.eval()
    logits = {part: model(arrays.x) for part, arrays in (("val", split.val), ("train", split.train))}
    temperatures = [math.exp(step / 500) for step in range(-1000, 1000)]
    losses = [nll(logits["val"] / temperature, split.val.y) for temperature in temperatures]
    best = temperatures[losses.index(min(losses))]
    found = metrics["val/temperature"]
    assert found == pytest.approx(best, rel=2e-3)
    assert abs(found - 1) > 0.05
    after = {"train": nll(logits["train"] / found, split.train.y), "test": nll(model(test.x) / found, test.y)}
    assert metrics["train/loss_calibrated"] == pytest.approx(after["train"], rel=1e-5)
    assert metrics["test/loss_calibrated"] == pytest.approx(after["test"], rel=1e-5)
    assert metrics["test/gap_calibrated"] == pytest.approx(after["test"] - after["train"], rel=1e-4)


def test_scaled_logits_are_measured_as_such_and_their_scale_is_calibrated_away(place):
    row = ROW.replace(score_on="test", norm="none", logit_scale=0.2)
    metrics = train(row, place).metrics
    split = load_split("digits", 0, folder=place.data, n_train=200)
    logits = rebuilt(row, place)(split.val.x)
    assert metrics["val/loss"] == pytest.approx(nll(0.2 * logits, split.val.y), rel=1e-5)
    # Of weights as they were drawn, but for rounding.
    scaled, plain = (train(row.replace(lr=1e-9, logit_scale=scale), place).metrics for scale in (0.2, 1.0))
    assert scaled["val/temperature"] == pytest.approx(0.2 * plain["val/temperature"], rel=1e-3)
    assert scaled["test/loss_calibrated"] == pytest.approx(plain["test/loss_calibrated"], rel=1e-5)
    assert scaled["test/loss"] != pytest.approx(plain["test/loss"], rel=1e-3)


FIXED = {"gamma": 0.5, "learn_gamma": False}


def test_the_scale_of_norms_is_measured_where_there_is_one(place):
    confirmed = ROW.replace(score_on="test")
    metrics = train(confirmed, place).metrics
    scales = [layer.norm.weight.double() for layer in rebuilt(confirmed, place).layers]
    expected = math.sqrt(sum(scale.square().sum().item() for scale in scales) / 32)
    assert metrics["norm/gamma"] == pytest.approx(expected)
    assert expected != 1
    fixed = confirmed.replace(norm_options=FIXED, last_norm_options={"gamma": 2.0})
    assert train(fixed, place).metrics["norm/gamma"] == pytest.approx(math.sqrt((0.25 + 4) / 2))
    for row in (ROW, confirmed.replace(norm="none"), confirmed.replace(norm_options={"affine": False})):
        assert "norm/gamma" not in train(row, place).metrics
    assert train(confirmed.replace(gamma_decay=1.0), place).metrics["norm/gamma"] < 0.8 * expected


def test_fewer_samples_are_evaluated_where_the_row_says_so(place):
    row = ROW.replace(score_on="test", curve_points=2)
    few, whole = train(row.replace(n_eval=7), place), train(row, place)
    for part in ("val", "test"):
        assert 7 * few.metrics[f"{part}/acc"] == pytest.approx(round(7 * few.metrics[f"{part}/acc"]))
        assert few.metrics[f"{part}/loss"] != whole.metrics[f"{part}/loss"]
    assert all(7 * share == pytest.approx(round(7 * share)) for share in few.curve["val/acc"])
    assert few.metrics["train/loss"] == whole.metrics["train/loss"]


def test_a_diverged_row_is_scored_as_one_that_knows_nothing(place):
    result = train(ROW.replace(score_on="test", lr=1e20, until_train_nll=0.1), place)
    metrics = result.metrics
    assert_plain(result)
    assert metrics["train/loss_calibrated"] == metrics["train/loss"] >= math.log(K)
    assert metrics["test/loss_calibrated"] == metrics["test/loss"]
    assert (metrics["val/temperature"], metrics["test/gap_calibrated"]) == (1.0, 0.0)
    assert (metrics["train/reached"], metrics["train/steps"]) == (0.0, ROW.steps)


# Repetitions


def test_repetitions_train_on_the_same_data_from_other_random_numbers(place):
    row = ROW.replace(score_on="test", norm="none", label_noise=0.2, n_train=150)
    split = load_split("digits", 0, folder=place.data, n_train=150, label_noise=0.2)
    losses = set()
    for repeat in range(3):
        repeated = row.replace(repeat=repeat)
        metrics = train(repeated, place).metrics
        logits = rebuilt(repeated, place)(split.train.x)
        assert metrics["train/loss"] == pytest.approx(nll(logits, split.train.y), rel=1e-5)
        losses |= {metrics["train/loss"], metrics["train/loss_initial"]}
    assert len(losses) == 6


# Test data


@pytest.mark.parametrize("changes", [{}, {"lr": 1e20}])
def test_a_tuning_row_never_reads_test_data(changes, place, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("test data was read")

    monkeypatch.setattr(replica, "load_test", refuse)
    result = train(ROW.replace(curve_points=3, **changes), place)
    assert result.status == ("diverged" if changes else "done")
    assert not [name for name in [*result.metrics, *result.curve] if name.startswith("test/")]
    assert not (place.runs / "weights").exists()


def test_a_confirmed_row_reads_test_data_once_and_a_diverged_one_not_at_all(place, monkeypatch):
    calls = []
    monkeypatch.setattr(replica, "load_test", lambda *a, **k: (calls.append(a), load_test(*a, **k))[1])
    assert train(ROW.replace(score_on="test", curve_points=5), place).status == "done"
    assert len(calls) == 1
    assert train(ROW.replace(score_on="test", lr=1e20), place).status == "diverged"
    assert len(calls) == 1


def test_tuning_and_confirmation_train_from_different_random_numbers(place):
    tuned, confirmed = (train(ROW.replace(score_on=on), place).metrics for on in ("val", "test"))
    assert tuned["train/loss_initial"] != confirmed["train/loss_initial"]


# Where it runs


def test_a_row_gives_the_same_bits_in_fresh_processes(place, tmp_path):
    row = ROW.replace(dropout=0.2, curve_points=5, score_on="test")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bnbench.engine.train"])
    here = train(row, place)
    for number in range(2):
        runs = tmp_path / str(number)
        with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
            there = pool.submit(train_row, row.as_dict(), str(place.data), str(runs)).result(120)
        assert there.provenance["pid"] != os.getpid()
        assert there.measured() == here.measured()
        assert there.curve == here.curve
        name = f"weights/{row.key}.safetensors"
        assert (runs / name).read_bytes() == (place.runs / name).read_bytes()


def test_the_global_random_state_neither_matters_nor_changes(place):
    row = ROW.replace(dropout=0.3)
    first = train(row, place)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert train(row, place).measured() == first.measured()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_cluster_is_looked_for_and_no_requeue_handler_installed(place, monkeypatch):
    settings = {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "NTASKS_PER_NODE": "1", "PROCID": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SLURMEnvironment.detect()
    seen = []

    def look(self, *arguments) -> None:
        seen.append((self.trainer.world_size, signal.getsignal(signal.SIGUSR1)))
        report(self, *arguments)

    report = ChunkedClassifier.on_train_batch_end
    monkeypatch.setattr(ChunkedClassifier, "on_train_batch_end", look)
    assert train(ROW, place).status == "done"
    assert set(seen) == {(1, signal.SIG_DFL)}


def test_a_training_puts_signal_handlers_back(place):
    def handler(signum, frame) -> None:
        """Do nothing."""

    before = signal.signal(signal.SIGTERM, handler)
    try:
        train(ROW, place)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_every_point_of_the_curve_is_shown_while_it_runs(place, monkeypatch):
    class Eager(LiveLog):
        def __init__(self, runs, key, started) -> None:
            super().__init__(runs, key, started, after=0)

    monkeypatch.setattr(replica, "LiveLog", Eager)
    row = ROW.replace(curve_points=6)
    result = train(row, place)
    live = read_live(place.runs / "live" / f"{row.key}.jsonl")
    assert live.started == result.provenance["started"]
    for name, series in result.curve.items():
        assert tuple(point[name] for point in live.points) == series


def test_bf16_trains_with_statistics_and_scores_in_single_precision(place):
    row = ROW.replace(precision="bf16-mixed", score_on="test", curve_points=2)
    result = train(row, place)
    assert result.status == "done", result.reason
    model = rebuilt(row, place)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32, torch.int64}
    validation = load_split("digits", 0, folder=place.data, n_train=200).val
    assert result.metrics["val/loss"] == pytest.approx(
        F.cross_entropy(model(validation.x), validation.y).item()
    )
    assert result.curve["val/loss"][-1] == pytest.approx(result.metrics["val/loss_precise"])
    assert result.measured() != train(row.replace(precision="32-true"), place).measured()

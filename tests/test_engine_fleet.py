"""Fleets: every replica is what its separate training would have been."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from bnbench.data import Arrays, default_folder, load_split
from bnbench.engine import fleet as fleets
from bnbench.engine.chunked import ChunkedClassifier
from bnbench.engine.conduct import train_rows
from bnbench.engine.fleet import FLEET_SIZE, FleetClassifier, can_fleet, fleet_shape
from bnbench.engine.rows import module_arguments
from bnbench.engine.train import Place, train, train_fleet
from bnbench.norms import NORMS, norm
from bnbench.norms.batch import BatchNorm
from bnbench.study.trial import Trial
from tests.test_engine_train import assert_plain

ROW = Trial(data="digits", precision="64-true", steps=40, n_train=400, n_eval=200, curve_points=3)
#: What rows of one shape may differ in.
DIFFERENT = (
    {"seed": 0, "data_seed": 0, "lr": 0.01, "init": "he", "weight_decay": 0.0, "momentum": 0.9},
    {"seed": 1, "data_seed": 1, "lr": 0.1, "init": "xavier", "weight_decay": 0.01, "momentum": 0.0},
    {
        "seed": 2,
        "data_seed": 1,
        "lr": 0.03,
        "init": "lecun",
        "init_scale": 0.5,
        "bias_init": "uniform",
        "label_noise": 0.2,
        "n_train": 250,
        "decay_norm": True,
        "weight_decay": 0.1,
        "schedule": "trapezoid",
        "warmup": 0.2,
        "clip_norm": 0.5,
    },
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(default_folder(), tmp_path_factory.mktemp("runs"))


def rows_of(base: Trial) -> list[Trial]:
    return [base.replace(**changes) for changes in DIFFERENT]


def numbers(result) -> dict[str, float]:
    curve = {
        f"{name} {at}": value for name, series in result.curve.items() for at, value in enumerate(series)
    }
    return {**result.measured(), **curve}


def assert_same(one, other, tolerance: float) -> None:
    assert one.status == other.status
    assert numbers(one).keys() == numbers(other).keys()
    for name, value in numbers(one).items():
        assert math.isclose(value, numbers(other)[name], rel_tol=tolerance, abs_tol=tolerance), name


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "none"},
        {"norm": "batch"},
        {"norm": "ghost_batch", "norm_options": {"ghost_size": 16}},
        {"norm": "virtual_batch", "steps": 15},
        {"norm": "frozen_batch", "norm_options": {"freeze_after": 0.5}},
        {"norm": "layer", "order": "act-norm", "activation": "tanh", "label_smoothing": 0.1},
        {"norm": "none", "reparam": "weight_norm", "logit_scale": 2.0},
        {"norm": "batch", "last_norm_options": {"gamma_init": 0.5}},
        {"model": "cnn", "model_options": {"channels": 4}, "augment": "crop-flip", "steps": 15},
        {"model": "resnet8", "steps": 6, "order": "pre-act"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_every_row_of_a_fleet_has_the_numbers_of_its_separate_training(changes, place):
    rows = rows_of(ROW.replace(**changes))
    assert len({fleet_shape(row) for row in rows}) == 1
    assert all(can_fleet(row) for row in rows)
    for row, result in zip(rows, train_fleet(rows, place), strict=True):
        assert_same(train(row, place), result, 1e-9)


def test_rows_that_drop_units_with_different_strength_draw_what_each_draws_alone(place):
    base = ROW.replace(norm="virtual_batch", dropout_at="before-norm", steps=12)
    rows = [row.replace(dropout=p) for row, p in zip(rows_of(base), (0.1, 0.3, 0.6), strict=True)]
    assert len({fleet_shape(row) for row in rows}) == 1
    for row, result in zip(rows, train_fleet(rows, place), strict=True):
        assert_same(train(row, place), result, 1e-9)


def members_of(rows: list[Trial]) -> list[ChunkedClassifier]:
    made = []
    for row in rows:
        split = load_split(row.data, row.data_seed, folder=default_folder(), n_train=row.n_train)
        arrays = split.train
        if row.precision == "64-true":
            arrays = Arrays(arrays.x.double(), arrays.y)
        member = ChunkedClassifier(
            train=arrays,
            batch_size=row.batch_size,
            training_seed=row.training_seed,
            clip_norm=row.clip_norm,
            **module_arguments(row),
        )
        member.to(torch.float64 if row.precision == "64-true" else torch.float32).prepare()
        made.append(member)
    return made


def state_of(member: ChunkedClassifier) -> torch.Tensor:
    momentum = [buffer for buffers in member.optimizer_state.buffers for buffer in buffers]
    tensors = [*member.model.state_dict().values(), *momentum]
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.mark.parametrize(("steps", "tolerance"), [(2, 1e-10), (100, 1e-6)])
def test_weights_buffers_and_momentum_equal_those_of_separate_trainings(steps, tolerance):
    rows = rows_of(ROW.replace(steps=100))
    together, alone = members_of(rows), members_of(rows)
    fleet = FleetClassifier(together)
    losses = torch.stack(fleet.do_steps(0, steps), dim=1)
    for member, lonely, own in zip(together, alone, losses, strict=True):
        torch.testing.assert_close(
            own, torch.stack(lonely.do_steps(0, steps)), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(state_of(member), state_of(lonely), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "changes", [{}, {"model": "cnn", "model_options": {"channels": 8}}, {"norm": "none"}], ids=str
)
def test_the_bits_of_a_replica_depend_neither_on_its_companions_nor_on_its_place(changes):
    base = Trial(data="digits", steps=20, **changes)
    rows = [base.replace(seed=seed, lr=0.02 * (1 + seed % 3)) for seed in range(FLEET_SIZE)]
    whole = members_of(rows)
    FleetClassifier(whole).do_steps(0, 12)
    for chosen in ([3], [7, 3], [15, 0, 3, 9, 4], rows and list(range(FLEET_SIZE))[::-1]):
        some = members_of([rows[k] for k in chosen])
        FleetClassifier(some).do_steps(0, 12)
        for k, member in zip(chosen, some, strict=True):
            assert torch.equal(state_of(member), state_of(whole[k])), (chosen, k)


def test_a_row_that_diverges_leaves_the_others_bit_for_bit_as_they_are(place):
    base = ROW.replace(precision="32-true", norm="none", steps=70)
    rows = [base.replace(seed=seed) for seed in range(3)]
    calm = train_fleet(rows, place)
    broken = base.replace(lr=1e8, seed=9)
    mixed = train_fleet([rows[0], broken, *rows[1:]], place)
    assert [result.status for result in mixed] == ["done", "diverged", "done", "done"]
    assert all(a.has_same_numbers(b) for a, b in zip(calm, [mixed[0], *mixed[2:]], strict=True))
    assert_same(train(broken, place), mixed[1], 1e-6)


def test_all_rows_may_diverge(place):
    rows = [ROW.replace(norm="none", lr=1e8, seed=seed) for seed in range(2)]
    assert [result.status for result in train_fleet(rows, place)] == ["diverged", "diverged"]


def test_rows_that_reach_their_target_stop_one_by_one(place):
    base = ROW.replace(until_train_nll=0.7, steps=200, curve_points=0)
    rows = [base.replace(lr=lr) for lr in (0.003, 0.3, 0.02)]
    results = train_fleet(rows, place)
    for row, result in zip(rows, results, strict=True):
        assert_same(train(row, place), result, 1e-8)
    assert len({result.metrics["train/steps"] for result in results}) == 3


def test_a_fleet_goes_on_from_its_checkpoints_bit_for_bit(place, tmp_path, monkeypatch):
    rows = [ROW.replace(seed=seed, steps=90, precision="32-true") for seed in range(3)]
    undisturbed = train_fleet(rows, place)

    class Stopped(Exception):
        pass

    stopped = Place(place.data, tmp_path)
    block, ended = FleetClassifier.on_train_batch_end, []

    def stop(self, outputs, batch, index):
        block(self, outputs, batch, index)
        ended.append(batch[1])
        if len(ended) == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(FleetClassifier, "on_train_batch_end", stop)
        with pytest.raises(Stopped):
            train_fleet(rows, stopped, save_every=0.0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    # One of them is lost: it starts again, beside those that go on.
    (tmp_path / "checkpoints" / f"{rows[1].key}.pt").unlink()
    begun: list[int] = []
    step = FleetClassifier.training_step
    monkeypatch.setattr(
        FleetClassifier,
        "training_step",
        lambda self, batch, index: (begun.append(int(batch[0])), step(self, batch, index))[1],
    )
    resumed = train_fleet(rows, stopped)
    assert {0, ended[1]} <= set(begun)
    assert all(a.has_same_numbers(b) for a, b in zip(undisturbed, resumed, strict=True))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_results_are_plain_and_their_times_are_shares(place):
    rows = [ROW.replace(seed=seed, score_on="test") for seed in range(4)]
    results = train_fleet(rows, place)
    for row, result in zip(rows, results, strict=True):
        assert_plain(result)
        assert (place.runs / "weights" / f"{row.key}.safetensors").exists()
        assert result.provenance["nbs"] == row.batch_size
    assert len({result.metrics["time/total_s"] for result in results}) == 1
    together = sum(result.metrics["time/total_s"] for result in results)
    trained = sum(
        result.metrics["time/step_ms"] * row.steps for result, row in zip(results, rows, strict=True)
    )
    assert 0 < trained / 1000 < together


def test_the_data_of_several_rows_are_kept_once():
    rows = [Trial(data="digits", seed=seed) for seed in range(3)]
    members = members_of(rows)
    shared = members[0].train_arrays
    for member in members[1:]:
        member.train_arrays = shared
    assert FleetClassifier(members)._x is shared.x


@pytest.mark.parametrize(
    "changes",
    [{"norm": "noisy_batch"}, {"probes": {"drift": {}}}, {"alone": True}, {"devices": 2}],
    ids=str,
)
def test_some_rows_train_alone(changes):
    assert not can_fleet(ROW.replace(**changes))


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_that_says_it_takes_part_in_a_fleet_does(name):
    entry = NORMS[name]
    model = {"model": "cnn", "model_options": {"channels": 8}} if entry.min_dim else {"model": "mlp"}
    for options in entry.examples:
        row = Trial(data="mnist1d", norm=name, norm_options=options, **model)
        assert can_fleet(row) == entry.vmap


def test_a_norm_that_rebinds_its_buffer_is_found_out(monkeypatch):
    monkeypatch.setattr(NORMS, "_entries", dict(NORMS._entries), raising=False)

    @norm("rebinding", paper="none", batch_dependent=True, running_stats=True)
    class Rebinding(BatchNorm):
        def forward(self, x):
            if self.training:
                self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
            return (x - self.running_mean) / self.running_var.sqrt()

    assert not can_fleet(Trial(data="digits", norm="rebinding"))


def test_the_shape_of_a_row_says_what_may_not_differ():
    shape = fleet_shape(ROW)
    for changes in DIFFERENT:
        assert fleet_shape(ROW.replace(**changes)) == shape
    for changes in (
        {"norm": "layer"},
        {"batch_size": 32},
        {"steps": 41},
        {"dropout": 0.1},
        {"order": "act-norm"},
        {"curve_points": 4},
        {"data": "mnist1d"},
        {"norm_options": {"eps": 1e-3}},
    ):
        assert fleet_shape(ROW.replace(**changes)) != shape
    # A new field belongs to the shape until someone has thought about it.
    assert {field.name for field in dataclasses.fields(Trial)} >= fleets._FREE


@pytest.mark.slow
def test_a_compiled_fleet_has_the_numbers_of_separate_trainings(place: Place):
    """In a process of its own, as in a worker: the compiler starts CUDA where there is any."""
    rows = [row.replace(backend="compiled") for row in rows_of(ROW)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        values = [row.as_dict() for row in rows]
        results = pool.submit(train_rows, values, str(place.data), str(place.runs)).result(300)
    for row, result in zip(rows, results, strict=True):
        assert_same(train(row.replace(backend="single"), place), result, 1e-8)

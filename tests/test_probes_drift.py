"""The drift probe: how far the distribution of each unit's activations moves between two snapshots."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnbench.models import Slot, build_model
from bnbench.norms import build_norm
from bnbench.probes import Moment, build_probe
from bnbench.probes.drift import measure_activations, measure_drift
from bnbench.registry import BadInput

VALUES = [f"{kind}_{name}" for kind in ("input", "output") for name in ("mean", "sd", "wasserstein")]
MOMENT = Moment(0, 0.1, 64)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(*between, units=6):
    """Two linear maps in float64 with something between, and three inputs and outputs."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, units), *between, nn.Linear(units, 3)).double()


def move(model, amount=0.3, seed=5):
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.add_(amount * noise(*parameter.shape, seed=seed + place))


def drift_after(model, x, change):
    before = measure_activations(model, x)
    with torch.no_grad():
        change(model)
    return measure_drift(model, x, before=before)


def numbers(reading):
    return [reading.values[name] for name in VALUES]


def test_a_shift_of_a_unit_is_its_drift_in_sds_and_changes_no_spread():
    x, model, shift = noise(40, 3), chain(), torch.tensor([0.5, -1.0, 2.0, 0.0, 0.1, 3.0])
    sd = model[0](x).detach().numpy().std(0)
    expected = np.mean(shift.abs().numpy() / sd)
    reading = drift_after(model, x, lambda m: m[0].bias.add_(shift))
    # Nothing is between the maps: what the first gives is what the second receives.
    assert numbers(reading) == pytest.approx([expected, 0, expected] * 2, abs=1e-12)


def test_a_scaled_unit_drifts_by_the_logarithm_of_the_scale_and_by_its_mean_size():
    x, model = noise(40, 3), chain()
    a = model[0](x).detach().numpy()
    reading = drift_after(model, x, lambda m: [p.mul_(3) for p in m[0].parameters()])
    mean, wasserstein = (np.mean(2 * size / a.std(0)) for size in (abs(a.mean(0)), abs(a).mean(0)))
    assert numbers(reading) == pytest.approx([mean, math.log(3), wasserstein] * 2, rel=1e-12)


def test_behind_batch_normalization_a_scale_is_no_drift_and_before_it_it_is():
    x, model = noise(40, 3), chain(build_norm("batch", 6, 0, eps=1e-12).double(), nn.ReLU())
    reading = drift_after(model, x, lambda m: [p.mul_(3) for p in m[0].parameters()])
    assert numbers(reading)[:3] == pytest.approx([0, 0, 0], abs=1e-9)
    assert reading.values["output_sd"] == pytest.approx(math.log(3), rel=1e-12)


def test_nothing_drifts_where_nothing_has_moved():
    reading = drift_after(chain(nn.BatchNorm1d(6).double(), nn.ReLU()), noise(16, 3), lambda m: None)
    assert numbers(reading) == [0] * 6


def units_of(model, x, kind):
    """The values of each unit by layer, by hand: NumPy arrays (units, values)."""
    layers, found = list(model.layers), {}
    model.train()
    hidden = x
    with torch.no_grad():
        for place, block in enumerate(layers):
            if place:
                found["input", f"layers.{place}.conv"] = hidden
            linear, *rest = block.children()
            hidden = linear(hidden)
            found["output", f"layers.{place}.conv"] = hidden
            for module in rest:
                hidden = module(hidden)
        found["input", "head"] = hidden.mean((2, 3))
    units = {name: np.moveaxis(t.numpy(), 1, 0) for (k, name), t in found.items() if k == kind}
    return {name: values.reshape(len(values), -1) for name, values in units.items()}


@pytest.mark.parametrize("kind", ["input", "output"])
def test_every_number_of_a_network_is_that_of_a_recomputation_by_scipy(kind):
    model, x = build_model("cnn", (2, 6, 6), 3, Slot("batch"), channels=5).double(), noise(12, 2, 6, 6)
    assert 12 * 6 * 6 < 512  # All values are kept.
    then = units_of(model, x, kind)
    reading = drift_after(model, x, move)
    now = units_of(model, x, kind)
    assert set(then) == {name for name in reading.index if name != ("layers.0.conv", "head")[kind != "input"]}
    expected = {"mean": {}, "sd": {}, "wasserstein": {}}
    for name, old in then.items():
        new, sd = now[name], old.std(1)
        distances = [wasserstein_distance(a, b) for a, b in zip(old, new, strict=True)]
        alive = (sd > 0) & (new.std(1) > 0)
        expected["mean"][name] = np.mean((abs(new.mean(1) - old.mean(1)) / sd)[sd > 0])
        expected["sd"][name] = np.mean(abs(np.log(new.std(1)[alive] / sd[alive])))
        expected["wasserstein"][name] = np.mean((np.array(distances) / sd)[sd > 0])
    for measure, by_layer in expected.items():
        row = dict(zip(reading.index, reading.series[f"{kind}_{measure}"], strict=True))
        assert {name: row[name] for name in by_layer} == pytest.approx(by_layer, rel=1e-9)
        assert all(math.isnan(value) for name, value in row.items() if name not in by_layer)
        assert reading.values[f"{kind}_{measure}"] == pytest.approx(np.mean([*by_layer.values()]), rel=1e-9)


def test_of_many_values_512_are_kept_and_give_nearly_the_distance_of_all():
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 1, 3)).double()
    x = noise(64, 1, 10, 10)
    old = model[0](x).detach()
    reading = drift_after(model, x, move)
    new = model[0](x).detach()
    assert measure_activations(model, x)["output"]["0"]["ordered"].shape == (32, 512)
    pairs = [(old[:, u].numpy().ravel(), new[:, u].numpy().ravel()) for u in range(32)]
    expected = np.mean([wasserstein_distance(a, b) / a.std() for a, b in pairs])
    assert reading.values["output_wasserstein"] == pytest.approx(expected, rel=0.05)
    # Means and sds are those of all values.
    means = np.mean([abs(b.mean() - a.mean()) / a.std() for a, b in pairs])
    assert reading.values["output_mean"] == pytest.approx(means, rel=1e-9)


def test_the_units_of_a_linear_map_are_its_features_whatever_axes_come_before():
    model, x = chain(), noise(4, 10, 3)
    flat = drift_after(chain(), x.flatten(0, 1), move)
    assert numbers(drift_after(model, x, move)) == pytest.approx(numbers(flat), rel=1e-12)


def test_a_unit_that_is_constant_in_the_snapshot_is_left_out():
    x, model = noise(7, 3).float(), chain().float()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 0.1
    kept = model[0](x).detach().double().numpy()[:, 1:]
    reading = drift_after(model, x, lambda m: m[0].bias.add_(1))
    assert measure_activations(model, x)["output"]["0"]["sd"][0] == 0
    assert reading.values["output_mean"] == pytest.approx(np.mean(1 / kept.std(0)), rel=1e-5)
    assert reading.values["output_sd"] == pytest.approx(0, abs=1e-5)


def test_a_unit_that_dies_moves_its_mean_and_has_no_change_of_spread():
    def kill(model):
        model[0].bias[0] = -1e3

    x, model = noise(30, 3), chain(nn.ReLU())
    h = model[0](x).relu().detach().numpy()
    reading = drift_after(model, x, kill)
    alive = np.count_nonzero(h.std(0))
    assert reading.values["input_mean"] == pytest.approx(h[:, 0].mean() / h[:, 0].std() / alive, rel=1e-12)
    assert reading.values["input_sd"] == 0


def test_where_all_units_are_constant_or_there_are_no_hidden_ones_the_drift_is_nan():
    constant = chain(nn.ReLU())
    with torch.no_grad():
        constant[0].bias.fill_(-1e3)
    assert math.isnan(drift_after(constant, noise(9, 3), move).values["input_mean"])
    assert all(map(math.isnan, numbers(drift_after(nn.Linear(3, 2).double(), noise(9, 3), move))))


def test_an_activation_in_place_does_not_change_what_the_layer_below_gave():
    plain, in_place = (drift_after(chain(nn.ReLU(inplace=i)), noise(9, 3), move) for i in (False, True))
    assert plain == in_place


def test_without_a_snapshot_all_is_nan_and_the_index_is_there():
    reading = measure_drift(chain(), noise(9, 3))
    assert all(map(math.isnan, numbers(reading)))
    assert reading.index == ("0", "1") and set(reading.series) == set(VALUES)


def test_a_snapshot_of_another_batch_size_or_network_is_refused():
    model, x = chain(), noise(9, 3)
    with pytest.raises(BadInput, match=r"^probe 'drift': a snapshot is of another network, or of"):
        measure_drift(model, x, before=measure_activations(model, x[:5]))
    with pytest.raises(BadInput, match=r"^probe 'drift': a snapshot is of another network, or of"):
        measure_drift(model, x, before=measure_activations(chain(units=4), x))


def test_the_noise_of_a_norm_drifts_from_reading_to_reading_though_no_weight_moves():
    x, units = noise(128, 3), 1000
    model, probe = chain(build_norm("noisy_batch", units, 0).double(), units=units), build_probe("drift")
    torch.manual_seed(0)
    first = probe.measure(model, x, None, MOMENT)
    torch.manual_seed(1)
    reading = probe.measure(model, x, None, MOMENT)
    assert math.isnan(first.values["input_mean"]) and reading.values["output_wasserstein"] == 0
    # With means μ, μ′ ~ U(-½, ½), E|μ − μ′| = 1/3; the variance of a unit is σ² + 0.1² + 0.2²/12 for its
    # scale σ ~ U(1, 1.25), and the mean noise of 128 samples adds 0.3 % to the size of μ − μ′.
    scales = np.linspace(1, 1.25, 1001)
    expected = np.mean(1 / np.sqrt(scales**2 + 0.01 + 0.04 / 12)) / 3
    assert reading.values["input_mean"] == pytest.approx(expected, rel=0.06)


def test_the_reading_after_a_resumption_is_the_one_of_the_undisturbed_training(tmp_path):
    model, x = chain(nn.BatchNorm1d(6).double(), nn.ReLU()), noise(20, 3)
    probe = build_probe("drift", every=2)
    probe.measure(model, x, None, MOMENT)
    torch.save(probe.state_dict(), tmp_path / "state.pt")
    resumed = build_probe("drift", every=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    move(model)
    reading = probe.measure(model, x, None, MOMENT)
    assert reading.values["input_mean"] > 0
    assert resumed.measure(model, x, None, MOMENT) == reading


def test_a_fresh_probe_has_a_state_without_a_snapshot():
    probe = build_probe("drift")
    probe.load_state_dict(build_probe("drift").state_dict())
    assert math.isnan(probe.measure(chain(), noise(9, 3), None, MOMENT).values["input_sd"])


class Regression(L.LightningModule):
    """A user's own module: two linear maps trained by plain gradient descent."""

    def __init__(self):
        super().__init__()
        self.net = chain(nn.Tanh())
        self.snapshots = []
        self.double()

    def forward(self, x):
        return self.net(x)

    def loss(self, output, y):
        return (output - y).square().mean()

    def training_step(self, batch):
        return self.loss(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        self.snapshots.append(measure_activations(self, SAMPLE[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


SAMPLE = noise(16, 3), noise(16, 3, seed=1)


def test_in_training_each_reading_is_the_drift_since_the_reading_before(tmp_path):
    module, probe = Regression(), build_probe("drift", steps=[0, 1, 4])
    loader = DataLoader(TensorDataset(*SAMPLE), batch_size=16)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=6,
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    assert probe.trace.steps == (0, 1, 4)
    by_hand = [(a["mean"], a["sd"]) for a in (snapshot["input"]["net.2"] for snapshot in module.snapshots)]
    for step, since in ((1, 0), (4, 1)):
        (mean, _), (old, sd) = by_hand[step], by_hand[since]
        expected = ((mean - old).abs() / sd).mean().item()
        assert probe.trace.at(step).values["input_mean"] == pytest.approx(expected, rel=1e-9)
    assert probe.trace.at(4).values["input_mean"] > probe.trace.at(1).values["input_mean"]

"""NormClassifier under a plain Trainer, with models of all kinds, saved and loaded."""

from __future__ import annotations

import json
import math

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from bnbench import lit
from bnbench.data import DataModule
from bnbench.lit import NormClassifier, check_model, load
from bnbench.models import MODELS, build_model
from bnbench.norms import NORMS, build_norm, ghost_batch
from bnbench.optimization import learning_rate_factor, split_parameters
from bnbench.registry import BadInput

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SHAPE = {"in_shape": (1, 8, 8), "num_classes": 10}
SMALL = {"model_options": {"depth": 2, "width": 16}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    # 360 validation and test images in batches of 100 and a last one of 60.
    return DataModule("digits", batch_size=100, n_train=300, folder=tmp_path_factory.mktemp("data"))


@pytest.fixture
def trainer(tmp_path):
    return L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path)


def measured_by_hand(model: nn.Module, loader) -> dict[str, float]:
    """Mean NLL, accuracy and calibration error (15 bins) over the samples, one by one, in float64."""
    rows, labels = [], []
    with torch.no_grad():
        for x, y in loader:
            rows += model(x).double().softmax(1).tolist()
            labels += y.tolist()
    bins: dict[int, list[float]] = {}
    for row, label in zip(rows, labels, strict=True):
        confidence = max(row)
        bins.setdefault(math.ceil(15 * confidence), []).append(confidence - (row.index(confidence) == label))
    right = [row.index(max(row)) == label for row, label in zip(rows, labels, strict=True)]
    return {
        "loss": -sum(math.log(row[label]) for row, label in zip(rows, labels, strict=True)) / len(rows),
        "acc": sum(right) / len(rows),
        "ece": sum(abs(sum(differences)) for differences in bins.values()) / len(rows),
    }


def test_a_plain_trainer_trains_and_logs_what_can_be_computed_by_hand(data, trainer):
    module = NormClassifier(**SHAPE, **SMALL, dropout=0.1)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    trainer.fit(module, data)
    assert trainer.global_step == 3
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert all(not torch.equal(before[name], value) for name, value in module.model.state_dict().items())
    by_hand = measured_by_hand(module.model.eval(), data.val_dataloader())
    for name, value in by_hand.items():
        assert logged[f"val/{name}"] == pytest.approx(value, rel=1e-4)
    assert math.isfinite(logged["train/loss"])
    (tested,) = trainer.test(module, data, verbose=False)
    for name, value in measured_by_hand(module.model.eval(), data.test_dataloader()).items():
        assert tested[f"test/{name}"] == pytest.approx(value, rel=1e-4)


def test_a_fast_development_run_goes_through(data, tmp_path):
    L.Trainer(**QUIET, fast_dev_run=True, default_root_dir=tmp_path).fit(
        NormClassifier(**SHAPE, **SMALL), data
    )


def test_calibration_is_right_for_logits_within_0_and_1(data, trainer):
    module = NormClassifier(Cautious(), **SHAPE)
    (found,) = trainer.validate(module, data, verbose=False)
    by_hand = measured_by_hand(module.model.eval(), data.val_dataloader())
    assert found["val/ece"] == pytest.approx(by_hand["ece"], rel=1e-4)


def test_the_schedule_spans_the_steps_of_the_trainer_or_its_own(data, trainer):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer.callbacks.append(Watch())
    trainer.fit(NormClassifier(**SHAPE, **SMALL, lr=0.2), data)
    assert rates == pytest.approx([0.2, 0.15, 0.05])
    rates.clear()
    own = L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False, callbacks=[Watch()])
    own.fit(NormClassifier(**SHAPE, **SMALL, lr=0.2, steps=6), data)
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 6)) for step in range(3)])


def test_a_checkpoint_of_lightning_gives_the_module_back(data, tmp_path):
    module = NormClassifier(
        "cnn", "group", **SHAPE, model_options={"channels": 8}, norm_options={"num_groups": 2}, lr=0.3
    )
    callback = ModelCheckpoint(tmp_path)
    L.Trainer(**QUIET, max_epochs=1, callbacks=[callback], default_root_dir=tmp_path).fit(module, data)
    loaded = NormClassifier.load_from_checkpoint(callback.best_model_path)
    assert dict(loaded.hparams) == dict(module.hparams)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_the_learning_rate_factor_equals_its_formula(steps, warmup):
    rising = round(warmup * steps)
    for step in range(steps):
        cosine, constant = (
            learning_rate_factor(step, steps, kind, warmup) for kind in ("cosine", "constant")
        )
        if step < rising:
            assert cosine == constant == (step + 1) / rising
        else:
            assert constant == 1.0
            angle = math.pi / 2 * (step - rising) / (steps - rising)
            assert cosine == pytest.approx(math.cos(angle) ** 2, abs=1e-12)


@given(st.integers(1, 1000), st.integers(0, 3000), st.sampled_from(["constant", "cosine"]), st.floats(0, 1))
def test_the_learning_rate_factor_is_a_share(steps, step, schedule, warmup):
    assert 0 <= learning_rate_factor(step, steps, schedule, warmup) <= 1


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_decay_and_scales_shifts_and_biases_do_not(name):
    model = NormClassifier(name, "batch", **SHAPE, reparam="weight_norm").model
    decayed, free = split_parameters(model, decay_norm=False)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    directions = {id(p) for m in linear for p in m.parameters() if p.ndim > 1 and p.shape[1:].numel() > 1}
    assert {id(p) for p in decayed} == directions
    assert {id(p) for p in free} == {id(p) for p in model.parameters()} - directions
    everything, nothing = split_parameters(model, decay_norm=True)
    assert len(everything) == len(list(model.parameters()))
    assert nothing == []
    everything[0].requires_grad_(False)
    assert len(split_parameters(model, decay_norm=True)[0]) == len(everything) - 1


@pytest.mark.parametrize("decay_norm", [False, True])
def test_a_decay_of_scales_is_added_on_the_scales_alone(decay_norm):
    asked = {"weight_decay": 0.1, "decay_norm": decay_norm}
    module = NormClassifier("resnet20", **SHAPE, **asked, gamma_decay=0.03)
    groups = module.decay_groups()
    decays = {id(p): decay for parameters, decay in groups for p in parameters}
    assert len(decays) == sum(len(parameters) for parameters, _ in groups)
    for name, parameter in module.model.named_parameters():
        free = 0.1 if decay_norm or parameter.ndim > 1 else 0.0
        scaled = 0.03 if name.endswith("norm.weight") else 0.0
        assert decays[id(parameter)] == pytest.approx(free + scaled), name
    assert len(NormClassifier(**SHAPE, **asked).decay_groups()) == (1 if decay_norm else 2)


def test_scaled_logits_are_the_models_output_times_a_number():
    module, plain = (NormClassifier(**SHAPE, logit_scale=scale) for scale in (0.25, 1.0))
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(module(x), 0.25 * plain(x))


def test_equal_seeds_give_equal_weights_and_the_global_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for model in ("mlp", f"{__name__}:WithNormLayer"):
        first, again, other = (NormClassifier(model, **SHAPE, seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


# Models of one's own


class Cautious(nn.Module):
    """Logits within [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1)).sigmoid()


class WithNormLayer(nn.Module):
    def __init__(self, norm_layer, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = norm_layer(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class WithSlotAndShape(nn.Module):
    def __init__(self, in_shape, slot, *, classes: int) -> None:
        super().__init__()
        self.linear = slot.build_linear(math.prod(in_shape), 6)
        self.gap = slot.build(6, 0, 0, 1)
        self.head = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gap(self.linear(x.flatten(1))))


def make_anything(**options):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, options["outputs"]))


def make_no_module(num_classes):
    return num_classes


NO_CALLABLE = 3


def own(name: str, **changes) -> NormClassifier:
    return NormClassifier(f"{__name__}:{name}", **SHAPE | changes)


def test_an_own_model_gets_the_norm_as_a_function_of_features(data, trainer):
    module = own(
        "WithNormLayer", norm="ghost_batch", norm_options={"ghost_size": 5}, model_options={"width": 6}
    )
    assert isinstance(module.model.norm, ghost_batch.GhostBatchNorm)
    assert (module.model.norm.num_features, module.model.norm.ghost_size) == (6, 5)
    trainer.fit(module, data)
    assert trainer.global_step == 3


def test_an_own_model_gets_slot_and_shape_where_it_asks():
    given = {"model_options": {"classes": 10}, "last_norm_options": {"gamma_init": 3.0}}
    module = own("WithSlotAndShape", norm="layer", activation="tanh", **given)
    assert module.model.gap.norm.gamma_init == 3.0
    assert [type(part).__name__ for part in module.model.gap] == ["LayerNorm", "Tanh"]
    assert module(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert own("make_anything", model_options={"outputs": 3})(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_a_module_is_taken_as_it_is_and_given_again_when_loading(data, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), build_norm("batch", 10, 0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = NormClassifier(network, **SHAPE)
    assert module.model is network
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    trainer = L.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), build_norm("batch", 10, 0))
    loaded = NormClassifier.load_from_checkpoint(tmp_path / "module.ckpt", model=fresh)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("mpl", {}, "no model named 'mpl'; did you mean 'mlp'"),
        ("mlp", {"norm": "bach"}, "no norm named 'bach'; did you mean 'batch'"),
        ("mlp", {"model_options": {"widht": 1}}, "did you mean 'width'"),
        ("mlp", {"norm_options": {"epsilon": 1}}, "no option 'epsilon'; did you mean 'eps'"),
        ("mlp", {"schedule": "cosin"}, "no schedule named 'cosin'; did you mean 'cosine'"),
        ("mlp", {"lr": -1.0}, "lr must be above 0, not -1.0"),
        ("mlp", {"lr": math.nan}, "lr must be above 0, not nan"),
        ("mlp", {"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ("mlp", {"weight_decay": -1e-4}, "weight_decay must be 0 or more"),
        ("mlp", {"gamma_decay": -1e-4}, "gamma_decay must be 0 or more"),
        ("mlp", {"gamma_decay": 1e-4, "norm": "none"}, "norm 'none' learns no scale here"),
        ("mlp", {"logit_scale": 0.0}, "logit_scale must be above 0, not 0.0"),
        ("mlp", {"last_norm_options": {"gama_init": 2.0}}, "did you mean 'gamma_init'"),
        (
            f"{__name__}:WithNormLayer",
            {"last_norm_options": {"gamma_init": 2.0}},
            "has no last norm for last_norm_options",
        ),
        ("mlp", {"warmup": 5}, "warmup must be a share of the steps"),
        ("mlp", {"label_smoothing": 1.0}, "label_smoothing must be"),
        ("mlp", {"steps": 0}, "steps must be 1 or more"),
        ("mlp", {"dropout": 1.0}, "dropout"),
        ("no.such.package:Net", {}, "No module named 'no'; write it as package.module:Class"),
        (f"{__name__}:Missing", {}, "has no attribute 'Missing'; write it as"),
        (f"{__name__}:NO_CALLABLE", {}, "not a callable object; write it as"),
        (":Net", {}, "write it as package.module:Class"),
        (".here:Net", {}, "write it as package.module:Class"),
        (f"{__name__}:make_no_module", {}, "made a int, not an nn.Module"),
        (
            f"{__name__}:WithNormLayer",
            {"model_options": {"widht": 1}},
            "no option 'widht'; did you mean 'width'",
        ),
        (f"{__name__}:WithSlotAndShape", {}, "needs 'classes'; give it among the model's options"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(model, changes, message):
    arguments = {"norm": "batch", **SHAPE, **changes}
    for build in (NormClassifier, check_model):
        with pytest.raises(BadInput) as refusal:
            build(model, **arguments)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("norm", list(NORMS))
def test_checking_a_model_of_the_registry_takes_no_memory(norm, monkeypatch):
    built = []
    monkeypatch.setattr(lit, "build_model", lambda *a, **k: (built.append(build_model(*a, **k)), built[0])[1])
    check_model("cnn", norm, in_shape=(3, 32, 32), num_classes=10, model_options={"channels": 100_000})
    assert {parameter.device.type for parameter in built[0].parameters()} == {"meta"}


# What a study saved


def save(folder, arguments, weights) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "module.json").write_text(json.dumps(arguments))
    save_file(weights, folder / "model.safetensors")


ARGUMENTS = {"model": "mlp", "norm": "batch", "in_shape": [1, 8, 8], "num_classes": 10, **SMALL}


def test_a_saved_model_is_loaded_in_evaluation_mode_with_the_same_logits(tmp_path):
    module = NormClassifier(**ARGUMENTS, dropout=0.5, seed=3)
    x = torch.randn(20, 1, 8, 8)
    module(x)
    save(tmp_path, {**ARGUMENTS, "dropout": 0.5}, module.model.state_dict())
    loaded = load(str(tmp_path))
    assert not any(part.training for part in loaded.modules())
    assert torch.equal(loaded(x), module.eval()(x))


def spoil_nothing_there(folder) -> None:
    (folder / "module.json").unlink()


def spoil_weights(folder) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def spoil_json(folder) -> None:
    (folder / "module.json").write_text("{")


def spoil_list(folder) -> None:
    (folder / "module.json").write_text("[1]")


def spoil_argument(folder) -> None:
    (folder / "module.json").write_text(json.dumps(ARGUMENTS | {"colour": 1}))


def spoil_norm(folder) -> None:
    (folder / "module.json").write_text(json.dumps(ARGUMENTS | {"norm": "bach"}))


def spoil_width(folder) -> None:
    (folder / "module.json").write_text(json.dumps(ARGUMENTS | {"model_options": {"depth": 2, "width": 17}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing_there, "No such file"),
        (spoil_weights, "holds no saved model"),
        (spoil_json, "holds no saved model"),
        (spoil_list, "holds no saved model"),
        (spoil_argument, "colour"),
        (spoil_norm, "did you mean 'batch'"),
        (spoil_width, "the weights are of another model"),
    ],
)
def test_a_folder_without_a_saved_model_is_refused_in_one_line(spoil, message, tmp_path):
    save(tmp_path, ARGUMENTS, NormClassifier(**ARGUMENTS).model.state_dict())
    load(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message) as refusal:
        load(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)

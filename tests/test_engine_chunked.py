"""The engine's trainer against automatic optimization, a bare loop and torch.optim.SGD."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.connectors import callback_connector
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bnbench.data import Arrays, load_split, step_indices
from bnbench.engine.chunked import BLOCK_STEPS, Blocks, ChunkedClassifier, FusedSGD
from bnbench.engine.distributed import trainer_for
from bnbench.engine.rows import module_arguments
from bnbench.engine.train import Place, train
from bnbench.lit import NormClassifier
from bnbench.registry import BadInput
from bnbench.study.trial import Trial

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}
MLP = {"model": "mlp", "model_options": {"depth": 2, "width": 12}}
CNN = {"model": "cnn", "model_options": {"depth": 2, "channels": 6}}
ROW = Trial(
    data="digits", n_train=200, batch_size=16, steps=40, lr=0.05, score_on="test", precision="64-true", **MLP
)
VARIANTS = {
    "no norm": {"norm": "none"},
    "batch": {"norm": "batch"},
    "layer": {"norm": "layer"},
    "ghost": {"norm": "ghost_batch", "norm_options": {"ghost_size": 4}},
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 0.01},
    "weight decay on norms too": {"weight_decay": 0.01, "decay_norm": True, "bias_init": 0.1},
    "decay of scales": {"gamma_decay": 0.3, "weight_decay": 0.01},
    "decay of scales beside that of norms": {"gamma_decay": 0.3, "weight_decay": 0.01, "decay_norm": True},
    "decay of scales, convolutions": CNN | {"norm": "group", "gamma_decay": 0.3},
    "scaled logits": {"logit_scale": 0.3},
    "another last norm": {"last_norm_options": {"gamma": 0.2, "learn_gamma": False}},
    "constant rate, warm-up": {"schedule": "constant", "warmup": 0.25},
    "cosine, warm-up": {"warmup": 0.1, "curve_points": 6},
    "label smoothing": {"label_smoothing": 0.2},
    "clipping": {"norm": "none", "clip_norm": 0.3},
    "images, all at once": CNN
    | {"weight_decay": 0.01, "warmup": 0.1, "label_smoothing": 0.1, "clip_norm": 0.5, "curve_points": 3},
    "weight standardization": CNN | {"norm": "layer", "reparam": "weight_standardization"},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def batches_of(row: Trial, folder) -> list[tuple[torch.Tensor, torch.Tensor]]:
    train_part = load_split(row.data, row.data_seed, folder=folder, n_train=row.n_train).train
    indices = step_indices(len(train_part), row.batch_size, 0, row.steps, row.seed, row.score_on)
    return [(train_part.x[i].double(), train_part.y[i]) for i in indices]


def weights_by_engine(row: Trial, folder, runs) -> dict[str, torch.Tensor]:
    result = train(row, Place(folder, runs))
    assert result.status == "done", result.reason
    return load_file(runs / "weights" / f"{row.key}.safetensors")


def assert_close(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_variant
def test_engine_equals_automatic_optimization(changes, folder, tmp_path):
    row = ROW.replace(**changes)
    module = NormClassifier(**module_arguments(row))
    trainer = L.Trainer(**QUIET, precision="64-true", gradient_clip_val=row.clip_norm)
    trainer.fit(module, train_dataloaders=DataLoader(batches_of(row, folder), batch_size=None))
    assert trainer.global_step == row.steps
    assert_close(weights_by_engine(row, folder, tmp_path), module.model.state_dict())


@each_variant
def test_engine_equals_a_bare_loop_with_torch_sgd(changes, folder, tmp_path):
    row = ROW.replace(**changes)
    model = NormClassifier(**module_arguments(row)).model.double().train()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weights = [p for m in linear for n, p in m.named_parameters() if "bias" not in n]
    rest = [p for p in model.parameters() if all(p is not w for w in weights)]
    decay = row.weight_decay
    scales = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    others = [p for p in rest if all(p is not scale for scale in scales)]
    free = decay if row.decay_norm else 0.0
    decays = ((weights, decay), (others, free), (scales, free + row.gamma_decay))
    groups = [{"params": some, "weight_decay": each} for some, each in decays]
    optimizer = torch.optim.SGD(groups, lr=row.lr, momentum=row.momentum)
    rising = row.warmup * row.steps
    for step, (x, y) in enumerate(batches_of(row, folder)):
        share = 1.0
        if step < rising:
            share = (step + 1) / rising
        elif row.schedule == "cosine":
            share = math.cos(math.pi / 2 * (step - rising) / (row.steps - rising)) ** 2
        for group in optimizer.param_groups:
            group["lr"] = row.lr * share
        optimizer.zero_grad()
        F.cross_entropy(row.logit_scale * model(x), y, label_smoothing=row.label_smoothing).backward()
        if row.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), row.clip_norm)
        optimizer.step()
    assert_close(weights_by_engine(row, folder, tmp_path), model.state_dict())


class Seen(nn.Module):
    """A linear classifier with a place for what a test wants to know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.fractions: list[float] = []

    def set_progress(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def classifier(model: nn.Module | str = "mlp", **changes) -> ChunkedClassifier:
    data = Arrays(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)
    arguments = {
        "train": data,
        "batch_size": 8,
        "training_seed": (0, "test"),
        "in_shape": (6,),
        "num_classes": 3,
        "steps": 10,
        "norm": "none",
    }
    options = {"model_options": {"depth": 1, "width": 5}} if model == "mlp" else {}
    return ChunkedClassifier(model=model, **arguments | options | changes)


def fit(module: ChunkedClassifier, blocks, **arguments) -> L.Trainer:
    trainer = L.Trainer(**QUIET | arguments)
    trainer.fit(module, train_dataloaders=blocks)
    return trainer


def blocks_of(steps: int, cuts=()) -> Blocks:
    return Blocks(0, steps, cuts, lambda: False)


def test_global_step_counts_the_steps_of_all_blocks():
    ends = []
    trainer = fit(classifier(after_block=ends.append, steps=70), blocks_of(70, [3, 50]))
    assert trainer.global_step == 70
    assert ends == [3, 35, 50, 70]


@pytest.mark.parametrize("argument", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_trainer_arguments_without_effect_are_refused_in_one_line(argument):
    with pytest.raises(MisconfigurationException, match=next(iter(argument))) as refusal:
        fit(classifier(), blocks_of(10), **argument)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
def test_where_blocks_are_cut_does_not_change_the_weights(precision):
    states = []
    for cuts in ((), range(1, 40), (5, 33)):
        module = classifier(steps=40, dropout=0.3, norm="batch")
        fit(module, blocks_of(40, cuts), precision=precision)
        states.append(module.model.state_dict())
    for state in states[1:]:
        for name, value in states[0].items():
            assert torch.equal(state[name], value), name


def test_an_autocast_that_keeps_converted_weights_trains_as_one_that_does_not():
    # Releases of Lightning differ in which one they put around a block.
    losses = []
    for cached in (True, False):
        module = classifier(steps=32)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            fit(module, blocks_of(32))
        losses.append(module.last_losses)
    assert losses[0] == losses[1]


@given(st.integers(0, 90), st.integers(1, 200), st.sets(st.integers(1, 250)))
def test_blocks_cover_each_step_once_and_end_at_every_cut(start, length, cuts):
    stop = start + length
    blocks = list(Blocks(start, stop, sorted(cuts), lambda: False))
    assert [step for block in blocks for step in range(*block)] == list(range(start, stop))
    ends = {end for _, end in blocks}
    assert {cut for cut in cuts if start < cut < stop} <= ends
    assert max(end - at for at, end in blocks) <= BLOCK_STEPS
    for number, (at, _) in enumerate(blocks):
        assert list(Blocks(at, stop, sorted(cuts), lambda: False)) == blocks[number:]


def test_progress_is_told_before_each_step_as_a_share_of_the_budget():
    model = Seen()
    fit(classifier(model), blocks_of(10))
    assert model.fractions == [0.0, *(step / 10 for step in range(11))]  # at the start, and at the end


def test_a_loss_that_is_not_finite_ends_the_training_and_is_remembered():
    module = classifier(steps=400, lr=1e30, schedule="constant")
    ends = []
    module.after_block = ends.append
    trainer = fit(module, Blocks(0, 400, (), lambda: module.diverged))
    assert module.diverged
    assert trainer.global_step == ends[-1] < 400


def test_dropout_differs_from_step_to_step_but_not_from_run_to_run():
    masks = []

    class Noisy(Seen):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            masks.append(F.dropout(torch.ones(64), 0.5))
            return self.linear(x)

    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        fit(classifier(Noisy()), blocks_of(10))
    first, second = torch.stack(masks[:10]), torch.stack(masks[10:])
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 10


def test_frozen_parameters_stay_and_unused_ones_do_no_harm():
    class Partly(Seen):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))
            self.linear.bias.requires_grad_(False)

    model = Partly()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(classifier(model), blocks_of(10))
    after = model.state_dict()
    assert torch.equal(after["linear.bias"], before["linear.bias"])
    assert torch.equal(after["unused"], before["unused"])
    assert not torch.equal(after["linear.weight"], before["linear.weight"])


def test_hyperparameters_hold_no_data():
    held = classifier(lr=0.3).hparams
    assert held["lr"] == 0.3
    assert not {"train", "after_block"} & held.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps is None; give the number"),
        ({"batch_size": 41}, "batch_size is 41, but there are 40 training samples; use 1 to 40"),
        ({"augment": "flipp"}, "did you mean 'flip'"),
        ({"augment": "flip"}, "needs images"),
    ],
)
def test_what_cannot_train_is_refused_at_construction(changes, message):
    with pytest.raises(BadInput, match=message) as refusal:
        classifier(**changes)
    assert "\n" not in str(refusal.value)


def laid_out_otherwise(gradient: torch.Tensor, how: str) -> torch.Tensor:
    if how == "transposed":
        return gradient.t().contiguous().t()
    if how == "expanded":
        return gradient[:1, :1].expand_as(gradient)
    return gradient


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize("how", ["alike", "transposed", "expanded"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_equals_torch_whatever_the_layout_of_a_gradient(how, kernel, momentum, monkeypatch):
    if kernel == "plain":
        monkeypatch.delattr(torch, "_fused_sgd_")
    draw = torch.Generator().manual_seed(1)
    ours = [nn.Parameter(torch.randn(3, 4, generator=draw, dtype=torch.float64)) for _ in range(3)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = FusedSGD([(ours[:2], 0.1), ([], 0.3), (ours[2:], 0.0)], momentum)
    reference = torch.optim.SGD(
        [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:]}], lr=1.0, momentum=momentum
    )
    for lr in (0.3, 0.2, 0.1):
        gradients = [
            laid_out_otherwise(torch.randn(3, 4, generator=draw, dtype=torch.float64), how) for _ in ours
        ]
        optimizer.step(gradients, lr)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-13, atol=1e-13)


def test_no_callback_of_another_package_gets_into_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = L.Callback()
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda group: [offered])
    assert offered in L.Trainer(logger=False, enable_checkpointing=False).callbacks  # type: ignore[attr-defined]
    assert offered not in trainer_for(Trial(), "cpu").callbacks  # type: ignore[attr-defined]


@given(
    stop=st.integers(1, 120),
    cuts=st.sets(st.integers(1, 120), max_size=5),
    splits=st.sets(st.integers(0, 130), max_size=6),
)
def test_splits_cut_blocks_and_move_no_other_edge(stop, cuts, splits):
    plain = Blocks(0, stop, sorted(cuts), lambda: False)
    split = Blocks(0, stop, sorted(cuts), lambda: False, splits)
    ends = {end for _, end in plain}
    assert plain.edges == split.edges == ends
    assert {end for _, end in split} == ends | {s for s in splits if 0 < s < stop}
    assert [step for a, b in split for step in range(a, b)] == list(range(stop))

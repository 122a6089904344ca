"""Tests of the rank probe against known spectra and plain recomputation in NumPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnbench import NormClassifier
from bnbench.data import load_split
from bnbench.probes.base import Moment
from bnbench.probes.rank import Rank, measure_rank
from bnbench.probes.trace import Reading
from bnbench.registry import BadInput

LABELS = torch.zeros(0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def measure_representation(h: Tensor, **options: int) -> Reading:
    """Measure a network whose only hidden representation is this matrix."""
    model = nn.Sequential(nn.Linear(h.shape[1], h.shape[1], bias=False), nn.Linear(h.shape[1], 1)).to(h)
    nn.init.eye_(model[0].weight)
    return measure_rank(model, h, LABELS, **options)


def recompute(h: Tensor, n: int) -> dict[str, float]:
    """The numbers of a representation by singular values, cosines pair by pair and a determinant."""
    matrix = h.detach().double().numpy()
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    p = squares[squares > 0] / squares.sum()
    covariance = matrix.T @ matrix
    pairs = [
        matrix[i] @ matrix[j] / (np.linalg.norm(matrix[i]) * np.linalg.norm(matrix[j]))
        for i in range(len(matrix))
        for j in range(i)
    ]
    gram = matrix[:n] @ matrix[:n].T
    return {
        "effective_rank": math.exp(-(p * np.log(p)).sum()),
        "rank_bound": np.trace(covariance) ** 2 / (covariance**2).sum(),
        "cosine": statistics.mean(pairs),
        "isometry_gap": -(np.linalg.slogdet(gram)[1] / n - math.log(np.trace(gram) / n)),
        "orthogonality": float(np.linalg.norm(gram / np.trace(gram) - np.eye(n) / n)),
    }


def assert_equal(reading: Reading, place: int, wanted: dict[str, float], rel: float = 1e-9) -> None:
    assert {name: row[place] for name, row in reading.series.items()} == pytest.approx(wanted, rel=rel)


def test_orthogonal_rows_of_one_length_are_an_isometry_of_full_rank() -> None:
    values = measure_representation(3 * rotation(12, 0)[:8]).values
    wanted = {"effective_rank": 8, "rank_bound": 8, "cosine": 0, "isometry_gap": 0}
    assert values == pytest.approx(wanted, abs=1e-12)


def test_rows_on_one_line_have_rank_one_and_no_isometry_gap() -> None:
    values = measure_representation(draw(6, 1).abs() * draw(1, 9, seed=1)).values
    assert [values[name] for name in ("effective_rank", "rank_bound", "cosine")] == pytest.approx([1, 1, 1])
    assert math.isnan(values["isometry_gap"])


def test_opposite_rows_cancel_in_the_mean_cosine() -> None:
    h = torch.tensor([[1.0, 0], [-2, 0], [0, 5], [0, -1]], dtype=torch.float64)
    # Two of six pairs have the cosine −1, the others 0.
    assert measure_representation(h).values["cosine"] == pytest.approx(-1 / 3)


def test_a_known_spectrum_gives_its_entropy_its_participation_ratio_and_its_mean_logarithms() -> None:
    squares = torch.tensor([8.0, 4, 2, 1, 1], dtype=torch.float64)
    p = squares / squares.sum()
    h = rotation(5, 1) @ torch.diag(squares.sqrt()) @ rotation(5, 2)
    # A sixth row of zeros, so that the first five are the n rows; it has no part in any number.
    found = measure_representation(torch.cat([h, torch.zeros_like(h[:1])]))
    assert found.values["effective_rank"] == pytest.approx(
        math.exp(-sum(q * math.log(q) for q in p.tolist()))
    )
    assert found.values["rank_bound"] == pytest.approx(16**2 / (64 + 16 + 4 + 1 + 1))
    assert found.values["isometry_gap"] == pytest.approx(math.log(16 / 5) - math.log(64) / 5)
    assert found.series["orthogonality"][0] == pytest.approx(math.sqrt(86 / 256 - 1 / 5))
    assert found.values["cosine"] == pytest.approx(recompute(h, 5)["cosine"])


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_bound_is_no_larger_than_the_effective_rank_and_that_no_larger_than_the_rank(
    seed: int,
) -> None:
    h = draw(20, 4, seed=seed) @ draw(4, 15, seed=seed + 100)
    values = measure_representation(h).values
    assert 1 <= values["rank_bound"] <= values["effective_rank"] <= np.linalg.matrix_rank(h.numpy())


def test_a_batch_norm_net_is_read_where_norm_and_activation_have_been() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True)),
        *(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Tanh()),
        nn.Linear(24, 3),
    ).double()
    x = draw(40, 10)
    reading = measure_rank(model.eval(), x, LABELS)
    state = model.state_dict()
    assert reading.index == ("3", "6")
    h = x
    for place, (linear, activation) in enumerate([("0", torch.relu), ("3", torch.tanh)]):
        a = h @ state[f"{linear}.weight"].T + state[f"{linear}.bias"]
        h = activation((a - a.mean(0)) / (a.var(0, correction=0) + 1e-5).sqrt())
        assert_equal(reading, place, recompute(h, 16))


def test_only_the_first_examples_count_but_the_statistics_are_of_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 30), nn.BatchNorm1d(30), nn.Linear(30, 3)).double()
    x = draw(50, 10)
    with torch.no_grad():
        h = F.batch_norm(model[0](x), None, None, training=True)
    assert_equal(measure_rank(model, x, LABELS, examples=9), 0, recompute(h[:9], 9))
    moment = Moment(step=0, lr=0.1, batch_size=50)
    assert_equal(Rank(examples=9).measure(model, x, LABELS, moment), 0, recompute(h[:9], 9))


def test_a_norm_that_centres_the_whole_batch_leaves_an_isometry_gap() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 3)).double()
    x = draw(12, 20)
    with torch.no_grad():
        h = F.batch_norm(model[0](x), None, None, training=True)
    assert np.linalg.matrix_rank(h.numpy()) == 11
    assert_equal(measure_rank(model, x, LABELS), 0, recompute(h, 11))


def test_maps_of_channels_are_averaged_over_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 9, 3), nn.ReLU(), nn.Conv2d(9, 12, 3), nn.ReLU(), nn.Flatten()), nn.Linear(48, 3)
    ).double()
    x = draw(20, 2, 6, 6)
    with torch.no_grad():
        first = model[:2](x)
        second = model[:5](x)
    reading = measure_rank(model, x, LABELS)
    assert_equal(reading, 0, recompute(first.mean((2, 3)), 9))
    assert_equal(reading, 1, recompute(second, 9))


def test_tokens_of_a_sequence_are_averaged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 2)).double()
    x = draw(10, 5, 7)
    with torch.no_grad():
        h = model[:2](x).mean(1)
    assert_equal(measure_rank(model, x, LABELS), 0, recompute(h, 9))


class Block(nn.Module):
    """Two maps that read the same, and a third one that reads their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.branch = nn.Linear(8, 8)
        self.skip = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.branch(h) + self.skip(h))


def test_a_representation_that_two_maps_read_counts_once() -> None:
    assert measure_rank(Block(), draw(10, 6).float(), LABELS).index == ("branch", "head")


def test_a_single_map_is_judged_by_its_input() -> None:
    x = draw(6, 9)
    assert_equal(measure_rank(nn.Linear(9, 2).double(), x, LABELS), 0, recompute(x, 5))


def test_the_examples_of_a_norm_with_a_reference_batch_are_those_of_the_batch() -> None:
    module = NormClassifier(
        "mlp",
        "virtual_batch",
        in_shape=(8,),
        num_classes=3,
        model_options={"depth": 1, "width": 12},
        norm_options={"own_weight": 0.0},
    ).double()
    x, module.reference = draw(10, 8), draw(30, 8, seed=1)
    module.find_followers()
    module.train()
    weight = module.model.layers[0].linear.weight.detach()
    a, r = x @ weight.T, module.reference @ weight.T
    h = torch.relu((a - r.mean(0)) / (r.var(0, correction=0) + 1e-5).sqrt())
    assert_equal(measure_rank(module, x, LABELS), 0, recompute(h, 9))


def test_very_small_representations_are_not_rounded_to_nothing() -> None:
    h = draw(10, 12)
    assert_equal(measure_representation(1e-200 * h), 0, recompute(h, 9))


@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
def test_a_representation_of_zeros_or_without_numbers_gives_nan(fill: float) -> None:
    reading = measure_representation(torch.full((5, 6), fill, dtype=torch.float64))
    assert all(math.isnan(row[0]) for row in reading.series.values())


def test_a_broken_layer_leaves_the_others_their_numbers() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    nn.init.constant_(model[1].bias, math.nan)
    series = measure_rank(model, draw(5, 6), LABELS).series
    assert all(math.isfinite(row[0]) and math.isnan(row[1]) for row in series.values())


def deep(depth: int, width: int, *, norm: bool, activation: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A deep network whose weights keep the variance of what goes through."""
    generator = torch.Generator().manual_seed(seed)
    gain = 2 if activation is nn.ReLU else 1
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt(gain / width), generator=generator)
        layers += [linear, *([nn.BatchNorm1d(width)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 2)).double()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """64 handwritten digits, (64, 64)."""
    split = load_split("digits", 0, folder=tmp_path_factory.mktemp("data"))
    return split.train.x[:64].flatten(1).double()


@pytest.mark.parametrize(
    ("norm", "activation", "low", "high"),
    [
        (False, nn.ReLU, 1, 1.1),
        (True, nn.ReLU, 5, 7.5),
        (False, nn.Identity, 1, 2.8),
        (True, nn.Identity, 6.8, 7.8),
    ],
)
def test_batch_norm_keeps_the_rank_of_a_deep_net_near_the_root_of_its_width(
    norm: bool, activation: Callable[[], nn.Module], low: float, high: float, images: Tensor
) -> None:
    # √64 = 8; without a norm the representations collapse onto one direction (Daneshmand et al. 2020).
    nets = [deep(80, 64, norm=norm, activation=activation, seed=seed) for seed in range(3)]
    found = [measure_rank(net, images, LABELS).values["rank_bound"] for net in nets]
    assert low <= statistics.mean(found) <= high


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(BadInput, match="probe 'rank': examples must be 2 or more, not 1"):
        Rank(examples=1)
    with pytest.raises(BadInput, match="probe 'rank': examples must be 2 or more, not 0"):
        measure_representation(draw(5, 5), examples=0)
    with pytest.raises(BadInput, match="probe 'rank' compares examples: give it a batch of 2 or more, not 1"):
        measure_representation(draw(1, 5))

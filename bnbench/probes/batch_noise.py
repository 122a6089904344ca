"""Batch noise: how much the statistics of a batch, and the outputs that depend on them, scatter."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn

from bnbench.probes.base import Moment, Probe, probe
from bnbench.probes.batches import evaluation_mode, outputs_by_batch, training_batches
from bnbench.probes.passes import check_seen, is_linear_map, leaving_no_trace, run, watching
from bnbench.probes.trace import Reading

#: Random batches over which the statistics of a layer are taken.
DRAWN_BATCHES = 128
#: A variance below this share of the squared mean is rounding: the unit is constant.
CONSTANT = 1e-12


@leaving_no_trace
@torch.no_grad()
def measure_batch_noise(model: nn.Module, x: Tensor, y: Tensor | None = None, *, batch_size: int) -> Reading:
    """The scatter of batch means and variances by layer, and of the output of a sample among others.

    The N samples are a population, of which random batches of B are drawn without replacement. With the
    activations of a unit, a hidden linear map's or convolution's output (samples × positions), which have
    the variance σ² in the population, and mean μ_B and biased variance σ²_B in a batch,

        mean_noise = Var[μ_B] / σ²,   variance_noise = Var[σ²_B] / σ⁴,   effective_samples = σ² / Var[μ_B].

    Noises are means over the units that are not constant, effective_samples is one over their mean noise;
    the values are means over layers. Without positions mean_noise is (1/B) (N − B) / (N − 1) whatever the
    data; positions of a convolution that are correlated add less than as many samples would. B is
    `batch_size`, or the `ghost_size` of the norm that the model has behind the linear map. Activations are
    those of evaluation by precise statistics: a layer's noise is that of its own batch, without what the
    noise of the layers below adds in training.

        logit_noise = √ mean Var_batches[f(x_i)] / √ mean Var_i[f_precise(x_i)]

    is the standard deviation of a sample's output f(x_i), by the statistics of its batch and without
    dropout, over batches with random others, over that between samples by precise statistics; means are
    over samples and outputs, and each sample is in two such batches. It is exactly 0 where no norm depends
    on the batch.

    Series by layer: `mean_noise`, `variance_noise`, `effective_samples`. The draws are the same each time.
    y is not used. Raises BadInput where there are fewer than two batches of samples.
    Source: what is measured is what Luo et al. 2019 (arXiv:1809.00846) hold to regularize; the measures are
    ours.
    """
    batches = torch.stack(training_batches("batch_noise", x, batch_size))
    evaluation_mode(model)
    generator = torch.Generator().manual_seed(0)
    one, other = (_outputs_in_company(model, batches, generator).double() for _ in range(2))
    precise, moments = _run_and_watch(model, batches.flatten(0, 1))
    sizes = _normalized_sizes(model, batch_size)
    draws = {
        size: _draw(batch_size * len(batches), size, generator).to(x.device) for size in set(sizes.values())
    }
    hidden = list(moments)[:-1] or list(moments)
    noises = torch.stack([_noise(*moments[name], draws[sizes[name]]) for name in hidden])
    series = dict(zip(("mean_noise", "variance_noise", "effective_samples"), noises.T.tolist(), strict=True))
    # Of two draws the variance is half the squared difference.
    within = (one - other).square().mean() / 2
    between = precise.double().var(0).mean()
    return Reading(
        {
            **{name: _mean_of_finite(numbers) for name, numbers in series.items()},
            "logit_noise": (within / between).sqrt().item(),
        },
        {name: tuple(numbers) for name, numbers in series.items()},
        "layer",
        tuple(hidden),
    )


def _outputs_in_company(model: nn.Module, batches: Tensor, generator: torch.Generator) -> Tensor:
    """The output of each sample (batches, B, *) in a batch with random others.

    It keeps its place in the batch, since the rounding of a matrix product depends on that.
    """
    order = torch.rand(batches.shape[:2], generator=generator).argsort(0).to(batches.device)
    places = torch.arange(batches.shape[1], device=batches.device)
    outputs = torch.stack(outputs_by_batch(model, list(batches[order, places])))
    return outputs[order.argsort(0), places]


def _run_and_watch(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Outputs, and by linear map the mean of a and of a² over the positions of each sample (N, C)."""
    # Not `run_and_watch`, which keeps whole activations: here they are of many batches.
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if name not in moments:
            units_last = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
            values = units_last.double().reshape(len(output), -1, units_last.shape[-1])
            moments[name] = (values.mean(1), values.square().mean(1))

    with watching(model, is_linear_map, keep):
        output = run(model, x)
    check_seen(model, moments)
    return output, moments


def _normalized_sizes(model: nn.Module, batch_size: int) -> dict[str, int]:
    """By linear map, how many samples share the statistics of the norm behind it."""
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_linear_map(module):
            sizes[name] = batch_size
        elif sizes and hasattr(module, "ghost_size"):
            sizes[next(reversed(sizes))] = int(module.ghost_size)
    return sizes


def _draw(samples: int, size: int, generator: torch.Generator) -> Tensor:
    """Random batches without replacement, as weights of the samples in the mean of a batch (batches, N)."""
    cuts = math.ceil(DRAWN_BATCHES * size / samples)
    orders = [torch.randperm(samples, generator=generator) for _ in range(cuts)]
    members = torch.cat([order[: samples // size * size] for order in orders]).view(-1, size)
    weights = torch.zeros(len(members), samples, dtype=torch.float64)
    return weights.scatter_(1, members, 1 / size)


def _noise(mean: Tensor, square: Tensor, draws: Tensor) -> Tensor:
    """Mean noise, variance noise and effective samples of one layer, from moments (N, C) of its samples."""
    centre = mean.mean(0)
    centred = mean - centre
    square = square - centre.square() - 2 * centre * centred
    variance = square.mean(0)
    means = draws @ centred
    variances = draws @ square - means.square()
    varies = variance > CONSTANT * centre.square()
    mean_noise = (means.square().mean(0) / variance)[varies].mean()
    variance_noise = (variances.var(0) / variance.square())[varies].mean()
    return torch.stack([mean_noise, variance_noise, 1 / mean_noise])


def _mean_of_finite(numbers: list[float]) -> float:
    finite = [number for number in numbers if math.isfinite(number)]
    return statistics.fmean(finite) if finite else math.nan


@probe("batch_noise", passes=27, batches=8, paper="arXiv:1809.00846")
class BatchNoise(Probe):
    """Scatter of batch statistics and of outputs; see :func:`measure_batch_noise`."""

    def measure(self, model: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Reading:
        return measure_batch_noise(model, x, y, batch_size=moment.batch_size)

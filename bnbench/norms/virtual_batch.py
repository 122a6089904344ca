"""Virtual batch normalization (Salimans et al., 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbench.norms.base import add_affine, check_eps, norm, per_channel, show_options, widen
from bnbench.registry import BadInput


@norm(
    "virtual_batch",
    paper="arXiv:1606.03498",
    batch_dependent=False,
    scale_invariant=False,
    examples=({}, {"own_weight": 0.0}, {"own_weight": 0.5}),
)
class VirtualBatchNorm(nn.Module):
    """Standardize each channel by the statistics of a fixed reference batch, and of the sample itself.

    y = γ (x − m) / √(s² + eps) + β for one sample of x (N, C, *). With μ and the biased σ² of a channel over
    the R samples of the reference and their positions, with μ_x and σ_x² those over the positions of the
    sample alone (x and 0 where there are none), and with w = own_weight, 1 / (R + 1) by default:

        m = (1 − w) μ + w μ_x,   s² = (1 − w) σ² + w σ_x² + w (1 − w) (μ − μ_x)²,

    which mixes E[x] and E[x²] and does not cancel where the mean is large. The samples of the reference are
    themselves normalized by μ and σ² alone. Evaluation is the same function as training.

    The reference is what `set_reference(x)` was given, else the first training batch of the layer; then μ and
    σ² are constants, and go stale as the layers below learn. :mod:`bnbench.norms.reference` keeps them
    current: it sends the reference through the network with every batch (`reference_rows`), and gradients
    flow through its statistics. bnbench trains so, on a reference of `reference_size` samples, by default as
    many as a batch has. With own_weight=0 no sample's output depends on what else is in its batch: the
    statistics are those of batch normalization without their noise.

    running_mean and running_var are the reference's μ and biased σ², reference_samples is R, or 0 before
    there is one.

    Pitfalls: A reference as large as the batch doubles the cost of a step. Results depend on which samples it
    has, and one that is set once and never refreshed goes stale.

    Raises BadInput for weights and sizes that cannot be, and ValueError for a reference of one value a
    channel.

    Source: Salimans et al. 2016, section 3.4, and the authors' public code, which has the weight 1 / (R + 1).
    """

    running_mean: Tensor
    running_var: Tensor
    reference_samples: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int = 2,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        own_weight: float | None = None,
        reference_size: int | None = None,
    ) -> None:
        super().__init__()
        if own_weight is not None and not 0 <= own_weight < 1:
            raise BadInput(f"own_weight must be at least 0 and below 1, or None, not {own_weight!r}")
        if reference_size is not None and reference_size < 2:
            raise BadInput(f"reference_size must be 2 or more, or None, not {reference_size!r}")
        self.num_features = num_features
        self.eps = check_eps(eps)
        self.affine = affine
        self.own_weight = own_weight
        self.reference_size = reference_size
        #: So many samples at the head of the input are the reference, as it is at this moment.
        self.reference_rows = 0
        self._referred = False
        add_affine(self, num_features, gamma=affine, beta=affine)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("reference_samples", torch.tensor(0))

    extra_repr = show_options

    @torch.no_grad()
    def set_reference(self, x: Tensor) -> None:
        self._centre(widen(x), len(x))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.reference_rows
        if not rows and self.training and not self._referred:
            rows = len(x)
        y, var = self._centre(widen(x), rows)
        # Not len(), which is a fixed number where torch.export takes a batch of any size.
        if self.own_weight != 0 and rows < x.shape[0]:
            y, var = self._mix(y, var, rows)
        scale = (var + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return (y * scale).to(x.dtype)
        weight, bias = per_channel(widen(self.weight), x), per_channel(widen(self.bias), x)
        return torch.addcmul(bias, y, weight * scale).to(x.dtype)

    def _centre(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """x minus the mean of the reference, and its biased variance, each channel by itself.

        The first `rows` samples are the reference; without such it is the one that the buffers know.
        """
        if not rows:
            mean, var = widen(self.running_mean), widen(self.running_var)
            return x - per_channel(mean, x), per_channel(var, x)
        if x[:rows].numel() <= self.num_features:
            raise ValueError("a reference batch needs more than one value a channel; give it more samples")
        # Not var_mean, which takes 5 to 10 times as long on a processor.
        dims = [0, *range(2, x.ndim)]
        mean = x[:rows].mean(dims)
        y = x - per_channel(mean, x)
        var = y[:rows].square().mean(dims)
        with torch.no_grad():
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            self.reference_samples.fill_(rows)
        self._referred = True
        return y, per_channel(var, x)

    def _mix(self, y: Tensor, var: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The same by the mixed statistics of each sample; the first `rows` of y are the reference."""
        weight = self.own_weight or 1 / (self.reference_samples.to(y.dtype) + 1)
        is_other = torch.arange(y.shape[0], device=y.device) >= rows
        w = (is_other.to(y.dtype) * weight).view(-1, *(1,) * (y.ndim - 1))
        if y.ndim == 2:
            between, own_var = y, torch.zeros_like(y)
        else:
            between = y.mean([*range(2, y.ndim)], keepdim=True)
            own_var = (y - between).square().mean([*range(2, y.ndim)], keepdim=True)
        return y - w * between, var + w * (own_var - var + (1 - w) * between.square())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *more: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *more)
        samples = state_dict.get(prefix + "reference_samples")
        if samples is not None:
            self._referred = bool(samples > 0)

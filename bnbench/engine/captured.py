"""Losses and gradients of a step as a recorded CUDA graph: one launch a step in place of hundreds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bnbench.norms import FollowsProgress

Results = tuple[Tensor, Sequence[Tensor]]
Differentiate = Callable[..., Results]

#: Calls that run as they are written, in which libraries choose their kernels and take their memory.
WARM_CALLS = 2


class Recorder(Protocol):
    """Runs work so that it can be recorded afterwards, and records it."""

    def warm_up(self, work: Callable[[], Results]) -> Results:
        """Run the work once."""
        ...

    def record(self, work: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """Record the work without running it; what replays it, and the tensors that a replay fills."""
        ...


class CudaRecorder:
    """Records the kernels of the current CUDA device (`torch.cuda.CUDAGraph`)."""

    def warm_up(self, work: Callable[[], Results]) -> Results:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = work()
        torch.cuda.current_stream().wait_stream(side)
        return results

    def record(self, work: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        graph = torch.cuda.CUDAGraph()
        # Copies of the weights that autocast keeps from outside would never be made anew in a replay.
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph):
                results = work()
        finally:
            torch.set_autocast_cache_enabled(cached)
        return graph.replay, results


class RecordedStep:
    """The losses and gradients of a batch, recorded at its third call and replayed from then on.

    Beside its arguments, whose shapes stay, the function may read tensors that are only changed in place
    (parameters, buffers, the generators' states). The gradients are overwritten by the next call.
    """

    def __init__(self, function: Differentiate, recorder: Recorder) -> None:
        self.function = function
        self.recorder = recorder
        self.calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, *arguments: Tensor) -> Results:
        self.calls += 1
        if self.calls <= WARM_CALLS:
            return self.recorder.warm_up(lambda: self.function(*arguments))
        if self._replay is None:
            self._arguments = [argument.clone() for argument in arguments]
            self._replay, self._results = self.recorder.record(lambda: self.function(*self._arguments))
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given)
        self._replay()
        losses, gradients = self._results
        return losses.clone(), gradients


def recorder_for(device: torch.device) -> Recorder | None:
    """What records the steps on a device: on a GPU where the environment has BNBENCH_CUDA_GRAPHS=1."""
    wanted = os.environ.get("BNBENCH_CUDA_GRAPHS") == "1"
    return CudaRecorder() if wanted and device.type == "cuda" else None


def chosen(recorded: RecordedStep | None, plain: Differentiate, model: nn.Module) -> Differentiate:
    """The recorded step where there is one and its replay would do all that a call of the model does.

    It repeats kernels, and no Python: hooks would not be called, and norms with a ramp would stand still.
    """
    by_python = any(
        isinstance(module, FollowsProgress) or module._forward_hooks or module._forward_pre_hooks
        for module in (model.modules() if recorded is not None else ())
    )
    return plain if recorded is None or by_python else recorded

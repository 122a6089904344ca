"""Tasks of preflight that stand for devices, compilers and stores, sound or broken."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from bnbench.engine.known_step import SHARES, Step, take_step
from bnbench.study.table import Result


def card_here() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def right_step() -> Step:
    return take_step()


def wrong_on_card_1() -> Step:
    step = dict(take_step())
    if card_here() == "1":
        step["running variance"] = step["running variance"] * 1.01
    return step


def dies_on_card_1() -> Step:
    if card_here() == "1":
        os._exit(1)
    return take_step()


def hangs_on_card_1() -> Step:
    if card_here() == "1":
        time.sleep(60)
    return take_step()


def nan_everywhere() -> Step:
    return {name: values * np.nan for name, values in take_step().items()}


def no_bf16_fault() -> str:
    return ""


def bf16_fault_on_card_1() -> str:
    return "autocast gives torch.float32" if card_here() == "1" else ""


def joined_batch() -> list[Step]:
    whole = take_step()
    first = {name: v[: SHARES[0]] if v.ndim > 1 else v for name, v in whole.items()}
    # The gradients of the parameters are with the first process.
    second = {
        name: v[SHARES[0] :] if v.ndim > 1 else v * ("of the s" not in name) for name, v in whole.items()
    }
    return [first, second]


def local_shares() -> list[Step]:
    return [take_step(share=slice(0, SHARES[0])), take_step(share=slice(SHARES[0], None))]


def compiled(path: str, cache: str) -> float:
    return 0.0


def compiled_wrong(path: str, cache: str) -> float:
    return 0.5


def loaded(name: str, options: Mapping[str, Any], folder: str) -> None:
    pass


def written(uri: str, runs: str) -> None:
    pass


def trained(values: Mapping[str, Any], data: str, runs: str) -> Result:
    time.sleep(60 if values["norm"] == "none" else 0.1)
    return Result("done", {"time/step_ms": 1.0, "memory/peak_mib": float(os.getpid())})


class DiesInForward(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "meta":
            os._exit(1)
        return self.last(x.flatten(1))

"""Synchronized batch norm as users start it: torchrun, two ranks, DDP, batches of unequal size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.sync_trainer import SHARES, fit, joined_batch, network

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, f"--nproc-per-node={len(SHARES)}", "-m", "tests.sync_trainer", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]


@pytest.fixture(scope="module")
def alone():
    """The same training by one process on the joined batch, with torch's own batch norm."""
    with torch.random.fork_rng([]):
        model = network(nn.BatchNorm1d)
    return fit(model, joined_batch, 1 / sum(SHARES)), model.state_dict()


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_ranks_of_unequal_batches_train_as_one_process_on_the_joined_batch(ranks, alone):
    outputs, state = alone
    for step, wanted in enumerate(outputs):
        assert_close(torch.cat([rank["outputs"][step] for rank in ranks]), wanted)
    for rank in ranks:
        assert_close(rank["state"], state)


def test_all_ranks_end_with_equal_weights_and_buffers(ranks):
    torch.testing.assert_close(ranks[0]["state"], ranks[1]["state"], rtol=0, atol=0)


def test_statistics_of_the_shares_alone_would_differ(ranks):
    with torch.random.fork_rng([]):
        model = network(nn.BatchNorm1d)
    x, _ = joined_batch(0)
    apart = torch.cat([model(share) for share in x.split(SHARES)])
    together = torch.cat([rank["outputs"][0] for rank in ranks])
    assert (apart - together).abs().max() > 0.1

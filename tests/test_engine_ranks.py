"""The processes of one row: what ends them, that none is left, and who else may start them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bnbench import placement
from bnbench.cli.app import call
from bnbench.engine.conduct import train_row
from bnbench.engine.executors import LocalPool, end_on_sigterm
from bnbench.engine.ranks import RankFailed, run_ranks
from bnbench.engine.train import Place, train
from bnbench.registry import BadInput
from bnbench.study.trial import Trial
from tests.test_engine_train import folder, place
from tests.tiny_study import is_alive

__all__ = ["folder", "place"]  # fixtures

ROW = Trial(
    data="digits",
    n_train=200,
    model="mlp",
    model_options={"depth": 2, "width": 12},
    dropout=0.2,
    batch_size=8,
    devices=2,
    steps=70,
    lr=0.05,
    score_on="test",
    curve_points=5,
)


class Classifier(nn.Module):
    """A linear classifier that writes down its process; in a step, something happens to it on rank 1."""

    def __init__(self, num_classes: int, folder: str, fault: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
        self.folder, self.fault, self.steps = folder, fault, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            if self.steps == 5:
                rank = os.environ["RANK"]
                (Path(self.folder) / f"{rank}.{os.getpid()}").touch()
                self.happen(rank)
        return self.linear(x.flatten(1))

    def happen(self, rank: str) -> None:
        if self.fault == "slow":
            time.sleep(0.02)
            self.steps = 4
        elif self.fault == "raise on all" or (rank == "1" and self.fault == "raise"):
            raise ZeroDivisionError("in the model")
        elif rank == "1" and self.fault:
            os.kill(os.getpid(), signal.Signals[self.fault])


def with_fault(fault: str, tmp_path: Path, **changes) -> Trial:
    (tmp_path / "pids").mkdir()
    options = {"folder": str(tmp_path / "pids"), "fault": fault}
    return ROW.replace(model=f"{__name__}:Classifier", model_options=options, norm="none", **changes)


def pids_in(tmp_path: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in (tmp_path / "pids").iterdir()]


def assert_both_end(tmp_path: Path, within: float = 0.0) -> None:
    pids = pids_in(tmp_path)
    assert len(pids) == 2
    end = time.monotonic() + within
    while time.monotonic() < end and any(map(is_alive, pids)):
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


# Faults of a rank


@pytest.mark.parametrize(
    ("fault", "timeout", "said"),
    [
        ("SIGKILL", 60.0, "rank 1 of 2 was ended by SIGKILL (out of memory?)"),
        ("raise", 60.0, "Traceback (rank 1 of 2; most recent call last)"),
        ("raise on all", 60.0, "Traceback (rank "),
        # Nothing can be said of a process that stands still; the other one waits for it in vain.
        ("SIGSTOP", 1.5, "Traceback (rank 0 of 2; most recent call last)"),
    ],
)
def test_a_fault_of_one_rank_ends_all_and_fails_the_row(fault, timeout, said, place, tmp_path):
    begun = time.monotonic()
    result = train(with_fault(fault, tmp_path), place, timeout=timeout)
    assert result.status == "failed"
    assert result.reason.startswith(said), result.reason
    if fault.startswith("raise"):
        assert result.brief == "ZeroDivisionError: in the model"
    assert_both_end(tmp_path)
    assert time.monotonic() - begun < 40
    assert result.provenance["world_size"] == 2
    assert train(ROW.replace(steps=2), place).status == "done"


def answer_late(seconds: float) -> int:
    rank = dist.get_rank()
    time.sleep(seconds * rank)
    return rank


def test_a_rank_that_is_not_done_long_after_the_others_is_given_up():
    with pytest.raises(RankFailed, match=r"rank 1 of 2 was not done 0\.3 s after another one"):
        run_ranks(answer_late, {"seconds": 60.0}, 2, device="cpu", timeout=0.3)
    assert run_ranks(answer_late, {"seconds": 0.1}, 2, device="cpu", timeout=60.0) == 0


def refuse_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise BadInput("the data is missing; fetch it")
    dist.barrier()


def test_what_a_rank_refuses_is_refused_here():
    with pytest.raises(BadInput, match=r"^the data is missing; fetch it$"):
        run_ranks(refuse_on, {"rank": 1}, 2, device="cpu")


def exit_at_once() -> None:
    os._exit(3)


def test_a_rank_that_leaves_is_named_with_its_exit_code():
    with pytest.raises(RankFailed, match=r"rank [01] of 2 ended with exit code 3"):
        run_ranks(exit_at_once, {}, 2, device="cpu")


# The end of who started them


def train_here(row: Trial, place: Place, least: float) -> None:
    """What a worker does with a row; `least` as in `train`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, end_on_sigterm)
    train(row, place, save_every=0.0, save_least=least)


def start_training(row: Trial, place: Place, tmp_path: Path, least: float = 0.0):
    """A process that trains the row, once both of its ranks are at work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bnbench.engine.train"])
    process = context.Process(target=train_here, args=(row, place, least))
    process.start()
    end = time.monotonic() + 60
    while len(pids_in(tmp_path)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("signum", "least", "code"),
    [(signal.SIGKILL, 0.0, -signal.SIGKILL), (signal.SIGTERM, 1000.0, 143), (signal.SIGTERM, 0.0, 143)],
)
def test_ranks_end_with_the_process_that_started_them(signum, least, code, place, tmp_path):
    row = with_fault("slow", tmp_path, steps=100_000)
    process = start_training(row, place, tmp_path, least)
    begun = time.monotonic()
    os.kill(process.pid, signum)
    process.join(15)
    process.kill()
    assert process.exitcode == code
    assert_both_end(tmp_path, within=9.0)
    assert time.monotonic() - begun < 9
    saved = (place.runs / "checkpoints" / f"{row.key}.pt").exists()
    assert saved or least > 0 or signum == signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    return train(ROW, Place(folder, tmp_path_factory.mktemp("runs")))


def stop_after(row: Trial, place: Place, step: int) -> None:
    """Train in a rank until a checkpoint of this step is written, then end by SIGTERM."""
    from bnbench.engine.checkpoint import Checkpoint

    save = Checkpoint.maybe_save

    def stop_after_saving(self, model, optimizer, progress) -> None:
        if dist.get_rank() == 0 and progress.step >= step:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, model, optimizer, progress)

    Checkpoint.maybe_save = stop_after_saving
    train(row, place, save_least=0.0)


def test_a_resumed_row_is_bitwise_the_undisturbed_one(undisturbed, place):
    """Dropout, momentum and statistics of each device included; the checkpoint is that of SIGTERM."""
    with pytest.raises(RankFailed, match="rank 0 of 2 ended with exit code 143"):
        run_ranks(stop_after, {"row": ROW, "place": place, "step": 40}, 2, device="cpu", timeout=60.0)
    (checkpoint,) = (place.runs / "checkpoints").iterdir()
    saved = torch.load(checkpoint, weights_only=True)["progress"]
    assert 40 <= saved["step"] < ROW.steps
    resumed = train(ROW, place)
    assert undisturbed.status == "done", undisturbed.reason
    assert resumed.measured() == undisturbed.measured()
    assert resumed.curve == undisturbed.curve
    assert not list((place.runs / "checkpoints").iterdir())


# Who may start them


def is_forked() -> bool:
    return os.getppid() == multiprocessing.parent_process().pid


def forks_in_a_worker() -> bool:
    return run_ranks(is_forked, {}, 2, device="cpu", timeout=60.0)


def test_a_worker_forks_its_ranks_and_they_give_the_same_bits(undisturbed, folder, tmp_path):
    """Elsewhere a server forks them, which takes seconds to load torch first."""
    assert not run_ranks(is_forked, {}, 2, device="cpu", timeout=60.0)
    with LocalPool(placement.plan_workers((), 2)) as pool:
        assert pool.submit(forks_in_a_worker, devices=2).result(60)
        task = (train_row, ROW.as_dict(), str(folder), str(tmp_path))
        result = pool.submit(*task, devices=2).result(60)
    assert result.status == "done", result.reason
    assert result.measured() == undisturbed.measured()
    assert result.curve == undisturbed.curve


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


def train_by_torchrun(arguments: list[str]) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "bnbench.cli"]
    return [started(command + arguments, {})]


def train_as_srun_would(arguments: list[str]) -> list[subprocess.Popen[str]]:
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    step |= {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "row"}
    step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "bnbench.cli", *arguments]
    return [started(command, {**step, "SLURM_PROCID": n, "SLURM_LOCALID": n}) for n in ("0", "1")]


def started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "start", [train_by_torchrun, pytest.param(train_as_srun_would, marks=pytest.mark.slow)]
)
def test_torchrun_and_srun_give_the_same_bits(start, undisturbed, folder, tmp_path):
    path = tmp_path / "trial.json"
    path.write_text(json.dumps(ROW.as_dict()))
    processes = start(["train", str(path), "--data-folder", str(folder), "--gpus", "none"])
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    printed = json.loads("".join(out for out, _ in said))
    assert printed["status"] == "done"
    assert {name: printed[name] for name in undisturbed.measured()} == undisturbed.measured()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3"},
            "2 devices, but torchrun has started 3 processes",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "3"},
            "2 devices, but srun has started 3 processes",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, "--ntasks-per-node=2"),
    ],
)
def test_a_wrong_number_of_processes_is_refused_in_one_line(
    environment, message, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "trial.json"
    path.write_text(json.dumps(ROW.as_dict()))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(placement, "enter", lambda *slots: None)  # it would set this process's environment
    assert call(["train", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1

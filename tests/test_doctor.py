"""Tests of what is looked at before a study starts, on made-up machines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bnbench import doctor
from bnbench.doctor import Finding, Torch, check, file_system, refuse_unfit, try_torch_on_gpus
from bnbench.registry import BadInput

NVIDIA_SMI = """#!/bin/sh
case "$1" in
-L) echo 'GPU 0: NVIDIA A100 (UUID: GPU-0aaa)'; echo 'GPU 1: NVIDIA A100 (UUID: GPU-1aaa)' ;;
--query-gpu=driver_version) echo 535.104.05; echo 535.104.05 ;;
*) echo '| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2     |' ;;
esac
"""


@pytest.fixture
def gpu_machine(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine with two cards and a driver for CUDA 12.2."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return {**kept, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def look(topic: str, runs: Path, gpus: str = "none", **options: Any) -> Finding:
    """Return the one finding on a topic, by default on a machine whose programs cannot be found."""
    options.setdefault("environ", {"PATH": ""})
    (finding,) = [one for one in check(runs, gpus, **options) if one.topic == topic]
    assert "\n" not in str(finding)
    return finding


def test_this_machine_is_fit(tmp_path: Path) -> None:
    findings = check(tmp_path / "not" / "yet" / "there", "none", environ=os.environ, mounts="")
    assert refuse_unfit(findings) == [finding for finding in findings if finding.level == "warn"]
    assert not (tmp_path / "not").exists()


def test_all_faults_are_told_in_one_line() -> None:
    findings = [
        Finding("fault", "a", "first fault", "its remedy"),
        Finding("warn", "b", "a warning"),
        Finding("fault", "c", "second fault"),
    ]
    with pytest.raises(BadInput, match=r"^first fault; its remedy \| second fault$"):
        refuse_unfit(findings)


def test_a_finding_is_listed_in_columns() -> None:
    assert Finding("ok", "GPU", "none").line() == "ok     GPU          none"
    assert (
        Finding("fault", "folder", "it is full", "make room").line()
        == "fault  folder       it is full; make room"
    )


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    finding = look("python", tmp_path, python=(3, 10))
    assert finding.level == "fault"
    assert "3.10" in finding.text
    assert "PYTHON=" in finding.remedy


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = ("mlflow", "optuna")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    finding = look("packages", tmp_path)
    assert finding.level == "fault"
    assert "mlflow, optuna" in finding.text
    assert "make install" in finding.remedy


def test_releases_of_an_attacker_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.6.3" if name == "lightning" else version(name)
    )
    findings = check(tmp_path, "none", environ={"PATH": ""})
    assert any(one.level == "fault" and "lightning 2.6.3" in one.text for one in findings)


MOUNTS = """/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/ada/local xfs rw 0 0
tmpfs /mnt/late tmpfs rw 0 0
user@host: /mnt/late fuse.sshfs rw 0 0
//server/share /mnt/two\\040words cifs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/srv/runs", "/", "ext4"),
        ("/home/ada/runs", "/home", "nfs4"),
        ("/homestead/runs", "/", "ext4"),
        ("/home/ada/local/runs", "/home/ada/local", "xfs"),
        ("/mnt/late/runs", "/mnt/late", "fuse.sshfs"),
        ("/mnt/two words/runs", "/mnt/two words", "cifs"),
    ],
)
def test_the_innermost_and_latest_mount_holds_a_path(path: str, point: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == (point, kind)


def test_a_link_into_a_network_file_system_is_seen_through(tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "remote")
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path.resolve() / 'remote'} nfs rw 0 0\n"
    assert look("file system", tmp_path / "runs", mounts=mounts).level == "fault"


@pytest.mark.parametrize(
    "kind",
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "lustre",
        "gpfs",
        "beegfs",
        "fuse.sshfs",
        "ceph",
        "9p",
        "afs",
        "fuse.ceph",
    ],
)
def test_network_file_systems_are_refused(tmp_path: Path, kind: str) -> None:
    finding = look("file system", tmp_path, mounts=f"somewhere / {kind} rw 0 0\n")
    assert finding.level == "fault"
    assert kind in finding.text
    assert "SQLite" in finding.text
    assert "RUNS=" in finding.remedy


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuseblk", "apfs", ""])
def test_local_and_unknown_file_systems_pass(tmp_path: Path, kind: str) -> None:
    assert look("file system", tmp_path, mounts=f"somewhere / {kind} rw 0 0\n").level == "ok"


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    finding = look("folder", tmp_path / "runs")
    assert finding.level == "fault"
    assert "RUNS=" in finding.remedy


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused() -> None:
    assert look("folder", Path("/proc/runs")).level == "fault"


@pytest.mark.parametrize(("free", "level"), [(0.1, "fault"), (1.0, "warn"), (3.0, "ok")])
def test_little_space_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, level: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**30))
    finding = look("folder", tmp_path / "runs")
    assert finding.level == level
    assert finding.text == f"{free} GiB free for {tmp_path / 'runs'}"


def test_a_missing_compiler_is_a_warning(tmp_path: Path) -> None:
    assert look("compiler", tmp_path).level == "warn"
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    found = look("compiler", tmp_path, environ={"PATH": str(tmp_path), "CXX": "my-c++"})
    assert (found.level, found.text) == ("ok", "my-c++ for torch.compile")


def test_gpus_that_torch_can_use_are_fine(tmp_path: Path, gpu_machine: dict[str, str]) -> None:
    asked: list[str] = []

    def healthy(environ: Any) -> Torch:
        asked.append(environ["CUDA_VISIBLE_DEVICES"])
        return Torch("2.13.0", "12.1", 2)

    finding = look("GPU", tmp_path, "1,0", environ=gpu_machine, try_torch=healthy)
    assert finding.level == "ok"
    assert "535.104.05" in finding.text
    assert asked == ["1,0"]


@pytest.mark.parametrize("count", [0, 1])
def test_gpus_that_torch_cannot_use_stop_the_study(
    tmp_path: Path, gpu_machine: dict[str, str], count: int
) -> None:
    sight = Torch("2.13.0", "13.0", count, "The NVIDIA driver on your system\nis too old")
    finding = look("GPU", tmp_path, "all", environ=gpu_machine, try_torch=lambda environ: sight)
    assert finding.level == "fault"
    for part in ("driver 535.104.05", "CUDA up to 12.2", "torch 2.13.0 (CUDA 13.0)", "is too old"):
        assert part in finding.text
    for part in ("update the driver", "CUDA 12.2 or older", "PIP_ARGS=", "GPUS=none"):
        assert part in finding.remedy


def test_one_mig_instance_is_all_that_a_process_sees(tmp_path: Path, gpu_machine: dict[str, str]) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    parts = "echo '  MIG 3g Device 0: (UUID: MIG-a)'; echo '  MIG 3g Device 1: (UUID: MIG-b)'"
    program.write_text(NVIDIA_SMI.replace("-L) ", f"-L) echo 'GPU 0: A100 (UUID: GPU-x)'; {parts}; exit;"))
    sight = Torch("2.13.0", "12.1", 1)
    assert look("GPU", tmp_path, "all", environ=gpu_machine, try_torch=lambda environ: sight).level == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a GPU here")
def test_the_installed_torch_is_really_tried(tmp_path: Path, gpu_machine: dict[str, str]) -> None:
    with pytest.raises(BadInput, match=r"nvidia-smi lists 2 GPUs.*can use 0: .*GPUS=none"):
        refuse_unfit(check(tmp_path, environ=gpu_machine))


def test_a_torch_that_ends_badly_has_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    sight = try_torch_on_gpus({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert sight.gpus == 0
    assert "libcudart is missing" in sight.reason


def test_the_processor_may_be_asked_for(tmp_path: Path, gpu_machine: dict[str, str]) -> None:
    def never(environ: Any) -> Torch:
        raise AssertionError("torch was tried")

    assert look("GPU", tmp_path, "none", environ=gpu_machine, try_torch=never).level == "ok"
    assert look("GPU", tmp_path, "all", environ={"PATH": ""}, try_torch=never).level == "ok"


def test_an_impossible_choice_of_gpus_is_a_fault(tmp_path: Path, gpu_machine: dict[str, str]) -> None:
    finding = look("GPU", tmp_path, "0,5", environ=gpu_machine)
    assert finding.level == "fault"
    assert "names GPU 5" in finding.text


def test_looking_needs_neither_torch_nor_mlflow() -> None:
    code = "import sys, bnbench.doctor; print([name for name in ('torch', 'mlflow') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_the_packages_that_are_looked_for_are_installed_by_the_study_extra() -> None:
    wanted = importlib.metadata.requires("bnbench") or []
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted}
    assert set(doctor._NEEDED) <= names

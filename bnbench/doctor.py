"""What a machine must offer before a study starts there, and the remedy where it does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bnbench.placement import ask_nvidia_smi, choose_gpus, confine, usable_cores
from bnbench.registry import BadInput

_NETWORK_FILE_SYSTEM = re.compile(
    r"(fuse\.)?(9p|acfs|afpfs|afs|beegfs|ceph|cifs|coda|curlftpfs|davfs2?|fhgfs|gcsfuse|gfs2|glusterfs|gpfs|"
    r"juicefs|lustre|mfs|ncpfs|nfs4?|ocfs2|orangefs|panfs|pvfs2|rclone|s3fs|smb3|smbfs|sshfs|vboxsf|wekafs)"
)
_STOP_BELOW, _WARN_BELOW = 0.25, 2.0  # GiB of free disk space

# Needed by `bnbench run`, but not by the library.
_NEEDED = ("torch", "lightning", "torchmetrics", "mlflow", "optuna", "scipy")
_MALWARE = {"lightning": ("2.6.2", "2.6.3")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; a fault stops a study, a warning does not."""

    level: Literal["ok", "warn", "fault"]
    topic: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text

    def line(self) -> str:
        """The finding as `bnbench doctor` lists it."""
        return f"{self.level:<6} {self.topic:<12} {self}"


@dataclass(frozen=True)
class Torch:
    """The torch that a worker would use: its CUDA version, the GPUs it can compute on, and why not more."""

    version: str
    cuda: str | None
    gpus: int
    reason: str = ""


_TRY_TORCH = """
import json, torch
count, reason = 0, ""
try:
    for index in range(torch.cuda.device_count()):
        torch.ones(8, device=f"cuda:{index}").sum().item()
        count += 1
    if not count:
        torch.cuda.init()
except Exception as error:
    reason = str(error)
print(json.dumps([torch.__version__, torch.version.cuda, count, reason]))
"""


def try_torch_on_gpus(environ: Mapping[str, str]) -> Torch:
    """Add some numbers on every visible GPU, in a process with this environment, and count the GPUs."""
    command = [sys.executable, "-W", "ignore", "-c", _TRY_TORCH]
    try:
        answer = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=300)
        version, cuda, count, reason = json.loads(answer.stdout)
    except subprocess.TimeoutExpired:
        return Torch("?", None, 0, "torch does not answer within 300 s")
    except ValueError:
        return Torch("?", None, 0, f"torch ended with {answer.returncode}: {answer.stderr[-300:]}")
    return Torch(version, cuda, count, reason)


def check(
    runs: Path,
    gpus: str = "all",
    *,
    environ: Mapping[str, str],
    mounts: str | None = None,
    python: tuple[int, int] = sys.version_info[:2],
    try_torch: Callable[[Mapping[str, str]], Torch] = try_torch_on_gpus,
) -> list[Finding]:
    """Look at everything that a study depends on; every finding says in one line what would be right.

    `gpus` is "all", "none" or positions. `mounts` is the text of /proc/mounts, by default that of this
    machine. `try_torch` computes on the GPUs in a process of its own, so that this one never starts CUDA.
    """
    if mounts is None:
        table = Path("/proc/mounts")
        mounts = table.read_text(errors="replace") if table.exists() else ""
    return [
        _check_python(python),
        *_check_packages(),
        _check_file_system(runs, mounts),
        *_check_folder(runs),
        Finding("ok", "processor", f"{usable_cores()} usable cores"),
        _check_gpus(gpus, environ, try_torch),
        _check_compiler(environ),
    ]


def refuse_unfit(findings: Iterable[Finding]) -> list[Finding]:
    """Stop before the first trial where a study cannot end well; return the warnings.

    Raises:
        BadInput: there are faults; all of them in one line, each with its remedy.
    """
    findings = list(findings)
    faults = [str(finding) for finding in findings if finding.level == "fault"]
    if faults:
        raise BadInput(" | ".join(faults))
    return [finding for finding in findings if finding.level == "warn"]


def _check_python(version: tuple[int, int]) -> Finding:
    text = f"Python {version[0]}.{version[1]}"
    if version < (3, 11):
        return Finding("fault", "python", f"{text} is too old", "take 3.11 or newer (make PYTHON=python3.12)")
    return Finding("ok", "python", text)


def _check_packages() -> Iterator[Finding]:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        remedy = 'make install, or pip install -c constraints.txt -e ".[study]"'
        yield Finding("fault", "packages", f"not installed: {', '.join(missing)}", remedy)
    for name in _NEEDED:
        if _version(name) in _MALWARE.get(name, ()):
            text = f"{name} {_version(name)} was published by an attacker"
            yield Finding(
                "fault", "packages", text, "remove this environment, change your passwords, reinstall"
            )
    if not missing:
        yield Finding("ok", "packages", ", ".join(f"{name} {_version(name)}" for name in _NEEDED))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def file_system(path: Path, mounts: str) -> tuple[str, str]:
    """Return the mount point that holds a path and the kind of its file system ("" where it is unknown).

    `mounts` has one line a mount: device, mount point, kind, options. Of two mounts on one point the later
    one is on top. Blanks in names are written as octal escapes (\\040).
    """
    place, best, kind = path.resolve(), Path("/"), ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1]))
        if place.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, fields[2]
    return str(best), kind


def _check_file_system(runs: Path, mounts: str) -> Finding:
    point, kind = file_system(runs, mounts)
    if _NETWORK_FILE_SYSTEM.fullmatch(kind):
        return Finding(
            "fault",
            "file system",
            f"{runs} is on a network file system ({kind} at {point}), where SQLite loses data",
            "name a folder on a local disk (RUNS=/tmp/runs or --runs)",
        )
    return Finding("ok", "file system", f"{kind or 'unknown kind'} at {point}")


def _check_folder(runs: Path) -> Iterator[Finding]:
    """Write a file where `runs` is or will be, which tells more than permission bits; measure the space."""
    place = runs.absolute()
    try:
        place = next(folder for folder in (place, *place.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = "name a folder that you may write to (RUNS= or --runs)"
        yield Finding("fault", "folder", f"cannot write to {place} ({error.strerror})", remedy)
        return
    free = shutil.disk_usage(place).free / 2**30
    text = f"{free:.1f} GiB free for {runs}"
    if free < _WARN_BELOW:
        level: Literal["fault", "warn"] = "fault" if free < _STOP_BELOW else "warn"
        yield Finding(level, "folder", text, "make room, or name another folder (RUNS= or --runs)")
    else:
        yield Finding("ok", "folder", text)


def _check_compiler(environ: Mapping[str, str]) -> Finding:
    for name in (environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name, path=environ.get("PATH", os.defpath)):
            return Finding("ok", "compiler", f"{name} for torch.compile")
    return Finding(
        "warn", "compiler", "no C++ compiler, so no torch.compile", "install g++ or name one in CXX"
    )


def _check_gpus(wanted: str, environ: Mapping[str, str], try_torch: Callable[..., Torch]) -> Finding:
    """Compare the GPUs that the driver lists with those that torch can compute on."""
    if wanted == "none":
        return Finding("ok", "GPU", "none asked for; workers use the processor")
    try:
        chosen = choose_gpus(wanted, environ)
        driver, newest = _ask_driver(environ) if chosen else ("", "")
    except BadInput as error:
        return Finding("fault", "GPU", str(error))
    if not chosen:
        return Finding("ok", "GPU", "none visible; workers use the processor")
    torch = try_torch({**environ, **confine(chosen)})
    # CUDA shows a process one MIG instance at most.
    expected = 1 if any(name.startswith("MIG") for name in chosen) else len(chosen)
    build = f"torch {torch.version} ({'CUDA ' + torch.cuda if torch.cuda else 'a CPU build'})"
    if torch.gpus >= expected:
        return Finding("ok", "GPU", f"{len(chosen)} with driver {driver}, {build}")
    reason = f": {' '.join(torch.reason.split())[:200]}" if torch.reason else ""
    update = "update the driver, or " if torch.cuda else ""
    return Finding(
        "fault",
        "GPU",
        f"nvidia-smi lists {len(chosen)} GPU{'s' * (len(chosen) > 1)} (driver {driver}, CUDA up to {newest}),"
        f" but {build} can use {torch.gpus}{reason}",
        f"{update}install a torch built for CUDA {newest} or older (remove .venv, "
        "make install PIP_ARGS='--index-url ...'), or use the processor (GPUS=none or --gpus none)",
    )


def _ask_driver(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the version of the driver and the newest CUDA version that it runs."""
    driver = ask_nvidia_smi(environ, "--query-gpu=driver_version", "--format=csv,noheader") or ""
    newest = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", ask_nvidia_smi(environ) or "")
    return (driver.split() or ["unknown"])[0], newest[1] if newest else "unknown"

"""Where, when and with what a row was trained."""

from __future__ import annotations

import functools
import os
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from bnbench import __version__


@functools.cache
def git_state() -> tuple[str, bool]:
    """The commit of this checkout and whether files differ from it; an empty text outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    ask = functools.partial(subprocess.run, capture_output=True, text=True, timeout=10)
    try:
        commit = ask([*git, "rev-parse", "HEAD"])
        changes = ask([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.TimeoutExpired):
        return "", False
    return (commit.stdout.strip(), bool(changes.stdout.strip())) if commit.returncode == 0 else ("", False)


def _device_name(device: str) -> str:
    if device == "cpu":
        return platform.machine()
    # A process that only watches others must not start CUDA to learn a name.
    return torch.cuda.get_device_name() if cuda_has_started() else device


def cuda_has_started() -> bool:
    """Whether this process computes on a GPU already; asking starts nothing."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def provenance(device: str, started: float) -> dict[str, Any]:
    """What goes beside a result and is never compared; `started` in seconds since 1970."""
    commit, dirty = git_state()
    return {
        "started": started,
        "finished": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "bnbench": __version__,
        "git": commit,
        "dirty": dirty,
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "python": platform.python_version(),
    }

"""One coordinator a folder: a lock that a second one reads and respects, and that dies with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from bnbench.registry import BadInput


@contextlib.contextmanager
def hold(runs: Path) -> Iterator[None]:
    """Hold the folder. A holder that died holds nothing.

    Raises BadInput that says who holds it: process, host and since when.
    """
    path = runs / ".lock"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise BadInput(f"cannot write to {runs}: {error.strerror}; name another folder with --runs") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BadInput(
                f"{runs} is in use by {holder}; wait for it to end, or name another folder with --runs"
            ) from None
        except OSError as error:
            raise BadInput(
                f"cannot lock {path}: {error.strerror}; --runs names a folder on a local disk"
            ) from None
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        yield

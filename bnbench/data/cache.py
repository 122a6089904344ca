"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bnbench.registry import BadInput

Arrays = dict[str, NDArray[Any]]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name when all is written, and else leaves nothing.

    Two processes may write the same file: each writes its own, and the last one stays. Raises BadInput
    where the folder cannot be written to or is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadInput(f"cannot write {path} ({reason}); name another folder by BNBENCH_DATA") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def cached_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Read the arrays of an `.npz` file; where it is missing or damaged, make and write them first."""
    try:
        # zip stores a checksum of each array, so damage shows when an array is read.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            return dict(stored)
    except Exception:  # whatever is wrong with a cache, making it again is the remedy
        arrays = make()
    with whole_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy types the option allow_pickle into **
    return arrays

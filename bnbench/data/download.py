"""Files from the network: from the first mirror that has them, checked, and whole or not there at all."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bnbench.registry import BadInput


def obtain(urls: Sequence[str], sha256: str, folder: Path) -> Path:
    """Return the path of a file in the folder; where it is missing, download it.

    `urls` are mirrors of the same file, tried in order. A file that someone put into the folder is used.
    Raises BadInput where its checksum differs, and where no mirror delivers; nothing incomplete stays behind.
    """
    file = urls[0].rpartition("/")[2]
    path = folder / file
    if path.exists():
        found = _sha256(path)
        if found != sha256:
            raise BadInput(
                f"{path} has the SHA-256 {found} instead of {sha256}; delete it and run `make data` again"
            )
        return path
    faults = []
    for url in urls:
        fault = _download(url, sha256, path)
        if fault is None:
            return path
        faults.append(f"{url} ({fault})")
    raise BadInput(
        f"cannot download {', '.join(faults)}; run `make data` on a machine with internet, "
        f"or put {file} into {folder} and run it again"
    )


def _download(url: str, sha256: str, path: Path) -> str | None:
    """Download a file; say what went wrong, or None."""
    import pooch

    try:
        with _quiet(pooch.get_logger()):
            pooch.retrieve(
                url,
                known_hash=f"sha256:{sha256}",
                fname=path.name,
                path=path.parent,
                progressbar=sys.stderr.isatty(),
            )
    except OSError as error:
        return error.strerror or type(error).__name__
    except ValueError as error:  # pooch names the expected and the found checksum
        return " ".join(str(error).split())
    return None


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Opening the Optuna storage that people look at: a journal file, or a database."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnbench.registry import BadInput
from bnbench.tracking import mask
from bnbench.tracking.store import one_line

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


@dataclass(frozen=True)
class Storage:
    """An Optuna storage that answers; `shown` is its address without passwords, `notice` what was mended."""

    optuna: BaseStorage
    shown: str
    notice: str = ""


def open_storage(address: str | None, runs: Path, taken: Iterable[str] = ()) -> Storage:
    """Open `runs/optuna.journal`, a journal file of another name, or any database that Optuna takes.

    A corrupt `runs/optuna.journal` is deleted, since all in it is written again; anything else is left as it
    is. Raises BadInput, without passwords, where an address does not work, or is one of those that are
    `taken` by the record or MLflow.
    """
    _silence()
    if address is None:
        path = runs / "optuna.journal"
        # A lock that outlived its process would be waited for; the folder's own lock keeps others out.
        Path(f"{path}.lock").unlink(missing_ok=True)
        try:
            return Storage(_open_journal(path), str(path))
        except Exception as error:
            problem = one_line(error, "")
        try:
            path.unlink()
            return Storage(
                _open_journal(path), str(path), f"{path} was damaged ({problem}) and is written anew"
            )
        except OSError as error:
            raise BadInput(f"cannot use {path}: {error.strerror}; move it away") from None
    shown = mask(address)
    if _resolved(address) in {_resolved(other) for other in (*taken, f"sqlite:///{runs / 'bnbench.db'}")}:
        raise BadInput(f"--storage {shown} holds other tables of this project; name a database of its own")
    try:
        if not re.match(r"[A-Za-z][\w+.-]*:", address):
            return Storage(_open_journal(Path(address)), shown)
        from optuna.storages import RDBStorage

        return Storage(RDBStorage(address), shown)
    except Exception as error:
        raise BadInput(
            f"cannot use --storage {shown}: {one_line(error, address)}; give a database such as"
            f" sqlite:///optuna.db, a journal file, or leave it out for {runs / 'optuna.journal'}"
        ) from None


def _open_journal(path: Path) -> BaseStorage:
    """Read a journal whole. Raises some error where it is damaged."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock

    class Journal(BaseJournalBackend):
        """Optuna's journal file without waiting for the disk, which takes 15 times as long.

        What a loss of power takes away is written again.
        """

        def __init__(self) -> None:
            self._lock = JournalFileSymlinkLock(str(path))
            self._file = JournalFileBackend(str(path), self._lock)

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
            return self._file.read_logs(log_number_from)

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            self._lock.acquire()
            try:
                with path.open("ab") as file:
                    file.write(text.encode())
            finally:
                self._lock.release()

    storage = JournalStorage(Journal())
    with path.open("rb") as file:
        if file.read(1):
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                raise ValueError("its last line is cut off")
    return storage


def _silence() -> None:
    """End Optuna's lines on studies and its notes on what is experimental, for the whole process.

    Both are set once, by the thread that starts the others: neither can be set for one thread.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _resolved(address: str) -> str:
    if address.startswith("sqlite:///"):
        return f"sqlite:///{Path(address.removeprefix('sqlite:///')).absolute()}"
    return address

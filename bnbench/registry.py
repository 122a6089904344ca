"""A dictionary of named things that finds its entries by itself and explains a miss."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class BadInput(ValueError):
    """What a person asked for cannot be: the message says in one line what, where, and what would do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which of the known words was probably meant, and list them all."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(names) or 'none'}"


class Registry(Mapping[str, T], Generic[T]):
    """Named entries of one kind, from a package of ours and from entry points of other packages.

    Every module of `package` is imported at the first look, so that an entry exists by being in a file
    there; then every entry point of the group `package` is loaded, so that an installed package can add
    entries. A decorator in these modules calls :meth:`add`.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._discovered = False

    def add(self, name: str, entry: T) -> None:
        """Register an entry. Raises BadInput where the name is taken by something else."""
        if name in self._entries:
            raise BadInput(f"the {self.kind} {name!r} is registered twice; give one of them another name")
        self._entries[name] = entry

    def _discover(self) -> None:
        if self._discovered:
            return
        # Set first, since a module that is imported here may look an entry up.
        self._discovered = True
        try:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            for point in entry_points(group=self.package):
                point.load()
        except BaseException:
            self._discovered = False
            raise

    def __getitem__(self, name: str) -> T:
        self._discover()
        try:
            return self._entries[name]
        except KeyError:
            raise BadInput(f"no {self.kind} named {name!r}{nearest(name, self._entries)}") from None

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

"""A dictionary of named things that finds its entries by itself and explains a miss; options likewise."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

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


def check_options(owner: str, layer: Callable[..., object], options: Mapping[str, object]) -> None:
    """Hold options against the keyword-only parameters of a layer and their annotations.

    Raises BadInput that begins with the owner, for an option unknown, missing or of a wrong type.
    """
    parameters = _options_of(layer)
    for option, value in options.items():
        if option not in parameters:
            raise BadInput(f"{owner} has no option {option!r}{nearest(option, parameters)}")
        annotation = parameters[option].annotation
        if get_origin(annotation) is Literal:
            check_choice(f"{owner}: {option}", value, get_args(annotation))
        elif not _fits(value, annotation):
            wanted = annotation.__name__ if isinstance(annotation, type) else annotation
            raise BadInput(f"{owner}: {option} must be {wanted}, not {value!r}")
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise BadInput(f"{owner} needs the option {parameter.name!r}")


@functools.cache
def _options_of(layer: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a layer; a study asks for those of the same few thousands of times."""
    return {
        parameter.name: parameter
        for parameter in inspect.signature(layer, eval_str=True).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _fits(value: object, annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return value is None
    if annotation in (int, float):
        number = int if annotation is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    # bool, str and classes; annotations of other kinds are for the layer to check.
    return not isinstance(annotation, type) or isinstance(value, annotation)


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> str:
    """Return the value. Raises BadInput unless it is one of the choices."""
    if value not in choices:
        raise BadInput(f"{option} cannot be {value!r}{nearest(str(value), choices)}")
    return str(value)

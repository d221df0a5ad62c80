"""What is being checked: a method, how it is made, and the keys that it is made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedstill.config import Config, config_from
from fedstill.conformance.findings import DoesNotApply
from fedstill.errors import InputError
from fedstill.methods.base import LocalObjective, Refinement, ServerFusion
from fedstill.settings import ModedSettings, Settings

Parts = tuple[LocalObjective, ServerFusion]
Make = Callable[[Config], Parts | Refinement]
Keys = Mapping[str, object]

SMALL: Keys = {
    "local.batch_size": 64,
    "fedgen.generator_steps": 3,
    "fedgen.generator_batch": 16,
    "fedgen.generator_hidden": 6,
    "fedgen.noise_dim": 4,
    "fedmd.align_samples": 8,
    "fedmd.public_epochs": 1,
    "fedmd.private_epochs": 1,
    "fedmd.revisit_batch_size": 4,
    "fedmd.private_batch_size": 4,
    "fedftg.iterations": 2,
    "fedftg.batch_size": 10,
    "fedftg.noise_dim": 4,
    "fedftg.generator_width": 2,
    "feddf.steps": 3,
    "feddf.patience": 0,
    "feddf.batch_size": 10,
    "feddf.generator_steps": 2,
    "feddf.noise_dim": 4,
    "feddf.generator_width": 2,
}
"""Sizes that keep the suite fast; they change no equation."""


@dataclass(frozen=True)
class Subject:
    """A base method or a refinement under check.

    Parameters
    ----------
    name : str
        What findings call it.
    make : callable
        Makes ``(objective, fusion)``, or a refinement, from a configuration.
    like : str or None
        The built-in method whose family checks apply.
    held : mapping
        Dotted keys that the caller has fixed; no check changes them.
    asked : mapping
        Dotted keys that a check has asked for.
    rigid : bool
        Whether it is one ready-made object that no key changes.
    refines : bool
        Whether it is a refinement.
    references : Path or None
        Folder of reference cases; None for those that come with fedstill.
    """

    name: str
    make: Make
    like: str | None = None
    held: Keys = field(default_factory=dict)
    asked: Keys = field(default_factory=dict)
    rigid: bool = False
    refines: bool = False
    references: Path | None = None

    @cached_property
    def config(self) -> Config:
        """The configuration that the method is made with."""
        pinned = self.pinned
        sizes = {key: value for key, value in SMALL.items() if key not in pinned}
        try:
            return config_from(nested({**({} if self.rigid else {**sizes, **self.asked}), **self.held}), self.name)
        except InputError as error:
            if not self.asked:
                raise
            raise DoesNotApply(f"what it asks for does not go with the fixed keys: {error}") from error

    @property
    def pinned(self) -> set[str]:
        """The keys that no check may change: those given, and the switches that a given mode sets."""
        return {*self.held, *(key for key, value in self._set_by_modes().items() if not a_number(value))}

    @property
    def of_a_mode(self) -> set[str]:
        """The numbers that a given mode sets; a check changes them where it says nothing otherwise."""
        return {key for key, value in self._set_by_modes().items() if a_number(value)}

    def _set_by_modes(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, mode in self.held.items():
            table, _, last = key.partition(".")
            kind = Config.model_fields[table].annotation if table in Config.model_fields else None
            if last == "mode" and isinstance(kind, type) and issubclass(kind, ModedSettings):
                found |= {f"{table}.{name}": value for name, value in kind.MODES.get(str(mode), {}).items()}
        return found

    def near(self, **keys: object) -> Subject:
        """Return the method with keys of its own table as asked for, as far as nobody has chosen them."""
        return self._asking(keys, self.pinned | self.of_a_mode)

    def where(self, **keys: object) -> Subject:
        """Return the method with keys of its own table as asked for; the numbers of a mode give way.

        Raises
        ------
        DoesNotApply
            Where one of them is fixed at another value.
        """
        changed = self._asking(keys, self.pinned)
        changed.must(self._dotted(keys))
        return changed

    def _asking(self, keys: Keys, kept: set[str]) -> Subject:
        wanted = {key: value for key, value in self._dotted(keys).items() if key not in kept}
        return self if self.rigid else replace(self, asked={**self.asked, **wanted})

    def must(self, keys: Keys) -> None:
        """Raise DoesNotApply where a dotted key has another value."""
        for key, wanted in keys.items():
            table, _, last = key.partition(".")
            own = getattr(getattr(self.config, table), last)
            if own != wanted:
                raise DoesNotApply(f"it needs {key} = {wanted!r}, which is fixed at {own!r}")

    def parts(self) -> Parts:
        """Make the objective and the fusion."""
        made = self.make(self.config)
        assert isinstance(made, tuple)
        return made

    def refinement(self) -> Refinement:
        """Make the refinement."""
        made = self.make(self.config)
        assert not isinstance(made, tuple)
        return made

    def _dotted(self, keys: Keys) -> dict[str, object]:
        return {f"{self.like}.{name}": value for name, value in keys.items()}


def a_number(value: object) -> bool:
    """Say whether a key's value is a number, and not a switch."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def nested(keys: Keys) -> dict[str, Any]:
    """Return dotted keys as tables."""
    tables: dict[str, Any] = {}
    for key, value in keys.items():
        place = tables
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tables


def of_objects(name: str, made: Parts | Refinement, like: str | None, held: Keys) -> Subject:
    """Return ready-made objects as a subject.

    Those that keep their settings as a dataclass field can be made anew with other numbers; what is not a number
    (a mode, a switch) stays as it is. Others are checked as they are, and are taken to have the default keys, or
    those in ``held``.
    """
    parts: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    found = [found for part in parts for found in settings_of(part)]
    if not found:
        return Subject(name, lambda _: made, like, held, rigid=True, refines=not isinstance(made, tuple))
    fixed, numbers = dict(held), dict[str, object]()
    for _, table, settings in found:
        for key, info in type(settings).model_fields.items():
            value = getattr(settings, key)
            if value == info.default:
                continue
            (numbers if a_number(value) else fixed).setdefault(f"{table}.{key}", value)

    def remake(config: Config) -> Parts | Refinement:
        anew = tuple(
            replace(part, **{field: getattr(config, table) for field, table, _ in settings_of(part)})
            if settings_of(part)
            else part
            for part in parts
        )
        return (anew[0], anew[1]) if isinstance(made, tuple) else anew[0]

    return Subject(name, remake, like, fixed, numbers, refines=not isinstance(made, tuple))


def settings_of(part: Any) -> list[tuple[str, str, Settings]]:
    """Return the settings in an object's dataclass fields: field, table of the configuration, settings."""
    if not is_dataclass(part):
        return []
    tables = {info.annotation: name for name, info in Config.model_fields.items()}
    own = [(one.name, getattr(part, one.name)) for one in fields(part) if one.init]
    return [
        (name, tables[type(value)], value)
        for name, value in own
        if isinstance(value, Settings) and type(value) in tables
    ]


def of_factory(name: str, make: Callable[[Config], Any], like: str | None, held: Keys) -> Subject:
    """Return what a factory makes as a subject.

    Raises
    ------
    InputError
        Where the factory fails, or makes neither ``(objective, fusion)`` nor a refinement.
    """
    subject = Subject(name, make, like, held)
    config = subject.config
    try:
        made: Any = make(config)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"method {name!r}: its factory failed: {type(error).__name__}: {error}") from error
    if not (isinstance(made, tuple) and len(made) == 2) and not hasattr(made, "refine"):
        raise InputError(
            f"method {name!r}: its factory made {type(made).__name__}; it must take the configuration and return "
            f"(objective, fusion), or a refinement"
        )
    return replace(subject, refines=not isinstance(made, tuple))

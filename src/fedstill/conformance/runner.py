"""Run the checks on the built-in methods, or on anybody's objects."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fedstill.config import Config, load_config
from fedstill.conformance import averaging, feddf, feddistill, feddyn, fedftg, fedgen, fedmd, generic, moon, scaffold
from fedstill.conformance import references as references_
from fedstill.conformance import refinements as refinements_
from fedstill.conformance.findings import CHECKS, Check, DoesNotApply, Finding
from fedstill.conformance.replays import REPLAYS, folder
from fedstill.conformance.subject import Keys, Parts, Subject, of_factory, of_objects
from fedstill.errors import InputError
from fedstill.methods.base import LocalObjective, Method, Refinement
from fedstill.methods.registry import BASES, REFINEMENTS, compose
from fedstill.names import unknown

MODULES = (
    generic, averaging, scaffold, feddyn, moon, fedgen, feddistill, fedmd, refinements_, fedftg, feddf, references_,
)  # fmt: skip
"""Where checks are defined; importing them fills the table."""


def list_checks() -> tuple[Check, ...]:
    """Return all checks: those of every method, then those of each family."""
    return tuple(sorted(CHECKS.values(), key=lambda one: (one.refines, bool(one.families))))


def conformance(
    names: Sequence[str] | None = None, *, keys: Keys | None = None, references: Path | None = None
) -> list[Finding]:
    """Check built-in methods, or methods by import path.

    Parameters
    ----------
    names : sequence of str, optional
        Such as ``scaffold``, ``+fedftg``, ``scaffold+fedftg`` or ``package.module:factory``; by default all built-ins.
    keys : mapping, optional
        Dotted keys of the configuration that are fixed, such as ``{"scaffold.mode": "code"}``.
    references : Path, optional
        Folder of reference cases; by default ``FEDSTILL_GOLDEN``, or those that come with fedstill.

    Raises
    ------
    InputError
        For an unknown name, or a folder without reference cases.
    """
    _check_references(references)
    names = [*BASES, *(f"+{name}" for name in REFINEMENTS)] if names is None else names
    subjects = [subject for name in names for subject in named(name, None, keys or {})]
    return [found for subject in subjects for found in examine(replace(subject, references=references))]


def check_method(
    method: Method | Parts | Refinement | Callable[[Config], Any] | str,
    name: str | None = None,
    *,
    like: str | None = None,
    keys: Keys | None = None,
    references: Path | None = None,
    only: Sequence[str] | None = None,
) -> list[Finding]:
    """Check a method, whoever wrote it.

    Parameters
    ----------
    method : Method, tuple, refinement, callable or str
        A composed method; ``(objective, fusion)``; a refinement; a factory that takes the configuration and returns
        one of the last two, which lets checks choose their own numbers; or a name or import path.
    name : str, optional
        What the findings call it.
    like : str, optional
        The built-in method whose family checks apply; by default the one that ``name`` or the method's name says.
    keys : mapping, optional
        Dotted keys of the configuration that are fixed. For objects that keep no settings: what they have.
    references : Path, optional
        Folder of reference cases; by default ``FEDSTILL_GOLDEN``, or those that come with fedstill.
    only : sequence of str, optional
        Run these checks alone.

    Returns
    -------
    list of Finding
        An exception inside a check is a finding that does not hold.

    Raises
    ------
    InputError
        For an unknown ``like`` or check, something that is no method, or a folder without reference cases.
    """
    _check_references(references)
    if only is not None and (strange := [one for one in only if one not in CHECKS]):
        raise unknown("check", strange[0], CHECKS)
    families = [*BASES, *REFINEMENTS]
    if like is not None and like.removeprefix("+") not in families:
        raise unknown("method (like)", like, families)
    subjects = subjects_of(method, name, like.removeprefix("+") if like else None, keys or {})
    return [found for one in subjects for found in examine(replace(one, references=references), only)]


def _check_references(given: Path | None) -> None:
    """Refuse a folder that has none of the cases: a check that compares nothing would pass."""
    place = given or folder()
    if not any((place / f"{case}.json").is_file() for case in REPLAYS):
        raise InputError(
            f"{place} has none of the reference cases, such as {next(iter(REPLAYS))}.json: name their folder with "
            f"{'references' if given else 'FEDSTILL_GOLDEN'}"
        )


def subjects_of(
    method: Method | Parts | Refinement | Callable[[Config], Any] | str, name: str | None, like: str | None, keys: Keys
) -> list[Subject]:
    """Return what there is to check: a base method, refinements, or both."""
    if isinstance(method, str):
        return [replace(one, name=name or one.name) for one in named(method, like, keys)]
    if isinstance(method, Method):
        base = method.name.partition("+")[0]
        family = like or (base if base in BASES else None)
        found = [of_objects(name or method.name, (method.objective, method.fusion), family, keys)]
        for part in method.refinements:
            own = part.name if part.name in REFINEMENTS else None
            found.append(of_objects(f"+{part.name}", part, own, keys))
        return found
    if isinstance(method, tuple):
        if len(method) != 2 or not isinstance(method[0], LocalObjective):
            raise InputError("a method is (objective, fusion), a refinement, or a factory of one of these")
        return [of_objects(name or type(method[0]).__name__, method, like or known(name, BASES), keys)]
    if hasattr(method, "refine"):
        part = cast(Refinement, method)
        title = name or f"+{part.name}"
        return [of_objects(title, part, like or known(title.removeprefix("+"), REFINEMENTS), keys)]
    if not callable(method):
        raise InputError(f"{type(method).__name__} is no method: give (objective, fusion), a refinement, or a factory")
    title = name or str(getattr(method, "__name__", "factory"))
    return [of_factory(title, method, like or known(name, [*BASES, *REFINEMENTS]), keys)]


def known(name: str | None, names: Mapping[str, object] | Sequence[str]) -> str | None:
    """Return a name if it is among the known ones."""
    return name if name in names else None


def named(name: str, like: str | None, keys: Keys) -> list[Subject]:
    """Return a composed method's base and refinements, or a single ``+refinement``."""
    if like in REFINEMENTS and "+" not in name:
        name = f"+{name}"
    base, *rest = [part.strip() for part in name.split("+")]
    if not base and len(rest) != 1:
        raise unknown("method", name, [*BASES, *(f"+{part}" for part in REFINEMENTS)])
    held = {**keys, "method": name if base else f"fedavg{name}"}
    found = []
    if base:
        found.append(of_factory(name, maker(None), like or known(base, BASES), held))
    for place, part in enumerate(rest):
        family = known(part, REFINEMENTS) or (None if base else like)
        found.append(of_factory(f"+{part}", maker(place), family, held))
    return found


def maker(place: int | None) -> Callable[[Config], Parts | Refinement]:
    """Return what makes a composed method's base, or the refinement in a place, from a configuration."""

    def make(config: Config) -> Parts | Refinement:
        made = compose(config)
        return (made.objective, made.fusion) if place is None else made.refinements[place]

    return make


def keys_of(overrides: Sequence[str]) -> Keys:
    """Return ``key=value`` overrides as keys that are held.

    Raises
    ------
    InputError
        For an unknown key or an impossible value.
    """
    load_config(None, overrides)
    found: dict[str, object] = {}
    for override in overrides:
        key, _, raw = override.partition("=")
        try:
            found[key.strip()] = tomllib.loads(f"value = {raw.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = raw.strip()
    return found


def examine(subject: Subject, only: Sequence[str] | None = None) -> list[Finding]:
    """Run the checks that apply to a subject."""
    return [
        verdict(one, subject)
        for one in list_checks()
        if one.refines is subject.refines
        and (not one.families or subject.like in one.families)
        and (only is None or one.name in only)
    ]


def verdict(check: Check, subject: Subject) -> Finding:
    """Run one check; whatever it raises is what it found."""
    try:
        said = check.run(subject)
    except DoesNotApply as reason:
        return Finding(subject.name, check.name, None, str(reason))
    except Exception as error:  # whatever a foreign object raises is what was found
        text = " ".join(str(error).split())
        kind = type(error).__name__
        return Finding(subject.name, check.name, False, f"{kind}: {text}" if text else kind)
    return Finding(subject.name, check.name, said.held, said.detail)

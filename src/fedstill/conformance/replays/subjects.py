"""The subject of a replay: in the form that a case was recorded in, and where its inside may be looked at."""

from __future__ import annotations

from typing import Any, TypeVar

from fedstill.conformance.findings import DoesNotApply
from fedstill.conformance.subject import Subject
from fedstill.methods.registry import BASES, REFINEMENTS
from fedstill.settings import ModedSettings

T = TypeVar("T")


def inside(part: object, kind: type[T]) -> T:
    """Return a part of the built-in class itself, whose inside is compared.

    Raises
    ------
    DoesNotApply
        Where the part is somebody else's.
    """
    if type(part) is not kind or not isinstance(part, kind):
        raise DoesNotApply("it compares the inside of the built-in method")
    return part


def built_in(subject: Subject) -> bool:
    """Say whether a subject is made of the built-in method's own classes."""

    def classes(made: Any) -> list[type]:
        return [type(part) for part in (made if isinstance(made, tuple) else (made,))]

    own = (REFINEMENTS if subject.refines else BASES)[str(subject.like)]
    return classes(subject.make(subject.config)) == classes(own.make(subject.config))


def as_recorded(subject: Subject, mode: str, **hyper: object) -> Subject:
    """Return the subject with every key of its table as a case has it: those of a mode, and the case's own numbers.

    Raises
    ------
    DoesNotApply
        Where another value is fixed; and where the mode is a form of the authors' code that somebody else's method
        need not have: its caller has to say so, by fixing the mode.
    """
    settings: type[ModedSettings] = type(getattr(subject.config, str(subject.like)))
    defaults = {name: info.default for name, info in settings.model_fields.items()}
    same = subject.where(**{**defaults, **settings.MODES[mode], "mode": mode, **hyper})
    key = f"{subject.like}.mode"
    if mode != "paper" and subject.held.get(key) != mode and not built_in(subject):
        raise DoesNotApply(f"it is a form of the authors' code; fix {key} = {mode!r} if the method has it")
    return same


def plain_average(subject: Subject) -> Subject:
    """Return a subject whose models are averaged by n_k, and nothing else.

    Raises
    ------
    DoesNotApply
        Where the keys of ``[fusion]`` say otherwise.
    """
    subject.must({"fusion.client_weights": "samples"})
    return plain(subject)


def plain(subject: Subject) -> Subject:
    """Return a subject whose server knows neither momentum nor a head of its own.

    Raises
    ------
    DoesNotApply
        Where the keys of ``[fusion]`` say otherwise.
    """
    subject.must({"fusion.server_momentum": 0.0, "fusion.head": "mean"})
    return subject

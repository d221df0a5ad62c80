"""The place of the authors' own numbers: checks that are given a folder of reference cases.

A folder holds pairs of ``name.json`` and ``name.npz``. Whoever knows how to replay a case enters a function here::

    @case("server_scaffold")
    def server_scaffold(subject: Subject, folder: Path) -> Verdict: ...

The check ``agrees-with-reference-cases`` runs, for the method at hand, every case that has a replay and is in the
folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedstill.conformance.findings import DoesNotApply, Verdict, all_of, check
from fedstill.conformance.subject import Subject

Run = Callable[[Subject, Path], Verdict]


@dataclass(frozen=True)
class Replay:
    """How a case is replayed, and for which method."""

    case: str
    family: str
    run: Run


REPLAYS: dict[str, Replay] = {}


def case(name: str, family: str) -> Callable[[Run], Run]:
    """Enter the replay of a case."""

    def enter(run: Run) -> Run:
        REPLAYS[name] = Replay(name, family, run)
        return run

    return enter


def agreement(subject: Subject) -> Verdict:
    """Replay the method's cases in the folder that was given."""
    folder = subject.references
    if folder is None:
        raise DoesNotApply("no folder of reference cases was given")
    own = [one for one in REPLAYS.values() if one.family == subject.like and (folder / f"{one.case}.json").is_file()]
    if not own:
        raise DoesNotApply(f"{folder.name} has no case of this method that can be replayed")
    return all_of(*[one.run(subject, folder) for one in own])


@check(without="It does what we think the paper says, and not what its authors' code computes.")
def agrees_with_reference_cases(subject: Subject) -> Verdict:
    """The numbers are those of the authors' code, in the cases of the folder that is given."""
    return agreement(subject)


@check(refines=True, without="It does what we think the paper says, and not what its authors' code computes.")
def refinement_agrees_with_reference_cases(subject: Subject) -> Verdict:
    """The numbers are those of the authors' code, in the cases of the folder that is given."""
    return agreement(subject)

"""The numbers of released code: every case of a method, replayed with the subject."""

from __future__ import annotations

from fedstill.conformance.findings import DoesNotApply, Verdict, check
from fedstill.conformance.replays import REPLAYS, Case, Disagrees, folder
from fedstill.conformance.subject import Subject


def agreement(subject: Subject) -> Verdict:
    """Replay the method's cases, those of the folder that was given or those that come with fedstill."""
    if subject.like is None:
        raise DoesNotApply("the cases are those of a built-in method: say which one this is like")
    place = subject.references or folder()
    own = [one for one in REPLAYS.values() if one.family == subject.like and (place / f"{one.case}.json").is_file()]
    if not own:
        raise DoesNotApply("there is no case of this method")
    agree, fail, skip = list[Case](), dict[str, str](), dict[str, str]()
    for one in own:
        case = Case.load(one.case, place)
        try:
            one.run(case, subject)
            agree.append(case)
        except DoesNotApply as reason:
            skip[case.name] = str(reason)
        except Disagrees as found:
            fail[case.name] = str(found)
        except Exception as error:  # whatever a foreign object raises is what was found
            fail[case.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if not agree and not fail:
        raise DoesNotApply(told(skip))
    nearest = max((case.apart for case in agree), default=0.0)
    parts = [told(fail), agreed(agree), f"not compared: {told(skip)}" if skip else ""]
    return Verdict(not fail, "; ".join(part for part in parts if part), nearest)


def agreed(cases: list[Case]) -> str:
    """Return which cases agree, and what comes nearest to failing."""
    if not cases:
        return ""
    nearest = max(cases, key=lambda case: case.apart)
    agree = "1 case agrees" if len(cases) == 1 else f"{len(cases)} cases agree"
    widest = f"{nearest.name} {nearest.widest}, {nearest.apart:.1g} of what is allowed" if nearest.apart else "0 apart"
    return f"{agree}: {', '.join(case.name for case in cases)}; widest: {widest}"


def told(cases: dict[str, str]) -> str:
    """Return what was found of cases, those of which the same was found together."""
    together: dict[str, list[str]] = {}
    for name, text in cases.items():
        together.setdefault(text, []).append(name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in together.items())


@check(without="It is what we think the paper says, with nobody else's numbers to compare with.")
def agrees_with_reference_cases(subject: Subject) -> Verdict:
    """The numbers are those of released code, the authors' own or a later paper's, in every case that was recorded."""
    return agreement(subject)


@check(refines=True, without="It is what we think the paper says, with nobody else's numbers to compare with.")
def refinement_agrees_with_reference_cases(subject: Subject) -> Verdict:
    """The numbers are those of released code, the authors' own or a later paper's, in every case that was recorded."""
    return agreement(subject)

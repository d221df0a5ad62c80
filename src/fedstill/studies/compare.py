"""Groups of runs side by side: figures over seeds, paired differences, costs of a target accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, get_args

from fedstill.build import clients_by_model
from fedstill.config import flat
from fedstill.data.fingerprint import differing
from fedstill.errors import InputError
from fedstill.evaluation import Record
from fedstill.experiment import accuracies
from fedstill.names import unknown
from fedstill.studies.costs import COSTS, Band, Cost, On, Target, curve, gain_at_equal_cost, measured, target
from fedstill.studies.results import Group, Results, RunData, in_words, read
from fedstill.studies.statistics import (
    Difference,
    Spread,
    mean_difference,
    paired_difference,
    spread,
    worst_decile,
)

Figures = dict[str, float]

LAST = 5
ENSEMBLES = ("uniform", "logits", "class_weighted")
BESIDE = "beside_ensembles"
QUANTITIES = {
    "final": "after the last round",
    "best": "best round",
    "last_mean": "mean of the last rounds",
    "mean": "mean of all evaluated rounds",
    "seconds": "seconds of training, fusing and refining",
    "megabytes": "MB in both directions",
    "seconds_per_round": "seconds per round",
    "megabytes_per_round": "MB per round",
    **{
        f"{kind}_{when}": f"{kind.replace('_', '-')} {what}, {when} measured round"
        for kind, what in (("fused", "model"), ("refined", "model"), *((kind, "ensemble") for kind in ENSEMBLES))
        for when in ("first", "last")
    },
    f"{BESIDE}_first": "fused model, on the samples of the ensembles, first measured round",
    f"{BESIDE}_last": "fused model, on the samples of the ensembles, last measured round",
    "worst_decile_own_samples": "worst tenth of clients, on their own held-out samples",
    "worst_decile_label_mix": "worst tenth of clients, test samples mixed like their labels",
    "worst_decile_own_models": "worst tenth of clients' own models, on all samples",
}
"""The figures of a run: name, as in the CSV file, -> what it is. Accuracies are parts of 1."""
ACCURACIES = ("final", "best", "last_mean", "mean")
"""Those of which differences are taken."""
EQUAL = {f"equal_{cost}": cost for cost in COSTS}
"""Differences in accuracy from a base that has spent as much: name -> cost."""
DIFFERENCES = (*ACCURACIES, *EQUAL)


@dataclass(frozen=True)
class Summary:
    """A group of runs in figures; only whole runs count.

    Parameters
    ----------
    label : str
        As shown.
    group : Group
        Its runs.
    base : str or None
        Label of the group that differences are taken from.
    quantities : dict
        Name of :data:`QUANTITIES` -> its spread over the seeds; what was not measured is not there.
    differences : dict
        Name of :data:`DIFFERENCES` -> paired difference from the base, on the same seeds.
    targets : tuple of Target
    per_class : tuple of Spread or None
        By class; empty where it was not measured, None for a class without samples.
    curve : tuple of Band
        By evaluated round, ascending: the final model's accuracy.
    remarks : tuple of str
        What a reader must know of it, such as seeds that are missing.
    """

    label: str
    group: Group
    base: str | None
    quantities: dict[str, Spread]
    differences: dict[str, Difference]
    targets: tuple[Target, ...]
    per_class: tuple[Spread | None, ...]
    curve: tuple[Band, ...]
    remarks: tuple[str, ...]

    @property
    def worst_class(self) -> int | None:
        """The class with the lowest mean accuracy, as the labels count; None where none is known."""
        known = {place: one.mean for place, one in enumerate(self.per_class) if one is not None}
        return min(known, key=lambda place: known[place]) if known else None

    @property
    def seeds(self) -> str:
        """How many seeds are whole: ``3``, or ``2 of 3``."""
        whole, planned = len(self.group.whole), len(self.group.seeds)
        return str(whole) if whole == planned else f"{whole} of {planned}"


@dataclass(frozen=True)
class ComparisonTable:
    """Groups that can be compared with each other.

    Parameters
    ----------
    title : str
        What all have of setting and grid point; empty for nothing.
    summaries : tuple of Summary
    remarks : tuple of str
        What a reader must know of all, such as data that differ.
    """

    title: str
    summaries: tuple[Summary, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A study, or loose runs, compared.

    Parameters
    ----------
    title : str
        The study's, or one made from the data set.
    on : str
        ``test`` or ``validation``.
    last : int
        Over how many evaluated rounds ``last_mean`` goes, or all if there are fewer.
    tables : tuple of ComparisonTable
    """

    title: str
    on: On
    last: int
    tables: tuple[ComparisonTable, ...]


def compare(
    paths: Path | str | Sequence[Path | str],
    *,
    last: int = LAST,
    targets: Sequence[float] = (),
    on: str = "test",
    baseline: str | None = None,
    anyway: bool = False,
) -> Comparison:
    """Compare runs, or the runs of a study.

    Parameters
    ----------
    paths : path or sequence of path
        Run directories, or one study: its results folder or its file.
    last : int
        Over how many of the last evaluated rounds ``last_mean`` goes; all if there are fewer.
    targets : sequence of float
        Accuracies, above 0 and at most 1.
    on : {"test", "validation"}
        The samples that accuracies are measured on.
    baseline : str, optional
        The variant or label that differences are taken from; by default each variant's ``base`` in the study, and
        the first of loose runs.
    anyway : bool
        Compare runs whose data differ too; the table says so.

    Raises
    ------
    InputError
        If a file is missing or damaged, no run is whole, runs cannot be compared, or a name is not there.
    """
    samples = _samples(on)
    _check_options(last, targets)
    found = read(_listed(paths))
    if not any(group.whole for group in found.groups):
        raise InputError(f"no run is finished; {_first_reason(found)}")
    wanted = _Wanted(samples, last, tuple(dict.fromkeys(targets)), baseline, anyway)
    blocks = joined(found.groups, samples) if found.is_study else [found.groups]
    labelled = [labels(block) for block in blocks]
    names = [name for _, block in labelled for label, group in block.items() for name in (group.variant, label)]
    if baseline is not None and baseline not in names:
        raise unknown("baseline", baseline, dict.fromkeys(names))
    tables = tuple(_table(title, block, wanted) for title, block in labelled)
    if baseline is not None and not any(summary.base for table in tables for summary in table.summaries):
        raise InputError(f"baseline {baseline!r}: no other group stands at its place; name one of: {', '.join(names)}")
    return Comparison(found.title or _title(found.groups), samples, last, tables)


@dataclass(frozen=True)
class _Wanted:
    on: On
    last: int
    targets: tuple[float, ...]
    baseline: str | None
    anyway: bool


def _check_options(last: object, targets: object) -> None:
    if not isinstance(last, int) or last < 1:
        raise InputError(f"last: {last!r} rounds; name a whole number, 1 or more")
    if not isinstance(targets, Iterable) or isinstance(targets, str):
        raise InputError(f"targets: {targets!r} is no list of accuracies; write [0.7] for 70 %")
    for goal in targets:
        if not isinstance(goal, Real) or not 0 < float(goal) <= 1:
            shown = f"{float(goal):g}" if isinstance(goal, Real) else repr(goal)
            raise InputError(f"targets: {shown} is no accuracy; name parts of 1, such as 0.7 for 70 %")


def _listed(paths: object) -> list[Path]:
    every = paths if isinstance(paths, Iterable) and not isinstance(paths, str) else (paths,)
    found = []
    for path in every:
        if not isinstance(path, Path | str):
            raise InputError(f"paths: {path!r} is no path; name run directories, or one study")
        found.append(Path(path))
    return found


def _samples(name: str) -> On:
    known: tuple[On, ...] = get_args(On)
    for on in known:
        if name == on:
            return on
    raise unknown("set of samples", name, known)


def _first_reason(found: Results) -> str:
    return next(f"{group.name}, seed {one.seed}: {one.reason}" for group in found.groups for one in group.seeds)


def _title(groups: Sequence[Group]) -> str:
    return ", ".join(dict.fromkeys(run.config.data.name for group in groups for run in group.runs))


# Which groups stand in one table


def joined(groups: Sequence[Group], on: On) -> list[list[Group]]:
    """Return a study's groups by table: settings and grid points are put together where their data are the same.

    That they are shows in a seed which both have: without one they stay apart.
    """
    points: dict[str, list[Group]] = {}
    for group in groups:
        points.setdefault(in_words(group.setting, group.point), []).append(group)
    tables: list[list[Group]] = []
    for block in points.values():
        same = (table for table in tables if _share_a_seed(table, block) and not problem([*table, *block], on))
        if (table := next(same, None)) is not None:
            table += block
        else:
            tables.append(list(block))
    return tables


def _share_a_seed(one: Sequence[Group], other: Sequence[Group]) -> bool:
    left, right = ({run.config.seed.data for group in part for run in group.runs} for part in (one, other))
    return bool(left & right)


def labels(groups: Sequence[Group]) -> tuple[str, dict[str, Group]]:
    """Return what all groups of a table have of setting and grid point, and label -> group."""
    first = groups[0]
    setting = first.setting if all(group.setting == first.setting for group in groups) else ""
    common = {
        key: value
        for key, value in first.point.items()
        if all(key in group.point and group.point[key] == value for group in groups)
    }
    found = {}
    for group in groups:
        rest = {key: value for key, value in group.point.items() if key not in common}
        place = in_words("" if setting else group.setting, rest)
        found[f"{place} / {group.name}" if place else group.name] = group
    return in_words(setting, common), found


def problem(groups: Sequence[Group], on: On) -> str | None:
    """Return why the runs of some groups cannot be compared, None where they can."""
    runs = [run for group in groups for run in group.runs]
    samples = ["data.name", "data.classes", "data.test_samples" if on == "test" else "data.server_validation"]
    by_seed: dict[int, RunData] = {}
    for run in runs:
        if differs := _differing(runs[0], run, samples):
            return f"{runs[0].path} and {run.path} cannot be compared: {differs}"
        same = by_seed.setdefault(run.config.seed.data, run)
        others = differing(same.data, run.data, ("train", on)) if same.data and run.data else ""
        found = [f"their {others} differ"] if others else []
        found += ["their clients hold different samples"] if same.partition != run.partition else []
        if found:
            keys = [key for key in flat(run.config) if key.startswith("data.") and (others or key != "data.root")]
            return (
                f"{same.path} and {run.path} cannot be compared: with data seed {run.config.seed.data} "
                f"{' and '.join(found)} ({_differing(same, run, keys) or 'the same keys, other fingerprints'})"
            )
    return None


def _differing(one: RunData, other: RunData, keys: Iterable[str]) -> str:
    """Return in words where two configurations differ; empty where they do not."""
    left, right = flat(one.config), flat(other.config)
    return ", ".join(f"{key} is {left[key]} and {right[key]}" for key in keys if left[key] != right[key])


# One table


def _table(title: str, named: Mapping[str, Group], wanted: _Wanted) -> ComparisonTable:
    groups = list(named.values())
    why_not = problem(groups, wanted.on)
    if why_not and not wanted.anyway:
        raise InputError(f"{why_not}; leave one out, or compare them --anyway")
    figures = {
        label: {seed: figures_of(run, wanted.on, wanted.last) for seed, run in group.whole.items()}
        for label, group in named.items()
    }
    summaries = tuple(_summary(label, named, figures, wanted) for label in named)
    remarks = [f"compared although it should not be: {why_not}"] if why_not else []
    return ComparisonTable(title, summaries, (*remarks, *_common_remarks(summaries)))


def _summary(
    label: str, named: Mapping[str, Group], figures: Mapping[str, Mapping[str, Figures]], wanted: _Wanted
) -> Summary:
    group, own = named[label], figures[label]
    base = base_of(label, named, wanted.baseline)
    theirs = figures[base] if base else {}
    differences = {name: paired_difference(_column(own, name), _column(theirs, name)) for name in ACCURACIES}
    if base:
        beside = named[base].whole
        pairs = [(run, beside[seed]) for seed, run in group.whole.items() if seed in beside]
        differences |= {name: _at_equal(pairs, wanted.on, cost) for name, cost in EQUAL.items()}
    spreads = {name: spread(_column(own, name).values()) for name in QUANTITIES}
    runs = list(group.whole.values())
    classes = [per_class(run, wanted.on) for run in runs]
    return Summary(
        label,
        group,
        base,
        {name: one for name, one in spreads.items() if one is not None},
        {name: one for name, one in differences.items() if one is not None},
        tuple(target(runs, accuracy, wanted.on) for accuracy in wanted.targets),
        tuple(spread(value for value in values if value is not None) for values in zip(*classes, strict=False)),
        tuple(curve(runs, wanted.on)),
        tuple(_own_remarks(group, differences["final"], wanted.on)),
    )


def _at_equal(pairs: Sequence[tuple[RunData, RunData]], on: On, cost: Cost) -> Difference | None:
    gains = (gain_at_equal_cost(run, base, on, cost) for run, base in pairs)
    return mean_difference(gain for gain in gains if gain is not None)


def _column(figures: Mapping[str, Figures], name: str) -> dict[str, float]:
    """Return seed -> one figure, for the seeds that have it."""
    return {seed: own[name] for seed, own in figures.items() if name in own}


def base_of(label: str, named: Mapping[str, Group], baseline: str | None) -> str | None:
    """Return the label of the group that a group's differences are taken from; None for none.

    Of several groups of that variant it is the one in the same setting at the same grid point, whose own keys the
    group has too.
    """
    group, name = named[label], baseline if baseline is not None else named[label].base
    if name is None or name in (label, group.variant):
        return None
    if name in named:
        return name
    near = {
        other: theirs
        for other, theirs in named.items()
        if theirs.variant == name
        and (theirs.setting, theirs.point) == (group.setting, group.point)
        and all(key in group.own and group.own[key] == value for key, value in theirs.own.items())
    }
    return max(near, key=lambda other: len(near[other].own), default=None)


def _own_remarks(group: Group, difference: Difference | None, on: On) -> Iterator[str]:
    whole, planned = len(group.whole), len(group.seeds)
    if any("per_client" in _last_scores(run)[on] for run in group.whole.values()):
        yield "every client has a model of its own; accuracies are means over clients"
    if whole < planned:
        reasons = "; ".join(f"seed {one.seed} {one.reason}" for one in group.seeds if one.state != "whole")
        yield f"{whole} of {planned} seeds ({reasons})"
    if difference is not None and difference.n == 1:
        yield "the difference is of one seed: no interval"
    elif difference is not None and difference.n < whole:
        yield f"the difference is over {difference.n} seeds that both have"
    for run in group.runs:
        yield from run.remarks


def _common_remarks(summaries: Sequence[Summary]) -> Iterator[str]:
    """Yield what makes figures of different groups hard to compare."""
    runs = [run for summary in summaries for run in summary.group.whole.values()]
    rounds = dict.fromkeys(run.config.train.rounds for run in runs)
    if len(rounds) > 1:
        yield f"the numbers of rounds differ: {', '.join(map(str, sorted(rounds)))}"
    elif len({tuple(band.round for band in summary.curve) for summary in summaries if summary.curve}) > 1:
        yield "they were not all evaluated in the same rounds"
    if len({str([run.environment.get(key) for key in ("platform", "cores", "device")]) for run in runs}) > 1:
        yield "seconds come from different machines"
    if any(run.config.fedmd.pretraining_cache for run in runs if run.config.method == "fedmd"):
        yield "seconds are without the pre-training that a run found in fedmd.pretraining_cache (its log.txt says)"
    if len({str([run.environment.get(key) for key in ("versions", "commit")]) for run in runs}) > 1:
        yield "made by different versions (environment.json of each run)"
    unknown_data = [run for run in runs if run.data is None]
    if unknown_data and len(runs) > 1:
        yield (
            f"{len(unknown_data)} of {len(runs)} runs have no fingerprint of their samples, so that only the shares "
            f"were compared ({unknown_data[0].path} is one)"
        )


# One run


def figures_of(run: RunData, on: On, last: int) -> Figures:
    """Return the figures of a whole run: name of :data:`QUANTITIES` -> value, for those that were measured.

    Raises
    ------
    InputError
        If nothing was measured on these samples.
    """
    found = list(measured(run, on).values())
    rounds = len(run.records)
    return {
        "final": found[-1],
        "best": max(found),
        "last_mean": statistics.fmean(found[-last:]),
        "mean": statistics.fmean(found),
        "seconds": run.seconds,
        "megabytes": run.megabytes,
        "seconds_per_round": run.seconds / rounds,
        "megabytes_per_round": run.megabytes / rounds,
        **_bounds(run, on),
        **_worst_clients(run, on),
    }


def _bounds(run: RunData, on: On) -> Figures:
    """Return what a refinement starts from, gives, and lies below, in the first and the last measured round."""
    found = {kind: list(accuracies(run.records, on, kind).values()) for kind in ("fused", "refined")}
    measured = ensembles_of(run, on).values()
    kinds = {**{kind: kind for kind in ENSEMBLES}, BESIDE: "fused"}
    found |= {name: [one[kind] for one in measured if kind in one] for name, kind in kinds.items()}
    ends = ((kind, values[0], values[-1]) for kind, values in found.items() if values)
    return {f"{kind}_{when}": value for kind, *both in ends for when, value in zip(("first", "last"), both)}


def ensembles_of(run: RunData, on: On) -> dict[int, dict[str, float]]:
    """Return by round what was measured of the cohort's ensembles; empty where that was on other samples."""
    if on != ("test" if "test" in run.config.eval.on else "validation"):
        return {}
    return {int(record["round"]): found for record in run.records if (found := record.get("ensembles"))}


def _last_scores(run: RunData) -> Record:
    """Return the scores of the final model."""
    measured = (record.get("refined", record.get("fused")) for record in reversed(run.records))
    return next(scores for scores in measured if scores)


def _worst_clients(run: RunData, on: On) -> Figures:
    """Return the accuracy of the worst tenth of the clients, for each way in which clients were measured."""
    scores = _last_scores(run)
    lists = {
        "worst_decile_own_samples": _by_client(run, scores, lambda one: one.get("clients", {}).get("per_client")),
        "worst_decile_own_models": scores[on].get("per_client"),
    }
    if on == "test":
        lists["worst_decile_label_mix"] = _by_client(run, scores, lambda one: one.get("by_client_label_mix"))
    found = {
        name: values["worst_decile"] if isinstance(values, dict) else worst_decile(values)
        for name, values in lists.items()
        if values
    }
    return {name: value for name, value in found.items() if value is not None}


def _by_client(run: RunData, scores: Record, of: Callable[[Record], Any]) -> Any:
    """Return a value for each client, or the summary of many; with several architectures by each client's own model."""
    if "by_model" not in scores:
        return of(scores)
    by_model = [of(one) for one in scores["by_model"].values()]
    if not all(isinstance(values, list) for values in by_model):
        return None  # of many clients only each model's summary over everybody is recorded
    members = clients_by_model(run.config, run.config.data.clients)
    return [values[client] for values, own in zip(by_model, members, strict=True) for client in own]


def per_class(run: RunData, on: On) -> list[float | None]:
    """Return the final model's accuracy by class, None for a class without samples; empty where none was measured.

    Of several architectures the mean, weighted by their clients.
    """
    scores = _last_scores(run)
    if "by_model" not in scores:
        found: list[float | None] = scores[on].get("per_class", [])
        return found
    weights = [len(own) for own in clients_by_model(run.config, run.config.data.clients)]
    columns = zip(*(one[on]["per_class"] for one in scores["by_model"].values()), strict=True)
    return [None if None in column else statistics.fmean(column, weights) for column in columns]

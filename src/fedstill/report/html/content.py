"""What a report shows: a comparison, and what only the runs themselves tell, over their seeds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedstill.build import clients_by_model
from fedstill.data.dataset import IntArray
from fedstill.data.sources import source_of
from fedstill.errors import InputError
from fedstill.evaluation import Record
from fedstill.experiment import accuracies
from fedstill.report.html.style import Palette
from fedstill.studies.compare import (
    ENSEMBLES,
    LAST,
    Comparison,
    ComparisonTable,
    Summary,
    compare,
    ensembles_of,
    figures_of,
)
from fedstill.studies.costs import On
from fedstill.studies.plan import short_names, slug
from fedstill.studies.results import Group, Keys, RunData, in_words
from fedstill.studies.statistics import Spread, spread
from fedstill.studies.tables import Sheet, sheets

KEY = re.compile(r"\b[a-z]\w*(?:\.\w+)+(?==)")
"""A dotted key before its value, as labels have it."""
Key = TypeVar("Key")
Points = dict[int, Spread]
"""Round -> a figure over the seeds."""


@dataclass(frozen=True)
class Gain:
    """What a refinement gave, and what its teachers together would have allowed, by round.

    Parameters
    ----------
    given : dict
        Refined minus fused accuracy.
    room : dict
        The best of the measured ensembles minus the fused model's accuracy, where ensembles were measured.
    alike : bool
        Whether the two of ``room`` were measured on the same samples. Older runs have the ensembles on a part alone.
    """

    given: Points
    room: Points
    alike: bool = True


@dataclass(frozen=True)
class Clients:
    """Who holds what: samples of each class (clients, classes), for one data seed."""

    counts: IntArray
    class_names: tuple[str, ...]
    seed: int
    protocol: str


@dataclass(frozen=True)
class Block:
    """One table of a comparison.

    Parameters
    ----------
    title : str
        Empty where there is one table.
    name : str
        Fit for a file; empty where there is one table.
    table : ComparisonTable
    sheet : Sheet
        The same in words.
    """

    title: str
    name: str
    table: ComparisonTable
    sheet: Sheet

    @property
    def shown(self) -> list[Summary]:
        """The groups that have figures."""
        return [summary for summary in self.table.summaries if summary.quantities]

    @property
    def runs(self) -> list[RunData]:
        """Every whole run."""
        return [run for summary in self.table.summaries for run in summary.group.whole.values()]


@dataclass(frozen=True)
class Content:
    """All that a report shows.

    Parameters
    ----------
    title : str
    comparison : Comparison
    blocks : tuple of Block
    palette : Palette
        By :meth:`key`.
    """

    title: str
    comparison: Comparison
    blocks: tuple[Block, ...]
    palette: Palette

    @property
    def runs(self) -> list[RunData]:
        """Every whole run."""
        return [run for block in self.blocks for run in block.runs]

    def key(self, summary: Summary) -> str:
        """Return what a group's colour goes by: its name, or its label where a table has the name twice."""
        return _key(summary, [block.table for block in self.blocks])

    def colour(self, summary: Summary) -> str:
        """Return a group's colour."""
        return self.palette[self.key(summary)]


def gathered(paths: Sequence[Path], *, title: str | None, on: str, baseline: str | None, anyway: bool) -> Content:
    """Compare runs or a study and return what a report shows of them; arguments and errors as ``compare``."""
    found = brief(compare(paths, on=on, baseline=baseline, anyway=anyway))
    several = len(found.tables) > 1
    names = _names([table.title for table in found.tables]) if several else [""]
    pairs = zip(found.tables, sheets(found), names, strict=True)
    blocks = tuple(Block(table.title if several else "", name, table, sheet) for table, sheet, name in pairs)
    families = {_key(one, found.tables): _family(one, table) for table in found.tables for one in table.summaries}
    return Content(title or found.title, found, blocks, Palette.of(list(families.items())))


def brief(found: Comparison) -> Comparison:
    """Return a comparison in whose labels keys stand by their last part, where it says enough: ``beta=0.1``."""
    words = [text for table in found.tables for one in table.summaries for text in (one.label, one.group.name)]
    words += [table.title for table in found.tables]
    keys = dict.fromkeys(key for text in words for key in KEY.findall(text))
    short = short_names(dict.fromkeys(keys))

    def said(text: str) -> str:
        return KEY.sub(lambda key: short[key[0]], text)

    def of(table: ComparisonTable) -> ComparisonTable:
        groups = [one.group for one in table.summaries]
        loose = all(map(is_loose, groups))
        names = [said(name) for name in (few_keys(groups) if loose else [group.name for group in groups])]
        pairs = list(zip(table.summaries, names, strict=True))
        labels = {one.label: name if loose else said(one.label) for one, name in pairs}
        summaries = (
            replace(one, label=labels[one.label], base=labels.get(one.base or ""), group=replace(one.group, name=name))
            for one, name in pairs
        )
        return replace(table, title=said(table.title), summaries=tuple(summaries))

    return replace(found, tables=tuple(map(of, found.tables)))


def is_loose(group: Group) -> bool:
    """Say whether a group is of run directories that are named by their keys, and not a study's variant."""
    return "method" in group.own and group.name == group.variant


def few_keys(groups: Sequence[Group]) -> list[str]:
    """Return names of loose groups: the method, and as few keys as tell groups of one method apart."""
    names = []
    for group in groups:
        alike = [other.own for other in groups if other.own["method"] == group.own["method"]]
        chosen: list[str] = []
        while len({_values(own, chosen) for own in alike}) < len(alike):
            known = dict.fromkeys(key for own in alike for key in own if key not in chosen)
            if not known:
                break
            chosen.append(max(known, key=lambda key: len({_values(own, [*chosen, key]) for own in alike})))
        names.append(in_words(str(group.own["method"]), {key: group.own[key] for key in chosen if key in group.own}))
    return names if len(set(names)) == len(names) else [group.name for group in groups]


def _values(own: Keys, keys: Sequence[str]) -> str:
    return str([own.get(key) for key in keys])


def _names(titles: Sequence[str]) -> list[str]:
    """Return a name for each table, fit for a file and unlike the others."""
    slugs = [slug(title) for title in titles]
    often = Counter(slugs)
    return [name if name and often[name] == 1 else str(place) for place, name in enumerate(slugs, 1)]


def _key(summary: Summary, tables: Iterable[ComparisonTable]) -> str:
    name = summary.group.name
    twice = any(sum(one.group.name == name for one in table.summaries) > 1 for table in tables)
    return summary.label if twice else name


def _family(summary: Summary, table: ComparisonTable) -> str:
    """Return the name of the base that a group's own begins with, or its own."""
    name = summary.group.name
    bases = [one.group.name for one in table.summaries if one.label == summary.base]
    return bases[0] if bases and name.startswith((f"{bases[0]}+", f"{bases[0]}, ")) else name


# What the comparison does not hold


def gain(summary: Summary, on: On) -> Gain | None:
    """Return what the refinement of a group gave; None where nothing refines."""
    given: dict[int, list[float]] = {}
    room: dict[int, list[float]] = {}
    alike = True
    for run in summary.group.whole.values():
        fused, refined = (accuracies(run.records, on, model) for model in ("fused", "refined"))
        ensembles = ensembles_of(run, on)
        for round in refined.keys() & fused.keys():
            given.setdefault(round, []).append(refined[round] - fused[round])
            if best := [ensembles[round][kind] for kind in ENSEMBLES if kind in ensembles.get(round, {})]:
                room.setdefault(round, []).append(max(best) - ensembles[round].get("fused", fused[round]))
                alike &= "fused" in ensembles[round]
    return Gain(_over_seeds(given), _over_seeds(room), alike) if given else None


def over_base(summary: Summary, table: ComparisonTable, on: On) -> Points:
    """Return by round the accuracy minus the base's on the same seeds; empty without a base."""
    bases = [one.group.whole for one in table.summaries if one.label == summary.base]
    found: dict[int, list[float]] = {}
    for seed, run in summary.group.whole.items():
        if bases and seed in bases[0]:
            ours, theirs = (accuracies(one.records, on) for one in (run, bases[0][seed]))
            for round in ours.keys() & theirs.keys():
                found.setdefault(round, []).append(ours[round] - theirs[round])
    return _over_seeds(found)


def losses(summary: Summary) -> dict[tuple[str, str], Points]:
    """Return what the refinements of a group measured on their way: (refinement, metric) -> by round.

    Of several architectures the mean.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for run in summary.group.whole.values():
        for record in run.records:
            for key, values in _measured(record.get("refinement") or {}).items():
                found.setdefault(key, {}).setdefault(int(record["round"]), []).append(float(np.mean(values)))
    return {key: _over_seeds(rounds) for key, rounds in found.items()}


def _measured(refinement: Record) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for one in refinement["by_model"].values() if "by_model" in refinement else [refinement]:
        for name, metrics in one.items():
            for metric, value in metrics.items():
                if isinstance(value, int | float):
                    found.setdefault((name, metric), []).append(value)
    return found


def own_models(summary: Summary, on: On) -> list[Points]:
    """Return by client the accuracy of its own model by round; empty where there are none, or too many for a list."""
    found: list[dict[int, list[float]]] = []
    for run in summary.group.whole.values():
        for record in run.records:
            values = (record.get("fused") or {}).get(on, {}).get("per_client")
            for client, value in enumerate(values if isinstance(values, list) else []):
                found += [{} for _ in range(client + 1 - len(found))]
                found[client].setdefault(int(record["round"]), []).append(value)
    return [_over_seeds(rounds) for rounds in found]


def client_names(run: RunData, count: int) -> list[str]:
    """Return a name for each client, with its model where models differ."""
    models = run.config.model
    if len(models) == 1:
        return [f"client {client}" for client in range(count)]
    members = clients_by_model(run.config, count)
    return [
        f"{client}, {model.name}" for client in range(count) for model, own in zip(models, members) if client in own
    ]


def phases(summary: Summary) -> dict[str, Spread]:
    """Return phase -> seconds of a whole run, over the seeds."""
    totals = [_seconds(run.records) for run in summary.group.whole.values()]
    names = dict.fromkeys(name for total in totals for name in total)
    return dict(_spreads({name: [total.get(name, 0.0) for total in totals] for name in names}))


def _seconds(records: Iterable[Record]) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record["seconds"])
    return total


def finals(summary: Summary, on: On) -> list[float]:
    """Return the final accuracy of each seed."""
    return [figures_of(run, on, LAST)["final"] for run in summary.group.whole.values()]


def on_own_samples(summary: Summary) -> float | None:
    """Return the final accuracy on all clients' own held-out samples, where it was measured."""
    found = [list(accuracies(run.records, "clients").values())[-1:] for run in summary.group.whole.values()]
    one = spread(value for values in found for value in values)
    return one.mean if one is not None else None


def _over_seeds(rounds: Mapping[int, list[float]]) -> Points:
    return dict(_spreads({round: rounds[round] for round in sorted(rounds)}))


def _spreads(values: Mapping[Key, Sequence[float]]) -> Iterator[tuple[Key, Spread]]:
    for key, own in values.items():
        if (one := spread(own)) is not None:
            yield key, one


# Clients and classes


def clients(block: Block) -> Clients | None:
    """Return who holds what in the first run of a table; None where its file does not say."""
    for run in block.runs:
        counts = class_counts(run)
        if counts is not None:
            names = class_names(run, counts.shape[1])
            return Clients(counts, names, run.config.seed.data, run.config.data.partition)
    return None


def class_counts(run: RunData) -> IntArray | None:
    """Return the samples of each class at each client, (clients, classes)."""
    try:
        table: dict[str, Any] = json.loads((run.path / "partition.json").read_text())
        counts = np.asarray(table["class_counts"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if counts.ndim == 2 and counts.size and counts.sum() else None


def class_names(run: RunData, classes: int) -> tuple[str, ...]:
    """Return a name for each of a model's outputs; numbers where public classes stand before the data's own."""
    data = run.config.data
    try:
        known = source_of(data.name).class_names
    except InputError:
        known = ()
    own = known if data.classes is None else tuple(known[label] for label in data.classes if label < len(known))
    return own if len(own) == classes else tuple(map(str, range(classes)))

"""What was run and what came out, in words; configuration and environment as tables."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedstill.config import flat
from fedstill.data import list_protocols
from fedstill.methods.registry import list_methods
from fedstill.report.html.content import Block, Content, class_counts, gain
from fedstill.studies.compare import Summary
from fedstill.studies.costs import On
from fedstill.studies.results import RunData
from fedstill.studies.tables import MANY, named, points

Facts = dict[str, str]
UNSET = "–"
NO_RESULT = ("seed.", "schema_version", "tracking.", "checkpoint.")
"""Keys that the configuration's tables leave out: seeds stand above, the others say nothing of results."""


def what_was_run(content: Content) -> Facts:
    """Return what was run: heading -> words."""
    runs = content.runs
    names = list(dict.fromkeys(summary.group.name for block in content.blocks for summary in block.table.summaries))
    facts = {
        "Methods" if len(names) > 1 else "Method": "; ".join(names),
        "Data": _data(runs),
        "Clients": _clients(runs),
        "Model": _either(map(_model, runs)),
        "Training": _training(runs),
        "Seeds": _seeds(content),
    }
    if settings := [block.title for block in content.blocks if block.title]:
        facts["Settings"] = "; ".join(settings)
    return facts


def missing(content: Content) -> list[str]:
    """Return what is not whole, with the reason; many runs of a seed with the same reason are counted."""
    by_reason: dict[str, list[str]] = {}
    for block in content.blocks:
        for summary in block.table.summaries:
            for one in summary.group.seeds:
                if one.state != "whole":
                    by_reason.setdefault(f"seed {one.seed} {one.reason}", []).append(f"{summary.label}{_in(block)}")
    lines = []
    for reason, labels in by_reason.items():
        lines += (
            [f"{label}: {reason}" for label in labels] if len(labels) <= MANY else [f"{len(labels)} runs: {reason}"]
        )
    return lines


def _in(block: Block) -> str:
    return f" ({block.title})" if block.title else ""


def _either(found: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(found))


def _data(runs: Sequence[RunData]) -> str:
    data, public = [run.config.data for run in runs], [run.config.public.name for run in runs]
    words = _either(one.name for one in data)
    if chosen := [one.classes for one in data if one.classes]:
        words += f", its classes {_either(', '.join(map(str, classes)) for classes in chosen)}"
    if held := [one.server_validation for one in data if one.server_validation]:
        words += f", {_either(f'{count:,}' for count in held)} samples for the server's validation"
    if named := [name for name in public if name]:
        where = " where a method uses them" if len(named) < len(public) else ""
        words += f", public samples of {_either(named)}{where}"
    return words


def _clients(runs: Sequence[RunData]) -> str:
    data = [run.config.data for run in runs]
    words = f"{_either(f'{one.clients:,}' for one in data)}, shared by {_either(one.partition for one in data)}"
    protocols = dict(list_protocols())
    betas = [one.beta for one in data if re.search(r"dirichlet|Dir\(", protocols.get(one.partition, ""))]
    if betas:
        words += f", beta {_either(f'{beta:g}' for beta in betas)}"
    counts = [found.sum(axis=1) for run in runs if (found := class_counts(run)) is not None]
    if counts:
        each = _range([int(one.min()) for one in counts] + [int(one.max()) for one in counts])
        words += f"; each holds {each} of {_range([int(one.sum()) for one in counts])} training samples"
    return words


def _range(found: Sequence[int]) -> str:
    low, high = min(found), max(found)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _model(run: RunData) -> str:
    names = [f"{model.name}{f' (width {model.width})' if model.width else ''}" for model in run.config.model]
    often = Counter(names)
    return ", ".join(name if often[name] == 1 else f"{often[name]} x {name}" for name in dict.fromkeys(names))


def _training(runs: Sequence[RunData]) -> str:
    train, local = [run.config.train for run in runs], [run.config.local for run in runs]
    rounds = _either(f"{one.rounds:,}" for one in train)
    part = _either("all" if one.participation == 1 else f"{100 * one.participation:g} % of the" for one in train)
    long = _either(f"{one.steps:,} local steps" if one.steps else f"{one.epochs:,} local epochs" for one in local)
    batches, rates = _either(f"{one.batch_size:,}" for one in local), _either(f"{one.lr:g}" for one in local)
    plural = "" if rounds == "1" else "s"
    return f"{rounds} round{plural}, {part} clients in each; {long}, batches of {batches}, learning rate {rates}"


def _seeds(content: Content) -> str:
    groups = [summary.group for block in content.blocks for summary in block.table.summaries]
    seeds = ", ".join(dict.fromkeys(one.seed for group in groups for one in group.seeds))
    whole, planned = sum(len(group.whole) for group in groups), sum(len(group.seeds) for group in groups)
    runs = f"{planned:,} {'run' if planned == 1 else 'runs'}"
    return f"{seeds}; {runs}" if whole == planned else f"{seeds}; {whole:,} of {runs} are whole"


# What came out


def verdict(block: Block, on: On) -> list[str]:
    """Return what a table says, in sentences made of its own numbers."""
    said = []
    ranked = [one for one in block.shown if one.quantities["final"].n == len(one.group.seeds)]
    if len(ranked) > 1:
        best = max(one.quantities["final"].mean for one in ranked)
        names = [one.label for one in ranked if one.quantities["final"].mean == best]
        verb = "is highest" if len(names) == 1 else "are highest"
        said.append(f"After the last round, {' and '.join(names)} {verb}, with {100 * best:.1f} %.")
    for when, quantity in (("After the last round", "final"), ("In the mean of all rounds", "mean")):
        said += _differences(block.shown, when, quantity)
    said += _ceiling(block.shown, on)
    return said


def _differences(summaries: Sequence[Summary], when: str, quantity: str) -> list[str]:
    """Return which paired differences have an interval above, below or around 0."""
    above, below, unclear = list[str](), list[str](), list[str]()
    bases = list(dict.fromkeys(summary.base for summary in summaries if summary.differences.get(quantity)))
    for summary in summaries:
        one = summary.differences.get(quantity)
        if one is None or one.low is None or one.high is None:
            continue
        base = f" from {summary.base}" if len(bases) > 1 else ""
        if one.low <= 0 <= one.high:
            unclear.append(summary.label)
        else:
            (above if one.low > 0 else below).append(f"{summary.label} {points(one)}{base}")
    total = len(above) + len(below) + len(unclear)
    sides = (("Above 0", above), ("Below 0", below), ("Around 0", unclear))
    told = " ".join(f"{side}: {named(names, total)}." for side, names in sides if names)
    against = bases[0] if len(bases) == 1 else "the base"
    return [f"{when}, 95 % interval of the difference from {against}. {told}"] if told else []


def _ceiling(summaries: Sequence[Summary], on: On) -> list[str]:
    """Return how far refined models stay from the best of their ensembles, at the end."""
    rooms = {}
    for summary in summaries:
        if (found := gain(summary, on)) is not None and found.room:
            last = max(found.room)
            rooms[summary.label] = 100 * (found.room[last].mean - found.given[last].mean)
    if not rooms:
        return []
    where = "At the last measured round, beside the best ensemble of its cohort,"
    if len(rooms) > MANY:
        between = dict.fromkeys(_beside(room) for room in (min(rooms.values()), max(rooms.values())))
        return [f"{where} a refined model is {' to '.join(between)}."]
    return [f"{where} {'; '.join(f'{label} is {_beside(room)}' for label, room in rooms.items())}."]


def _beside(room: float) -> str:
    return f"{abs(room):.1f} points {'below' if room >= 0 else 'above'}"


# Configuration and environment


def shared_keys(runs: Sequence[RunData]) -> dict[str, Facts]:
    """Return the keys in which all runs that heed them agree, by table: table -> key -> value."""
    tables: dict[str, Facts] = {}
    for key, values in _values(runs).items():
        if len(values) == 1:
            table, _, leaf = key.rpartition(".")
            tables.setdefault(table, {})[leaf] = values[0]
    return tables


def differing_keys(content: Content) -> tuple[list[str], list[list[str]]]:
    """Return the keys in which groups differ, and a row for each group: its label, then its values."""
    telling = [key for key, values in _values(content.runs).items() if len(values) > 1]
    rows = []
    for block in content.blocks:
        for summary in block.shown:
            own = _values(list(summary.group.whole.values()))
            rows.append([f"{summary.label}{_in(block)}", *("; ".join(own.get(key, [])) for key in telling)])
    return telling, rows


def _values(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Return each key's different values in the runs that heed it."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in _shown(run).items():
            found.setdefault(key, {})[said(value)] = None
    return {key: list(values) for key, values in found.items() if list(values) != [UNSET]}


def _shown(run: RunData) -> dict[str, Any]:
    """Return the keys that a run heeds: not those of methods that it does not use."""
    known = {name.removeprefix("+") for name in list_methods()}
    used = {part.strip() for part in run.config.method.split("+")}
    unused = known - used
    keys = flat(run.config)
    return {
        key: value for key, value in keys.items() if not key.startswith(NO_RESULT) and key.split(".")[0] not in unused
    }


def said(value: object) -> str:
    """Return a value as TOML has it; what is not set has a dash."""
    if value is None:
        return UNSET
    return value if isinstance(value, str) else json.dumps(value)


def environments(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """Return where runs were made: what, and its value; of several values each with its number of runs."""
    found: dict[str, Counter[str]] = {}
    for run in runs:
        for key, value in _leaves(run.environment):
            found.setdefault(key, Counter())[said(value)] += 1
    return [(key, _counted(values)) for key, values in found.items()]


def _counted(values: Counter[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({count} {'run' if count == 1 else 'runs'})" for value, count in values.items())


def _leaves(table: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value

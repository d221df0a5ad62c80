"""The tables of docs/worth-its-time.md from the runs of worth-its-time.toml.

python studies/worth_its_time.py runs/worth-its-time
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator

from fedstill.errors import InputError
from fedstill.markdown import grid
from fedstill.studies.compare import Summary, compare
from fedstill.studies.statistics import Difference
from fedstill.studies.tables import per_cent, points

BASES = ("FedAvg", "FedProx", "SCAFFOLD", "FedDyn", "MOON")
ADDED = {
    "head": ", class-weighted head",
    "FedFTG": "+FedFTG",
    "FedDF, MNIST": "+FedDF, MNIST",
    "FedDF, data-free": "+FedDF, data-free",
}
Rows = dict[str, Summary]


def by_setting(study: str) -> dict[str, Rows]:
    """Return setting -> label -> figures."""
    found: dict[str, Rows] = {}
    for one in (summary for table in compare(study).tables for summary in table.summaries if summary.quantities):
        found.setdefault(one.group.setting, {})[one.group.name] = one
    return found


def first_round(one: Summary) -> dict[str, float]:
    """Return the accuracy after the first round by seed."""
    return {
        seed: (record.get("refined") or record["fused"])["test"]["accuracy"]
        for seed, run in one.group.whole.items()
        for record in run.records[:1]
    }


def gains(rows: Rows, added: str, of: str) -> list[float]:
    """Return what an addition gives to each base that has it, in points: ``first``, or a paired difference."""
    found = []
    for base in BASES:
        if (one := rows.get(base + added)) is None:
            continue
        if of == "first":
            plain, more = first_round(rows[base]), first_round(one)
            found.append(100 * statistics.fmean(more[seed] - plain[seed] for seed in more if seed in plain))
        else:
            found.append(100 * one.differences[of].mean)
    return found


def time_over_training(rows: Rows, added: str) -> list[float]:
    """Return seconds of the server's step over those of the clients' training, by round, without MOON's."""
    runs = [
        run
        for base in BASES
        if base != "MOON" and base + added in rows
        for run in rows[base + added].group.whole.values()
    ]
    seconds = [record["seconds"] for run in runs for record in run.records]
    return [one.get("refine", 0.0) / one["train"] for one in seconds]


def at_equal_rounds(found: dict[str, Rows]) -> Iterator[str]:
    """Yield a table for each addition: gains as means over the bases."""
    for name, added in ADDED.items():
        rows = []
        for setting, own in found.items():
            if any(base + added in own for base in BASES):
                means = [f"{statistics.fmean(gains(own, added, of)):+.1f}" for of in ("first", "mean", "final")]
                near = gains(own, added, "final")
                rows.append(
                    [
                        setting, *means, f"{sum(abs(gain) <= 1 for gain in near)} of {len(near)}",
                        f"{statistics.median(time_over_training(own, added)):.1f}",
                    ]
                )  # fmt: skip
        header = [name, "round 1", "mean over rounds", "last round", "within a point at the end", "time over training"]
        if rows:
            yield grid(header, rows) + "\n"


def at_equal_seconds(found: dict[str, Rows]) -> Iterator[str]:
    """Yield a table for each addition: its accuracy less its base's after as many seconds."""
    for name, added in ADDED.items():
        rows = [
            [setting, *(points(_equal(own, base + added)) for base in BASES)]
            for setting, own in found.items()
            if any(base + added in own for base in BASES)
        ]
        if rows:
            yield grid([name, *BASES], rows) + "\n"


def _equal(rows: Rows, name: str) -> Difference | None:
    return rows[name].differences.get("equal_seconds") if name in rows else None


def finals(found: dict[str, Rows]) -> Iterator[str]:
    """Yield a table for each setting, as Table 3 of the paper: bases against what is added to them."""
    for setting, own in found.items():
        columns = {
            name: added
            for name, added in {"plain": "", **ADDED}.items()
            if any(base + added in own for base in BASES)
        }  # fmt: skip
        rows = [[base, *(_final(own.get(base + added)) for added in columns.values())] for base in BASES if base in own]
        yield f"### {setting}\n\n" + grid(["", *columns], rows) + "\n"


def _final(one: Summary | None) -> str:
    return per_cent(one.quantities["final"]) if one else ""


def ablations(rows: Rows) -> str:
    """Return FedFTG's parts: the last round, the mean over the rounds, and the differences from SCAFFOLD alone."""
    return grid(
        ["", "last round", "mean over rounds", "from SCAFFOLD, last round", "mean"],
        [
            [
                name, per_cent(one.quantities["final"]), per_cent(one.quantities["mean"]),
                points(one.differences.get("final")), points(one.differences.get("mean")),
            ]
            for name, one in rows.items()
            if name.startswith("paper")
        ],
    ) + "\n"  # fmt: skip


def main(study: str) -> None:
    """Print all tables."""
    found = by_setting(study)
    print("## At equal rounds\n", *at_equal_rounds(found), "## At equal time\n", *at_equal_seconds(found), sep="\n")
    print("## After the last round\n", *finals(found), sep="\n")
    print("## The parts of it\n", ablations(next(iter(found.values()))), sep="\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2] or ["runs/worth-its-time"])
    except InputError as error:
        sys.exit(f"error {error}")

"""The metrics of a run as they were written, one line per round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedstill.errors import InputError
from fedstill.evaluation import Record
from fedstill.runs.checkpoint import manifests, round_of

METRICS = "metrics.jsonl"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Accuracy(_Part):
    accuracy: float


class _Scores(_Part):
    test: _Accuracy | None = None
    validation: _Accuracy | None = None
    clients: _Accuracy | None = None


class _Line(_Part):
    """What a line must hold."""

    round: int
    bytes: dict[str, dict[str, int]]
    seconds: dict[str, float]
    fused: _Scores | None = None
    refined: _Scores | None = None
    ensembles: dict[str, float] | None = None


def read_metrics(path: Path) -> list[Record]:
    """Return the rounds of a run, from the first on; a last line that was cut short is left out.

    Raises
    ------
    InputError
        If the file cannot be read, a line before the last one is damaged, a line is no round's, or a round is missing
        before another.
    """
    return whole_lines(path)[0]


def whole_lines(path: Path) -> tuple[list[Record], bool]:
    """Return what :func:`read_metrics` does, and whether a last line was cut short."""
    file = path / METRICS
    try:
        lines = file.read_text().splitlines() if file.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text ({error})") from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{file}:{number}: damaged line") from error
            return records, True
        _check(f"{file}:{number}", number, record)
        records.append(record)
    return records, False


def _check(where: str, number: int, record: object) -> None:
    """Refuse a line that is not the metrics of round ``number``."""
    go_on = "remove this line and those after it, and go on with 'fedstill resume'"
    try:
        found = _Line.model_validate(record)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "line"
        raise InputError(f"{where}: not a round's metrics ({key}: {problem['msg']}); {go_on}") from error
    if found.round != number:
        raise InputError(f"{where}: round {found.round} stands where round {number} belongs; {go_on}")


def metrics_up_to(path: Path, round: int) -> list[Record]:
    """Return the rounds of a run of which a checkpoint knows ``round``.

    Raises
    ------
    InputError
        If the metrics are damaged, or have fewer rounds: a checkpoint is written after the lines that it counts on.
    """
    records = read_metrics(path)
    there = len(records)
    if there >= round:
        return records
    missing = f"round {round} is" if there + 1 == round else f"rounds {there + 1} to {round} are"
    later = [file for file in manifests(path) if round_of(file) > there]
    if older := [file for file in manifests(path) if round_of(file) <= there]:
        back = f"to go on from {older[-1].stem} instead, remove {' and '.join(map(str, later))}"
    else:
        back = f"to begin again at round 1, remove {path / 'checkpoints'} and give 'fedstill resume {path}'"
    raise InputError(
        f"{path / METRICS}: {missing} missing, though there is a checkpoint of round {round}; put the file back, "
        f"or {back}"
    )


def flatten(record: Mapping[str, object], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of a record by slash-separated names; lists are left out."""
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "round":
            found.append((f"{prefix}{name}", float(value)))
    return found

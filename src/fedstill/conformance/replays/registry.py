"""The reference cases, and the table of their replays.

A replay is a function entered for one or several cases with ``@replays("scaffold", "local_scaffold", ...)``. It gets
the :class:`Case` and the subject, and raises :class:`Disagrees` where the subject's numbers leave the tolerance that
the case's own JSON states, or ``DoesNotApply``. Hyper-parameters are read from that JSON, never repeated here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedstill.conformance.subject import Subject

OWN = Path(__file__).resolve().parents[1] / "cases"
"""The cases that come with fedstill."""


def folder() -> Path:
    """Return the folder of the reference cases: ``FEDSTILL_GOLDEN``, or the one that comes with fedstill."""
    return Path(os.environ.get("FEDSTILL_GOLDEN") or OWN)


class Disagrees(Exception):
    """Raised where a number is not the recorded one; the text says which and by how much."""


@dataclass
class Case:
    """One reference case.

    Parameters
    ----------
    name : str
    meta : dict
        Its JSON.
    arrays : dict
        Its npz.
    apart : float
        How near to failing the comparisons so far came, as a part of what is allowed.
    widest : str
        The key that came so near.
    compared : set of str
        The keys that were compared.
    """

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]
    apart: float = 0.0
    widest: str = ""
    compared: set[str] = field(default_factory=set)

    @staticmethod
    def load(name: str, folder: Path) -> Case:
        """Read a case."""
        path = folder / f"{name}.json"
        with np.load(path.with_suffix(".npz")) as stored:
            arrays = {key: stored[key] for key in stored.files}
        return Case(name, json.loads(path.read_text()), arrays)

    @property
    def hyper(self) -> dict[str, Any]:
        """The numbers that it was recorded with."""
        found: dict[str, Any] = self.meta["hyper"]
        return found

    def array(self, key: str) -> np.ndarray[Any, Any]:
        """Return an array as it is."""
        return self.arrays[key]

    def tensor(self, key: str) -> Tensor:
        """Return an array as a tensor: floats in float64, integers in int64."""
        value = torch.from_numpy(np.array(self.arrays[key]))
        return value.double() if value.is_floating_point() else value.long()

    def tolerance(self, key: str) -> tuple[float, float]:
        """Return (rtol, atol) of ``key`` in float64."""
        table = self.meta["tolerance_float64"]
        chosen = table.get("by_key", {}).get(key, table["default"])
        return float(chosen["rtol"]), float(chosen["atol"])

    def agrees(self, key: str, value: Tensor | np.ndarray[Any, Any] | float, at: Any = ...) -> None:
        """Compare with the recorded ``key``, indexed by ``at``, within its tolerance."""
        self.equals(key, value, self.arrays[key][at])

    def equals(
        self, key: str, value: Tensor | np.ndarray[Any, Any] | float, recorded: Tensor | np.ndarray[Any, Any]
    ) -> None:
        """Compare with what was worked out of the recorded ``key``, within its tolerance.

        Raises
        ------
        Disagrees
            Where they are further apart; NaN is far from everything.
        """
        self.compared.add(key)
        got, wanted = as_numbers(value), as_numbers(recorded)
        if got.shape != wanted.shape:
            raise Disagrees(f"{key} has the shape {got.shape}, recorded is {wanted.shape}")
        rtol, atol = self.tolerance(key)
        allowed, apart = atol + rtol * np.abs(wanted), np.abs(got - wanted)
        part = np.nan_to_num(apart / allowed, nan=math.inf)
        worst = int(part.argmax()) if part.size else None
        if worst is None or part.flat[worst] <= self.apart:
            return
        if part.flat[worst] > 1:
            raise Disagrees(
                f"{key} is {apart.flat[worst]:.2g} from what is recorded, allowed {allowed.flat[worst]:.1g}"
            )
        self.apart, self.widest = float(part.flat[worst]), key

    def recorded_with(self, **values: object) -> None:
        """Make sure that keys of ours have the values that the case was recorded with."""
        for key, value in values.items():
            wanted = self.hyper[key]
            numbers = isinstance(value, int | float) and isinstance(wanted, int | float)
            if not (math.isclose(value, wanted) if numbers else value == wanted):  # type: ignore[arg-type]
                raise Disagrees(f"{key} is {value}, and the case was recorded with {wanted}")


def as_numbers(value: Tensor | np.ndarray[Any, Any] | float) -> np.ndarray[Any, Any]:
    """Return numbers of any kind in float64."""
    return np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value, dtype=np.float64)


def must(held: bool, what: str) -> None:
    """Raise Disagrees where something that a case takes for granted does not hold."""
    if not held:
        raise Disagrees(what)


Run = Callable[[Case, Subject], None]


@dataclass(frozen=True)
class Replay:
    """How a case is replayed, and with which method; a partition's has no family and looks at no subject."""

    case: str
    family: str | None
    run: Run


REPLAYS: dict[str, Replay] = {}


def replays(family: str | None, *names: str) -> Callable[[Run], Run]:
    """Enter the replay of cases."""

    def enter(run: Run) -> Run:
        for name in names:
            assert name not in REPLAYS, f"two replays of {name}"
            REPLAYS[name] = Replay(name, family, run)
        return run

    return enter

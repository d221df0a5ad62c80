"""Reference cases and the checks that run them.

A check is a function registered for one or several case names with ``@checks("local_fedavg", ...)``.
It receives a :class:`Case` and raises ``AssertionError`` when fedstill's numbers leave the tolerance that
the case's own JSON states. Hyper-parameters are read from that JSON, never repeated here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """Return the folder of the reference cases: ``FEDSTILL_GOLDEN`` or the copy beside the tests."""
    return Path(os.environ.get("FEDSTILL_GOLDEN") or HERE / "cases")


@dataclass(frozen=True)
class Case:
    """One reference case: ``meta`` is its JSON, ``arrays`` its npz."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def hyper(self) -> dict[str, Any]:
        return self.meta["hyper"]

    def array(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def tensor(self, key: str) -> torch.Tensor:
        """Return an array as a tensor: floats in float64, integers in int64."""
        value = torch.from_numpy(np.array(self.arrays[key]))
        return value.double() if value.is_floating_point() else value.long()

    def tolerance(self, key: str) -> tuple[float, float]:
        """Return (rtol, atol) of ``key`` in float64."""
        table = self.meta["tolerance_float64"]
        chosen = table.get("by_key", {}).get(key, table["default"])
        return float(chosen["rtol"]), float(chosen["atol"])

    def agrees(self, key: str, value: torch.Tensor | np.ndarray | float, at: Any = ...) -> None:
        """Assert that ``value`` equals the stored ``key`` (indexed by ``at``) within its tolerance."""
        rtol, atol = self.tolerance(key)
        got = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        np.testing.assert_allclose(got, self.arrays[key][at], rtol=rtol, atol=atol, err_msg=f"{self.name} {key}")


Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}


def checks(*names: str) -> Callable[[Check], Check]:
    """Register a check for the named cases."""

    def register(check: Check) -> Check:
        for name in names:
            assert name not in CHECKS, f"two checks for {name}"
            CHECKS[name] = check
        return check

    return register


def load(name: str) -> Case:
    path = folder() / f"{name}.json"
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return Case(name, json.loads(path.read_text()), arrays)

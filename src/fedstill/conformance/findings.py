"""What a check is, what it says, and the table of all checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedstill.payload import Payload
from fedstill.weights import Weights

if TYPE_CHECKING:
    from fedstill.conformance.subject import Subject


class DoesNotApply(Exception):
    """Raised in a check that has nothing to say of the method at hand; the text says why."""


@dataclass(frozen=True)
class Verdict:
    """What a check found: whether the method does as it should, and the numbers."""

    held: bool
    detail: str
    apart: float = 0.0
    """How near to failing it is, as a part of what is allowed."""


@dataclass(frozen=True)
class Finding:
    """A check's verdict on a method; ``held`` is None where the check does not apply."""

    method: str
    check: str
    held: bool | None
    detail: str


@dataclass(frozen=True)
class Check:
    """A check of one property.

    Parameters
    ----------
    name : str
    what : str
        What it checks.
    without : str
        What goes wrong where the property does not hold.
    families : tuple of str
        The methods it applies to; all where it is empty.
    refines : bool
        Whether it checks refinements, and not base methods.
    run : callable
    """

    name: str
    what: str
    without: str
    families: tuple[str, ...]
    refines: bool
    run: Callable[[Subject], Verdict]

    @property
    def scope(self) -> str:
        """Say in words which methods it applies to."""
        plus = "+" if self.refines else ""
        return ", ".join(f"{plus}{name}" for name in self.families) or f"any {'refinement' if plus else 'base method'}"


CHECKS: dict[str, Check] = {}


def check(
    *families: str, without: str, refines: bool = False
) -> Callable[[Callable[[Subject], Verdict]], Callable[[Subject], Verdict]]:
    """Enter a function in the table: its name is the check's, its docstring says what it checks."""

    def enter(run: Callable[[Subject], Verdict]) -> Callable[[Subject], Verdict]:
        name = run.__name__.replace("_", "-")
        assert name not in CHECKS, f"two checks {name}"
        what = " ".join((inspect.getdoc(run) or "").split())
        CHECKS[name] = Check(name, what, without, families, refines, run)
        return run

    return enter


Tree = Tensor | Weights | Payload | Mapping[str, Any]
"""A tensor, a model, a message, a state, or a table of these."""


def leaves(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Return every tensor of a model, a message or a state by one name."""
    if isinstance(tree, Tensor):
        return {prefix or "value": tree}
    if isinstance(tree, Weights):
        tree = {"params": tree.params, "buffers": tree.buffers}
    elif isinstance(tree, Payload):
        tree = {kind.value: tensors for kind, tensors in tree.parts.items()}
    found: dict[str, Tensor] = {}
    for name, part in tree.items():
        found |= leaves(part, f"{prefix}/{name}" if prefix else name)
    return found


def copied(tree: Tree) -> dict[str, Tensor]:
    """Return copies of all tensors."""
    return {name: value.detach().clone() for name, value in leaves(tree).items()}


def mismatch(got: Tree, wanted: Tree) -> tuple[str, float]:
    """Return the tensor that differs most and by how much; infinity where names, shapes or types differ."""
    left, right = leaves(got), leaves(wanted)
    if left.keys() != right.keys():
        return f"the names ({', '.join(sorted(left.keys() ^ right.keys())[:3])})", float("inf")
    worst = ("", 0.0)
    for name, value in left.items():
        other = right[name]
        if value.shape != other.shape or value.is_floating_point() != other.is_floating_point():
            return name, float("inf")
        apart = (value.detach().double() - other.detach().double()).abs()
        apart = torch.where(apart.isnan(), torch.full_like(apart, float("inf")), apart)
        size = float(apart.max()) if apart.numel() else 0.0
        if size > worst[1]:
            worst = (name, size)
    return worst


def agree(got: Tree, wanted: Tree, within: float, what: str) -> Verdict:
    """Say whether all numbers agree within an absolute distance; 0 asks for the same bits."""
    name, apart = mismatch(got, wanted)
    held = apart <= within
    at = f" ({name})" if not held and name not in ("", "value") else ""
    if apart == 0:
        return Verdict(True, f"{what}: the same bits")
    asked = "should be the same bits" if within == 0 else f"at most {within:.0e}"
    return Verdict(held, f"{what}: {apart:.2g} apart{at}, {asked}", apart / within if within else 1.0)


def differ(one: Tree, other: Tree, what: str, least: float = 0.0) -> Verdict:
    """Say whether two things that must not be the same are not."""
    _, apart = mismatch(one, other)
    held = apart > least
    return Verdict(held, f"{what}: {apart:.2g} apart" + ("" if held else ", and should not be the same"))


def all_of(*verdicts: Verdict) -> Verdict:
    """Return the first that does not hold, or else what was said; of many, what was nearest to failing."""
    for one in verdicts:
        if not one.held:
            return one
    if len(verdicts) <= 3:
        return Verdict(True, "; ".join(one.detail for one in verdicts), max(one.apart for one in verdicts))
    worst = max(verdicts, key=lambda one: one.apart)
    return Verdict(True, f"{len(verdicts)} comparisons, the widest: {worst.detail}", worst.apart)


def only_tensors(state: Mapping[str, Any], whose: str) -> Verdict:
    """Say whether a state is group -> name -> tensor, which is what a checkpoint can hold."""
    for group, tensors in state.items():
        if not isinstance(tensors, Mapping):
            return Verdict(False, f"{whose}: {group!r} is {type(tensors).__name__}, not a group of tensors")
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                return Verdict(False, f"{whose}: {group}/{name} is {type(value).__name__}, not a tensor")
    return Verdict(True, f"{whose}: tensors only")

"""Methods by name: ``base+refinement+refinement``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from fedstill.errors import InputError
from fedstill.methods.alone import AloneFusion, AloneObjective
from fedstill.methods.base import Method
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.feddf import FedDF
from fedstill.methods.feddistill import FedDistillFusion, FedDistillObjective
from fedstill.methods.feddyn import FedDynFusion, FedDynObjective
from fedstill.methods.fedftg import FedFTG, generator_seed
from fedstill.methods.fedgen import FedGenFusion, FedGenObjective
from fedstill.methods.fedmd import FedMDFusion, FedMDObjective
from fedstill.methods.fedprox import FedProxObjective
from fedstill.methods.moon import MoonObjective
from fedstill.methods.scaffold import ScaffoldFusion, ScaffoldObjective
from fedstill.names import unknown

if TYPE_CHECKING:
    from fedstill.config import Config


@dataclass(frozen=True)
class Entry:
    """A part of a method: what it is in one line, and how it is made from a configuration."""

    summary: str
    make: Callable[[Config], Any]


BASES: dict[str, Entry] = {
    "alone": Entry(
        "no federation: every client trains by itself, the floor",
        lambda config: (AloneObjective(), AloneFusion()),
    ),
    "fedavg": Entry(
        "local SGD and the sample-weighted average (McMahan et al. 2017)",
        lambda config: (FedAvgObjective(), FedAvgFusion(config.fusion)),
    ),
    "fedprox": Entry(
        "FedAvg with a proximal term (Li et al. 2020)",
        lambda config: (FedProxObjective(config.fedprox), FedAvgFusion(config.fusion)),
    ),
    "scaffold": Entry(
        "control variates against client drift (Karimireddy et al. 2020)",
        lambda config: (
            ScaffoldObjective(config.scaffold),
            ScaffoldFusion(config.scaffold, config.fusion, refined="+" in config.method),
        ),
    ),
    "feddyn": Entry(
        "a regulariser that moves with every client's past (Acar et al. 2021)",
        lambda config: (FedDynObjective(), FedDynFusion(config.feddyn, config.fusion)),
    ),
    "moon": Entry(
        "a contrastive term on the features, against the global and the client's last model (Li et al. 2021)",
        lambda config: (MoonObjective(config.moon), FedAvgFusion(config.fusion)),
    ),
    "fedgen": Entry(
        "a generator of features, learnt from the clients' heads, regularises their training (Zhu et al. 2021)",
        lambda config: (
            FedGenObjective(config.fedgen, config.local.batch_size),
            FedGenFusion(config.fedgen, config.fusion, config.seed.train),
        ),
    ),
    "feddistill": Entry(
        "clients share their mean logits by label, and with feddistill.share = 'weights' their models (FedDistill+)",
        lambda config: (FedDistillObjective(config.feddistill), FedDistillFusion(config.feddistill, config.fusion)),
    ),
    "fedmd": Entry(
        "participants with models of their own fit their mean logits on public samples (Li and Wang 2019)",
        lambda config: (FedMDObjective(config.fedmd), FedMDFusion(config.fedmd, config.data.clients)),
    ),
}

REFINEMENTS: dict[str, Entry] = {
    "feddf": Entry(
        "ensemble distillation of the clients' models on unlabelled samples (Lin et al. 2020)",
        lambda config: FedDF(config.feddf, generator_seed(config.seed.train, "feddf"), config.data.augment),
    ),
    "fedftg": Entry(
        "data-free distillation of the clients' models into the fused one (Zhang et al. 2022)",
        lambda config: FedFTG(config.fedftg, seed=generator_seed(config.seed.train)),
    ),
}

GROUPS = {"base": ("fedstill.methods", BASES), "refinement": ("fedstill.refinements", REFINEMENTS)}


def compose(config: Config) -> Method:
    """Return the method that ``config.method`` names.

    A part is a built-in name, a name from the entry-point groups ``fedstill.methods`` or
    ``fedstill.refinements``, or an import path ``package.module:factory`` of a callable that takes the
    configuration and returns ``(objective, fusion)``, or a refinement.

    Raises
    ------
    InputError
        For an unknown part, or one in the wrong place.
    """
    base, *rest = [part.strip() for part in config.method.split("+")]
    if base in REFINEMENTS:
        raise InputError(
            f"method = {config.method!r}: {base!r} refines a fused model and needs a base method before it, "
            f"such as 'fedavg+{base}'"
        )
    if twice := next((part for part in rest if rest.count(part) > 1), None):
        raise InputError(f"method = {config.method!r}: {twice!r} stands there twice")
    for part in rest:
        if part in BASES:
            raise InputError(f"method = {config.method!r}: {part!r} is a base method and can only come first")
    try:
        objective, fusion = _find("base", base).make(config)
        refinements = tuple(_find("refinement", part).make(config) for part in rest)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"method = {config.method!r}: a part is not a factory of methods ({error}); it must take the configuration "
            f"and return (objective, fusion), or a refinement"
        ) from error
    if config.fusion.server_momentum and not isinstance(fusion, FedAvgFusion):
        raise InputError(f"fusion.server_momentum: {base!r} does not average as FedAvg does; leave it at 0")
    return Method(config.method, objective, fusion, refinements)


def _find(role: str, name: str) -> Entry:
    group, table = GROUPS[role]
    if name in table:
        return table[name]
    if ":" in name:
        return Entry(f"imported from {name}", _imported(name))
    found = {point.name: point for point in entry_points(group=group)}
    if name in found:
        return Entry(f"from {found[name].value}", found[name].load())
    raise unknown("method" if role == "base" else "refinement", name, [*table, *found])


def _imported(path: str) -> Callable[[Config], Any]:
    module, _, attribute = path.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"method: {path!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise InputError(f"method: {path!r} is not callable")
    return factory  # type: ignore[no-any-return]


def list_methods() -> dict[str, str]:
    """Return name -> one-line summary; refinements as ``+name``."""
    refinements = {f"+{name}": entry.summary for name, entry in REFINEMENTS.items()}
    return {name: entry.summary for name, entry in BASES.items()} | refinements

"""The partitions of the released codes, for given seeds; they belong to no method."""

from __future__ import annotations

import numpy as np

from fedstill.conformance.replays.registry import Case, replays
from fedstill.conformance.subject import Subject
from fedstill.data import make_partition

PROTOCOLS = {
    "partition_feddyn": "dirichlet-per-client",
    "partition_feddyn_unbalanced": "dirichlet-per-client",
    "partition_per_class_0": "dirichlet-per-class",
    "partition_per_class_1": "dirichlet-per-class",
}


@replays(None, *PROTOCOLS)
def replayed_partition(case: Case, _: Subject) -> None:
    """FedFTG's and MOON's code: Dirichlet by client, or by class."""
    clients = int(case.array("in/clients"))
    partition = make_partition(
        case.array("in/labels"),
        int(case.array("in/classes")),
        protocol=PROTOCOLS[case.name],
        clients=clients,
        beta=float(case.array("in/beta")),
        sigma=float(case.arrays.get("in/sigma", np.array(0.0))),
        shards_per_client=1,
        min_size=case.hyper.get("min_size", 1),
        replay=True,
        seed=int(case.array("in/numpy_seed")),
    )
    case.agrees("out/sizes", np.array([len(own) for own in partition.indices]))
    case.agrees("out/class_counts", partition.counts)
    for client, own in enumerate(partition.indices):
        case.agrees(f"out/sample_ids_{client}", own)


@replays(None, "partition_feddf")
def feddf_partition(case: Case, _: Subject) -> None:
    """FedDF's code."""
    partition = make_partition(
        case.array("in/labels"),
        int(case.array("in/classes")),
        protocol="feddf",
        clients=int(case.array("in/clients")),
        beta=float(case.array("in/alpha")),
        replay=True,
        seed=int(case.array("in/seed")),
    )
    case.agrees("out/sizes", np.array([len(own) for own in partition.indices]))
    case.agrees("out/class_counts", partition.counts)
    for client, own in enumerate(partition.indices):
        case.agrees(f"out/sample_ids_{client}", own)


@replays(None, "partition_fedgen_0", "partition_fedgen_1")
def fedgen_partition(case: Case, _: Subject) -> None:
    """FedGen's code.

    The case orders its classes itself; here they go by number, so a class's number is its place in that order.
    """
    order, per_class = case.array("in/class_order"), case.array("in/class_sizes")
    starts = np.cumsum(per_class) - per_class
    partition = make_partition(
        np.repeat(np.argsort(order), per_class),
        len(order),
        protocol="fedgen",
        clients=int(case.array("in/clients")),
        beta=float(case.array("in/alpha")),
        ratio=float(case.array("in/sampling_ratio")),
        min_size=case.hyper["min_size"],
        replay=True,
        seed=int(case.array("in/numpy_seed")),
    )
    case.agrees("out/sizes", np.array([len(own) for own in partition.indices]))
    case.agrees("out/class_counts", partition.counts[:, np.argsort(order)])
    for user, own in enumerate(partition.indices):
        label = np.searchsorted(starts, own, side="right") - 1
        for wanted, start in enumerate(starts):
            case.agrees(f"out/ids_{user}_{wanted}", own[label == wanted] - start)


@replays(None, "partition_multinomial")
def multinomial_partition(case: Case, _: Subject) -> None:
    """FedFTG's code: one draw after another."""
    partition = make_partition(
        case.array("in/labels"),
        int(case.array("in/classes")),
        protocol="multinomial",
        clients=int(case.array("in/clients")),
        beta=float(case.array("in/alpha")),
        replay=True,
        seed=int(case.array("in/torch_seed")),
    )
    case.agrees("out/class_counts", partition.counts)
    case.agrees("out/sample_ids", np.stack(partition.indices))

from __future__ import annotations

import numpy as np
from registry import Case, checks

from fedstill.data import make_partition

PROTOCOLS = {
    "partition_feddyn": "dirichlet-per-client",
    "partition_feddyn_unbalanced": "dirichlet-per-client",
    "partition_per_class_0": "dirichlet-per-class",
    "partition_per_class_1": "dirichlet-per-class",
}


@checks(*PROTOCOLS)
def replayed_partition(case: Case) -> None:
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

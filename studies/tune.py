"""How the hyper-parameters of ``fedftg.mode = "tuned"`` were chosen: on validation data, never on a test set.

    FEDSTILL_DATA=... python studies/tune.py digits|fashion_mnist|cifar10 [OUT.jsonl [CANDIDATE ...]]

Every candidate runs three rounds on a partition (seed 100) that no reported result uses; what is compared is the
refined model's accuracy on 1,000 validation images (digits: 200), mean over the rounds, beside the same run's
FedAvg without refinement.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedstill.build import build
from fedstill.config import load_config
from fedstill.execution.allocator import keep_freed_memory

COMMON = [
    "seed.data=100",
    "seed.train=100",
    "data.beta=0.1",
    "data.clients=10",
    "train.rounds=3",
    'eval.on=["validation"]',
]
SETTINGS = {
    "digits": ["data.train_samples=1200", "data.server_validation=200", "local.epochs=20", "local.batch_size=16"],
    "fashion_mnist": [
        "data.train_samples=6000", "data.server_validation=1000", "local.epochs=10", "local.batch_size=32",
        "local.lr=0.05", "model.width=16",
    ],
    "cifar10": [
        "data.train_samples=6000", "data.server_validation=1000", "local.epochs=10", "local.batch_size=32",
        "local.lr=0.05", "model.width=16",
    ],
}  # fmt: skip
CANDIDATES: dict[str, list[str]] = {
    "no refinement": ["method=fedavg"],
    "paper": ["fedftg.mode=paper"],
    "tuned, lambda_md 0, lr 0.1": ["fedftg.lr_student=0.1"],
    "tuned, lambda_md 0, lr 0.05": ["fedftg.lr_student=0.05"],
    "tuned, lambda_md 0, lr 0.02": ["fedftg.lr_student=0.02"],
    "tuned, lambda_md 0, lr 0.01": ["fedftg.lr_student=0.01"],
    "tuned, lambda_md 0, lr 0.05, class-weighted teacher": ["fedftg.lr_student=0.05", "fedftg.teacher=class"],
    "tuned, lambda_md 0.1, lr 0.05": ["fedftg.lr_student=0.05", "fedftg.lambda_md=0.1"],
    "tuned, lambda_md 0, lr 0.05, eval-mode generator": ["fedftg.lr_student=0.05", "fedftg.generator_norm=eval"],
}


def main(dataset: str, out: Path, only: list[str]) -> None:
    keep_freed_memory()
    for name, keys in CANDIDATES.items():
        if only and name not in only:
            continue
        base = ["method=fedavg+fedftg", "fedftg.mode=tuned", "fedftg.generator_width=16", f"data.name={dataset}"]
        federation, _ = build(load_config(None, [*base, *COMMON, *SETTINGS[dataset], *keys]))
        state, fused, refined, seen = federation.start(), [], [], {}
        for _ in range(federation.config.train.rounds):
            state, record = federation.run_round(state)
            fused.append(record["fused"]["validation"]["accuracy"])
            refined.append(record.get("refined", record["fused"])["validation"]["accuracy"])
            seen = record["refinement"].get("fedftg", {})
        federation.executor.close()
        mean = sum(refined) / len(refined)
        line = {"dataset": dataset, "candidate": name, "mean": mean, "fused": fused, "refined": refined, "last": seen}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{dataset:14} {name:52} mean {mean:.3f}  fused {fused}  refined {refined}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "tune.jsonl"), sys.argv[3:])

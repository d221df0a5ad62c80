"""Three settings, eight methods, three seeds; how to run it stands in ``study.py``."""

from __future__ import annotations

from pathlib import Path

from study import Setting, Study, main

VARIANTS: dict[str, list[str]] = {
    "FedAvg": ["method=fedavg"],
    "FedAvg, class-weighted head": ["method=fedavg", "fusion.head=class-weighted"],
    "SCAFFOLD": ["method=scaffold"],
    "FedAvg+FedFTG, paper": ["method=fedavg+fedftg", "fedftg.mode=paper"],
    "FedAvg+FedFTG, code": ["method=fedavg+fedftg", "fedftg.mode=code"],
    "FedAvg+FedFTG, tuned": ["method=fedavg+fedftg", "fedftg.mode=tuned"],
    "SCAFFOLD+FedFTG, tuned": ["method=scaffold+fedftg", "fedftg.mode=tuned"],
    "FedAvg, noise inputs, class-weighted teacher": [
        "method=fedavg+fedftg", "fedftg.mode=tuned", "fedftg.inputs=noise", "fedftg.teacher=class",
    ],
}  # fmt: skip
STUDY = Study(
    {
        "fashion, few rounds": Setting("fashion-few-rounds", ["model.width=8"], VARIANTS),
        "fashion, many rounds": Setting("fashion-many-rounds", ["model.width=8"], VARIANTS),
        "cifar10, few rounds": Setting("cifar10-few-rounds", ["model.width=8"], VARIANTS),
    },
    (0, 1, 2),
    Path(__file__).with_suffix(".json"),
)

if __name__ == "__main__":
    main(STUDY, __doc__ or "")

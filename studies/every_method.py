"""A real run of every method, and architectures that differ; how to run it stands in ``study.py``."""

from __future__ import annotations

from pathlib import Path

from study import Setting, Study, main

DF_STEPS = ["feddf.steps=200", "feddf.validate_every=25", "feddf.patience=100"]
FASHION: dict[str, list[str]] = {
    "FedDyn": ["method=feddyn", 'eval.models=["sel","all"]'],
    "MOON": ["method=moon"],
    "FedAvg+FedDF, MNIST": ["method=fedavg+feddf", "public.name=mnist", *DF_STEPS],
    "FedAvg+FedDF, data-free": ["method=fedavg+feddf", "feddf.mode=fedftg"],
    "FedAvg+FedFTG, feature level": ["method=fedavg+fedftg", "fedftg.mode=tuned", "fedftg.level=feature"],
    "FedDyn+FedFTG, tuned": ["method=feddyn+fedftg", "fedftg.mode=tuned"],
    "FedAvg+FedFTG, paper without mining": ["method=fedavg+fedftg", "fedftg.mode=paper", "fedftg.lambda_md=0.0"],
    "FedAvg+FedFTG, paper, accepted by clients": [
        "method=fedavg+fedftg", "fedftg.mode=paper", "refinement.accept=clients", "data.client_validation=0.1",
    ],
    "FedAvg, a tenth held out": ["method=fedavg", "data.client_validation=0.1"],
}  # fmt: skip
MNIST: dict[str, list[str]] = {
    "FedAvg": ["method=fedavg"],
    "FedGen, code": ["method=fedgen", "fedgen.mode=code"],
    "FedGen, corrected": ["method=fedgen", "fedgen.mode=corrected"],
    "FedGen, paper": ["method=fedgen", "fedgen.mode=paper"],
    "FedGen, code, buffers averaged": ["method=fedgen", "fedgen.mode=code", "fedgen.buffers=averaged"],
    "FedAvg with personal BatchNorm (FedGen's code, alpha = beta = 0)": [
        "method=fedgen",
        "fedgen.mode=code",
        "fedgen.alpha=0.0",
        "fedgen.beta=0.0",
    ],
    "FedDistill+": ["method=feddistill", "feddistill.share=weights"],
    "FedDistill": ["method=feddistill", "feddistill.share=logits"],
}
ARCHITECTURES: dict[str, list[str]] = {
    "alone": ["method=alone"],
    "averaged within each architecture": ["method=fedavg"],
    "FedAvg+FedDF, MNIST": ["method=fedavg+feddf", "public.name=mnist", *DF_STEPS],
    "FedAvg+FedFTG, tuned": ["method=fedavg+fedftg", "fedftg.mode=tuned"],
    "FedAvg, noise inputs, class-weighted teacher": [
        "method=fedavg+fedftg", "fedftg.mode=tuned", "fedftg.inputs=noise", "fedftg.teacher=class",
    ],
    "FedMD, MNIST": [
        "method=fedmd", "public.name=mnist", "public.samples=5000", "public.labels=separate", "train.rounds=6",
        "fedmd.align_samples=1000", "fedmd.digest_batch_size=64", "fedmd.public_epochs=5", "fedmd.private_epochs=20",
        "fedmd.revisit_epochs=4", "fedmd.revisit_batch_size=32",
    ],
}  # fmt: skip
STUDY = Study(
    {
        "fashion, three architectures": Setting("fashion-three-models", [], ARCHITECTURES),
        "fedgen-mnist": Setting("fedgen-mnist", ["train.rounds=30", "eval.every=1"], MNIST),
        "fashion, few rounds": Setting("fashion-few-rounds", ["model.width=8"], FASHION),
    },
    (0, 1, 2),
    Path(__file__).with_suffix(".json"),
)

if __name__ == "__main__":
    main(STUDY, __doc__ or "")

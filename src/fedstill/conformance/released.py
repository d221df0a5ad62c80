"""Forms of the authors' released code that are keys of ours, and the checks that they do not pass.

They are offered to reproduce published numbers, and are reported as what they are: not the method of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Deviation:
    """Keys under which a built-in method does as a released code does, and what fails then."""

    method: str
    keys: Mapping[str, object]
    fails: tuple[str, ...]
    why: str


DEVIATIONS = (
    Deviation(
        "scaffold",
        {"scaffold.mode": "code"},
        ("rate-of-the-round", "scaffold-current-rate"),
        "c_k divides by the learning rate of round 0; without a decay of the rate there is no difference",
    ),
    Deviation(
        "scaffold+fedftg",
        {"fedftg.mode": "code"},
        (
            "rate-of-the-round",
            "traffic-as-in-the-papers",
            "scaffold-current-rate",
            "fedftg-student-step-by-hand",
            "fedftg-class-weights-per-sample",
            "fedftg-generator-loss-by-hand",
        ),
        "as SCAFFOLD and FedFTG do below; and the model before refinement travels too, from which c_k is measured",
    ),
    Deviation(
        "fedprox",
        {"fedprox.kind": "weight_decay_bug"},
        ("fedprox-rounds-by-hand", "fedprox-pulls-to-what-was-sent"),
        "the FedFTG code adds mu to the weight decay, which pulls to zero",
    ),
    Deviation(
        "fedgen",
        {"fedgen.mode": "code"},
        ("fedgen-client-steps-by-hand", "fedgen-label-weights-act-per-sample"),
        "a KL term that the paper does not have; label weights that are lost in a product of two means",
    ),
    Deviation(
        "fedgen",
        {"fedgen.mode": "corrected"},
        ("fedgen-client-steps-by-hand",),
        "the same KL term; the label weights act",
    ),
    Deviation(
        "+fedftg",
        {"fedftg.mode": "code"},
        ("fedftg-student-step-by-hand", "fedftg-class-weights-per-sample", "fedftg-generator-loss-by-hand"),
        "KL(teachers || student) for the student, a product of two means in L_cls, L1 of logits in L_md",
    ),
    Deviation(
        "+fedftg",
        {"fedftg.mode": "tuned"},
        ("fedftg-student-step-by-hand", "fedftg-generator-loss-by-hand"),
        "our own choice of losses, by measurement",
    ),
    Deviation(
        "+feddf",
        {"feddf.mode": "fedftg"},
        ("feddf-average-of-logits",),
        "the FedFTG code averages probabilities",
    ),
)
"""What ``fedstill conformance METHOD KEY=VALUE`` reports; a test holds this table to it."""

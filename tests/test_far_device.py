"""Every method away from the CPU: no operation mixes devices, the numbers are the CPU's, and steps wait for nothing.

The device is a stand-in (:mod:`far`), so that these tests need no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from far import FAR, MixedDevices, far_device
from fedstill.distill.teachers import StackedTeachers
from fedstill.federation import FederationState, Record
from small import flat, play, untimed

LOCAL = {
    "alone": [],
    "fedavg": ["fusion.server_momentum=0.5"],
    "fedprox": ["fedprox.mu=0.1"],
    "scaffold": ["local.clip_norm=1.0"],
    "feddyn": ["feddyn.alpha=0.1"],
    "moon": ["moon.previous_models=2"],
    "fedgen": ["fedgen.mode=code"],
    "feddistill": ["feddistill.share=weights"],
}
UNEQUAL = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5", "local.batch_size=7"]
CNN = ["model.name=cnn", "model.width=4"]
PUBLIC = ["public.name=digits", "public.samples=60"]
MEASURED = ['eval.models=["sel", "all"]', "data.client_validation=0.2", 'eval.on=["test", "clients"]']
KEYS = {
    "momentum": ["method=fedavg", "local.momentum=0.9", "local.weight_decay=0.01", *UNEQUAL],
    "augmented": ["method=moon", "data.augment=flip-crop-half", *CNN, "model.norm=bn"],
    "head": ["method=scaffold", "fusion.head=class-weighted"],
    "fedftg": ["method=scaffold+fedftg"],
    "fedftg, code": ["method=fedavg+fedftg", "fedftg.mode=code"],
    "fedftg, convolutions": ["method=fedavg+fedftg", "fedftg.inputs=noise", *CNN, "model.norm=bn"],
    "fedftg, features": ["method=fedavg+fedftg", "fedftg.level=feature"],
    "fedftg, the clients' data": ["method=fedavg+fedftg", "fedftg.inputs=real"],
    "fedftg, accepted": ["method=fedavg+fedftg", "refinement.accept=clients", "data.client_validation=0.2"],
    "feddf": ["method=fedavg+feddf", *PUBLIC, "feddf.steps=6", "data.server_validation=40", "feddf.validate_every=2"],
    "feddf, data-free": ["method=fedavg+feddf", "feddf.inputs=generator", "feddf.steps=4", "feddf.patience=0"],
    "fedmd": ["method=fedmd", *PUBLIC, "fedmd.align_samples=20", "fedmd.private_epochs=2", "fedmd.public_epochs=2"],
    "measured": ["method=fedavg", *MEASURED],
}


def twin(*keys: str) -> tuple[Any, Any]:
    """Run a federation on the CPU, its teachers in one batch as away from it, and on the far device."""
    stacked = StackedTeachers.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedTeachers, "of", lambda *given: replace(stacked(*given), batched=True))
        near = play(*keys)
    with far_device():
        far = play(*keys, "execution.device=cuda")
    return near[1:], far[1:]


def agree(
    near: tuple[FederationState, list[Record]], far: tuple[FederationState, list[Record]], within: float = 0.0
) -> None:
    """Compare every tensor of two ends, and their records but for the times."""
    left, right = flat(near[0]), flat(far[0])
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(getattr(right[name], "held", right[name]), value, rtol=within, atol=within)
    assert [list(record) for record in untimed(near[1])] == [list(record) for record in untimed(far[1])]
    for one, other in zip(near[1], far[1], strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=within)


@pytest.mark.parametrize("executor", ["serial", "vectorized"])
@pytest.mark.parametrize("method", LOCAL)
def test_every_objective_stays_on_its_device(method: str, executor: str) -> None:
    keys = [f"method={method}", f"execution.executor={executor}", *LOCAL[method], *UNEQUAL]
    near, far = twin(*keys)
    agree(near, far)
    assert any(value.device == FAR for value in flat(far[0]).values())


@pytest.mark.parametrize("executor", ["serial", "vectorized"])
@pytest.mark.parametrize("case", KEYS)
def test_everything_else_stays_on_its_device(case: str, executor: str) -> None:
    agree(*twin(f"execution.executor={executor}", *KEYS[case]), within=1e-4 if "convolutions" in case else 0.0)


def waits(*keys: str) -> dict[str, int]:
    """Return how often the host waits for a far federation, by line."""
    with far_device() as device:
        play(*keys, "execution.device=cuda", rounds=1)
    return dict(device.waited)


@pytest.mark.parametrize("executor", ["serial", "vectorized"])
@pytest.mark.parametrize("method", LOCAL)
def test_the_host_waits_no_more_often_for_more_local_steps(method: str, executor: str) -> None:
    keys = [f"method={method}", f"execution.executor={executor}", *LOCAL[method], "data.augment=flip-crop", *CNN]
    few, many = (waits(*keys, f"local.batch_size={size}") for size in (25, 5))
    assert few == many
    assert few  # evaluation has to read its figures


@pytest.mark.parametrize(
    ("method", "steps"),
    [("fedavg+fedftg", "fedftg.iterations"), ("fedavg+fedftg", "fedftg.student_steps"), ("fedavg+feddf", "feddf.steps"),
     ("fedavg+feddf", "feddf.generator_steps"), ("fedgen", "fedgen.generator_steps")],
)  # fmt: skip
def test_the_host_waits_no_more_often_for_more_steps_of_the_server(method: str, steps: str) -> None:
    keys = [f"method={method}", "feddf.inputs=generator", "feddf.patience=0", "feddf.steps=3"]
    few, many = (waits(*keys, f"{steps}={number}") for number in (3, 9))
    assert few == many


def test_the_device_refuses_what_a_gpu_refuses_and_counts_what_waits() -> None:
    with far_device() as device:
        there = torch.ones(3, device=FAR)
        with pytest.raises(MixedDevices):
            there + torch.ones(3)
        with pytest.raises(MixedDevices):
            torch.rand(3, device=FAR, generator=torch.Generator("cpu").manual_seed(5))
        assert not device.waited
        assert (there + torch.tensor(1.0)).device == FAR  # a number may come from the host
        assert float(there.sum()) == 3.0
        assert torch.tensor([1, 2], device=FAR).tolist() == [1, 2]
        assert sum(device.waited.values()) == 3  # the number, the way there, the way back

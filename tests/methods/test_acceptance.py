"""Refinements that are kept only where they win: the rule by hand, what is sent, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedstill.build import build
from fedstill.data.dataset import Samples
from fedstill.errors import InputError
from fedstill.methods.acceptance import Hearing, Verdict
from fedstill.models import Stateless
from fedstill.weights import Weights
from small import play, same_state, same_weights, small, untimed

ASK = ["method=fedavg+fedftg", "data.client_validation=0.2"]


@pytest.mark.parametrize(
    ("gained", "lost", "samples", "margin", "accepted"),
    [
        (5, 0, 100, None, True),  # 0.05 against sqrt((0.05 - 0.0025) / 100) = 0.0218
        (3, 1, 100, None, True),  # 0.02 against sqrt((0.04 - 0.0004) / 100) = 0.0199
        (10, 8, 100, None, False),  # 0.02 against sqrt((0.18 - 0.0004) / 100) = 0.0424
        (1, 0, 100, None, True),  # 0.01 against 0.00995
        (0, 0, 100, None, False),
        (0, 5, 100, None, False),
        (5, 0, 100, 0.05, False),
        (6, 0, 100, 0.05, True),
        (1, 0, 1000, 0.0, True),
        (0, 0, 0, None, False),
        (0, 0, 0, 0.0, False),
    ],
)
def test_the_rule(gained: int, lost: int, samples: int, margin: float | None, accepted: bool) -> None:
    assert Verdict(gained, lost, samples, margin).accepted is accepted


def test_the_standard_error_is_that_of_the_differences() -> None:
    differences = torch.tensor([1.0] * 7 + [-1.0] * 3 + [0.0] * 40, dtype=torch.float64)
    verdict = Verdict(7, 3, 50, None)
    assert verdict.gain == pytest.approx(float(differences.mean()))
    assert verdict.standard_error == pytest.approx(float(differences.std(correction=0)) / math.sqrt(50))


class Threshold(nn.Module):
    """Class 1 where x > t."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.t - x[:, 0], x[:, 0] - self.t], 1)


def test_right_answers_are_counted_in_pairs() -> None:
    def at(threshold: float) -> Weights:
        return Weights({"t": torch.tensor(threshold)}, {})

    hearing = Hearing(Stateless(Threshold()), at(0.0), at(2.0), batch_size=2)
    x = torch.tensor([[1.0], [1.0], [3.0], [-1.0], [1.0]])
    # Fused says 1 1 1 0 1, refined says 0 0 1 0 0.
    part = Samples(x, torch.tensor([0, 1, 1, 1, 0]))
    assert hearing.count(part).tolist() == [2, 1, 5]
    verdict = hearing.verdict([part, part], None)
    assert (verdict.gained, verdict.lost, verdict.samples) == (4, 2, 10)
    assert not hearing.verdict([], None).accepted


@pytest.mark.parametrize("accept", ["clients", "server"])
def test_a_refinement_that_hurts_leaves_the_fused_model(accept: str) -> None:
    keys = [*ASK, "data.server_validation=50", f"refinement.accept={accept}", "local.epochs=10", "train.rounds=1",
            "fedftg.inputs=noise", "fedftg.md_student=kl-teacher-student", "fedftg.reduction=batch",
            "fedftg.lr_student=5.0"]  # fmt: skip
    _, refused, records = play(*keys)
    measured: Any = records[0]["refinement"]
    assert measured["fedftg"]["accepted"] == 0
    _, plain, _ = play(*keys, "method=fedavg")
    assert same_weights(refused.server.weights, plain.server.weights)
    assert records[0]["refined"] == records[0]["fused"]


def test_a_refinement_that_wins_is_kept() -> None:
    keys = [*ASK, "fedftg.inputs=real", "fedftg.teacher=uniform", "fedftg.labels=uniform", "fedftg.iterations=60",
            "fedftg.md_student=kl-teacher-student", "fedftg.reduction=batch", "train.rounds=1", "local.epochs=4",
            "data.partition=dirichlet-per-class", "data.beta=0.2", "data.min_size=5"]  # fmt: skip
    _, asked, records = play(*keys, "refinement.accept=clients")
    measured: Any = records[0]["refinement"]
    assert measured["fedftg"]["accepted"] == 1
    _, always, _ = play(*keys)
    assert same_weights(asked.server.weights, always.server.weights)


def test_the_hearing_is_billed() -> None:
    keys = [*ASK, "train.rounds=1", "train.participation=0.5"]
    _, _, asked = play(*keys, "refinement.accept=clients")
    federation, _, plain = play(*keys)
    with_hearing: Any = asked[0]["bytes"]
    without: Any = plain[0]["bytes"]
    model = sum(value.numel() * value.element_size() for value in federation.initial.params.values())
    assert with_hearing["down"]["weights"] - without["down"]["weights"] == 2 * 2 * model  # two models to two clients
    assert with_hearing["up"].get("scalars", 0) - without["up"].get("scalars", 0) == 2 * 3 * 8
    _, _, server = play(*keys, "refinement.accept=server", "data.server_validation=50")
    assert server[0]["bytes"]["up"].keys() == without["up"].keys()  # type: ignore[index]


def test_only_the_cohorts_held_out_samples_decide() -> None:
    keys = [*ASK, "train.rounds=1", "train.participation=0.5", "refinement.accept=clients"]
    federation, _, records = play(*keys)
    measured: Any = records[0]["refinement"]
    cohort: Any = records[0]["cohort"]
    assert federation.held_out is not None
    assert measured["fedftg"]["accept_samples"] == sum(len(federation.held_out[client]) for client in cohort) > 0
    trained_on = sum(federation.info.samples)
    assert trained_on + sum(len(part) for part in federation.held_out) == 200


def test_threads_give_the_bits_of_serial() -> None:
    keys = [*ASK, "refinement.accept=clients"]
    _, serial, records = play(*keys)
    _, threads, found = play(*keys, "execution.executor=threads", "execution.workers=2")
    assert same_state(serial, threads)
    assert untimed(records) == untimed(found)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (("refinement.accept=clients",), r"data\.client_validation"),
        (("refinement.accept=server",), r"data\.server_validation"),
        (("refinement.accept=never",), r"refinement\.accept"),
        (("refinement.accept_margin=-0.1",), r"refinement\.accept_margin"),
    ],
)
def test_it_is_refused_where_nothing_is_held_out(keys: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(small("method=fedavg+fedftg", *keys))

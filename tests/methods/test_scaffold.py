"""SCAFFOLD: one round by hand, its fixed points on quadratics, its invariants, its released deviations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedstill.conformance.replays.sites import client_turn
from fedstill.methods.averaging import FusionSettings
from fedstill.methods.base import (
    FederationInfo,
    LocalObjective,
    LocalTask,
    RoundContext,
    ServerFusion,
    ServerState,
    Upload,
)
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.scaffold import ScaffoldFusion, ScaffoldObjective, ScaffoldSettings, fixed_steps
from fedstill.models import Stateless
from fedstill.payload import Kind, model_payload, scalars
from fedstill.training import SGD, Trained
from fedstill.weights import State, Tensors, Weights

Data = Sequence[tuple[Tensor, Tensor]]


class Line(nn.Module):
    """x . w"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Squares(LocalObjective):
    """f_k(w) = 1/(2 n_k) ||A_k w - y_k||^2 instead of cross-entropy."""

    def loss(self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> Tensor:
        return 0.5 * (model(params, buffers, x, train=True) - y).square().mean()


class SquaresFedAvg(Squares, FedAvgObjective):
    pass


class SquaresScaffold(Squares, ScaffoldObjective):
    pass


@dataclass
class Run:
    """A federation on quadratics; full batches, so that nothing is random but the cohorts."""

    objective: LocalObjective
    fusion: ServerFusion
    data: Data
    lr: float
    initial_lr: float | None = None

    def __post_init__(self) -> None:
        width = self.data[0][0].shape[1]
        self.info = FederationInfo(tuple(len(y) for _, y in self.data), 1, (width,))
        self.model = Stateless(Line(width))
        self.server = self.fusion.start(Weights({"w": torch.zeros(width, dtype=torch.float64)}, {}), self.info)
        self.states: list[State] = [{} for _ in self.data]
        self.round = 0

    @property
    def w(self) -> Tensor:
        return self.server.weights.params["w"]

    @property
    def c(self) -> Tensor:
        return self.server.method["control"]["w"]

    def own(self, client: int) -> Tensor:
        return self.states[client].get("control", {"w": torch.zeros_like(self.w)})["w"]

    def play(self, cohort: Sequence[int], steps: int | Sequence[int]) -> list[Upload]:
        uploads = []
        for place, client in enumerate(cohort):
            x, y = self.data[client]
            number = steps if isinstance(steps, int) else steps[place]
            task = LocalTask(self.round, client, len(y), self.lr, self.initial_lr or self.lr, number)
            order = [torch.arange(len(y))] * number
            turn = client_turn(
                self.model, self.objective, self.fusion, self.server, self.info, task, (x, y), order,
                SGD(self.lr), self.states[client],
            )  # fmt: skip
            self.states[client] = turn.state
            uploads.append(turn.upload)
        self.server = self.fusion.fuse(self.server, uploads, RoundContext(self.round, self.info))
        self.round += 1
        return uploads

    def gradient(self, client: int, w: Tensor) -> Tensor:
        x, y = self.data[client]
        return x.T @ (x @ w - y) / len(y)


def scaffold(data: Data, lr: float, initial_lr: float | None = None, **keys: object) -> Run:
    settings = ScaffoldSettings(**keys)
    return Run(SquaresScaffold(settings), ScaffoldFusion(settings), data, lr, initial_lr)


def fedavg(data: Data, lr: float) -> Run:
    return Run(SquaresFedAvg(), FedAvgFusion(), data, lr)


def clients(sizes: Sequence[int] = (4, 7, 12, 25), width: int = 3) -> Data:
    """Clients that disagree: each has its own A_k and its own solution b_k."""
    stream = torch.Generator().manual_seed(5)
    data = []
    for size in sizes:
        x = torch.randn(size, width, generator=stream, dtype=torch.float64)
        data.append((x, x @ (3 * torch.randn(width, generator=stream, dtype=torch.float64))))
    return data


def optimum(data: Data, by_samples: bool) -> Tensor:
    """Return the minimiser of the pooled squares, or of the mean of the clients' f_k."""
    weights = [1.0 if by_samples else 1.0 / len(y) for _, y in data]
    left = sum(weight * x.T @ x for weight, (x, _) in zip(weights, data))
    right = sum(weight * x.T @ y for weight, (x, y) in zip(weights, data))
    return torch.linalg.solve(left, right)


def test_two_rounds_by_hand() -> None:
    # f_0 = (w - 1)^2 / 2 with one sample, f_1 = (w - 3)^2 / 2 with three: omega = 1/2 and 3/2.
    ones = torch.ones(3, 1, dtype=torch.float64)
    run = scaffold([(ones[:1], ones[:1, 0]), (ones, 3 * ones[:, 0])], lr=0.5)
    uploads = run.play([0, 1], steps=2)
    # Client 0 goes 0, 0.5, 0.75; client 1 goes 0, 1.5, 2.25; K_s eta = 1.
    assert [float(upload.payload[Kind.WEIGHTS]["w"]) for upload in uploads] == [0.75, 2.25]
    assert [float(run.own(client)) for client in (0, 1)] == [-0.75, -2.25]
    assert float(run.w) == 1.5  # the uniform mean, whatever the sizes
    assert float(run.c) == 0.5 * (0.5 * -0.75 + 1.5 * -2.25) == -1.875
    # Round 1. Client 0 adds c / 0.5 - c_0 = -3: 1.5, 2.75, 3.375; client 1 adds 1: 1.5, 1.75, 1.875.
    uploads = run.play([0, 1], steps=2)
    assert [float(upload.payload[Kind.WEIGHTS]["w"]) for upload in uploads] == [3.375, 1.875]
    assert [float(upload.payload[Kind.CONTROL_VARIATE]["w"]) for upload in uploads] == [0.0, 1.5]
    assert [float(run.own(client)) for client in (0, 1)] == [-0.75, -0.75]
    assert float(run.w) == 2.625
    assert float(run.c) == -0.75


def cohorts(rounds: int, partial: bool) -> list[list[int]]:
    if not partial:
        return [[0, 1, 2, 3]] * rounds
    stream = torch.Generator().manual_seed(1)
    return [sorted(torch.randperm(4, generator=stream)[:2].tolist()) for _ in range(rounds)]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("client_weights", ["samples", "uniform"])
def test_the_fixed_point_is_the_optimum_that_the_client_weights_name(client_weights: str, partial: bool) -> None:
    data = clients()
    wanted, other = optimum(data, client_weights == "samples"), optimum(data, client_weights != "samples")
    assert torch.dist(wanted, other) > 0.1
    run = scaffold(data, lr=0.1, client_weights=client_weights)
    for cohort in cohorts(400 if partial else 120, partial):
        run.play(cohort, steps=4)
    torch.testing.assert_close(run.w, wanted, rtol=0, atol=1e-6)
    assert float(run.c.norm()) < 1e-6
    for client in range(4):  # at the fixed point each c_k is the client's gradient
        torch.testing.assert_close(run.own(client), run.gradient(client, wanted), rtol=0, atol=1e-5)


def test_unequal_step_counts_do_not_move_the_fixed_point() -> None:
    data = clients()
    run = scaffold(data, lr=0.08)
    for _ in range(120):
        run.play([0, 1, 2, 3], [3, 4, 5, 8])
    torch.testing.assert_close(run.w, optimum(data, by_samples=True), rtol=0, atol=1e-6)


def test_fedavg_with_several_local_steps_ends_elsewhere() -> None:
    data = clients()
    pooled = optimum(data, by_samples=True)
    drifting, single = fedavg(data, lr=0.1), fedavg(data, lr=0.1)
    for _ in range(200):
        drifting.play([0, 1, 2, 3], steps=5)
        single.play([0, 1, 2, 3], steps=1)
    before = drifting.w.clone()
    drifting.play([0, 1, 2, 3], steps=5)
    torch.testing.assert_close(drifting.w, before)  # it has come to rest
    assert torch.dist(drifting.w, pooled) > 0.01
    assert torch.dist(drifting.w, optimum(data, by_samples=False)) > 0.01
    torch.testing.assert_close(single.w, pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("client_weights", ["samples", "uniform"])
@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_c_is_the_weighted_mean_of_the_clients_variates_after_every_round(
    client_weights: str, server_lr: float
) -> None:
    data = clients()
    run = scaffold(data, lr=0.05, client_weights=client_weights, server_lr=server_lr)
    for cohort in cohorts(12, partial=True):
        kept = {client: run.own(client).clone() for client in range(4) if client not in cohort}
        run.play(cohort, steps=3)
        omega = [run.info.omega(client) if client_weights == "samples" else 1.0 for client in range(4)]
        mean = sum(omega[client] * run.own(client) for client in range(4)) / 4
        torch.testing.assert_close(run.c, mean, rtol=0, atol=1e-12)
        assert all(torch.equal(run.own(client), value) for client, value in kept.items())


@pytest.mark.parametrize(("sizes", "client_weights"), [((6, 6, 6), "samples"), ((3, 5, 11), "uniform")])
def test_with_everybody_and_one_step_it_is_a_gradient_step(sizes: Sequence[int], client_weights: str) -> None:
    run = scaffold(clients(sizes), lr=0.1, client_weights=client_weights)
    for _ in range(4):
        wanted = run.w - 0.1 * sum(run.gradient(client, run.w) for client in range(3)) / 3
        run.play([0, 1, 2], steps=1)
        torch.testing.assert_close(run.w, wanted, rtol=0, atol=1e-12)


def test_the_server_goes_only_part_of_the_way_with_a_smaller_rate() -> None:
    whole, part = scaffold(clients(), lr=0.05), scaffold(clients(), lr=0.05, server_lr=0.25)
    whole.play([0, 2], steps=3)
    part.play([0, 2], steps=3)
    torch.testing.assert_close(part.w, 0.25 * whole.w)  # both started at zero
    torch.testing.assert_close(part.c, whole.c)


@pytest.mark.parametrize(("keys", "lr"), [({}, 0.05), ({"denominator_lr": "initial"}, 0.2), ({"mode": "code"}, 0.2)])
def test_the_variate_is_the_displacement_over_the_chosen_rate(keys: dict[str, object], lr: float) -> None:
    run = scaffold(clients(), lr=0.05, initial_lr=0.2, **keys)
    upload = run.play([1], steps=3)[0]
    torch.testing.assert_close(run.own(1), (0 - upload.weights.params["w"]) / (3 * lr))


def test_the_released_code_measures_from_the_model_before_refinement() -> None:
    for mode in ("paper", "code"):
        run = scaffold(clients(), lr=0.05, mode=mode)
        run.play([0, 1, 2, 3], steps=2)
        fused, own, c = run.w.clone(), run.own(0).clone(), run.c.clone()
        refined = fused + 1.0
        run.server = replace(run.server, weights=Weights({"w": refined}, {}))
        upload = run.play([0], steps=2)[0]
        origin = fused if mode == "code" else refined
        torch.testing.assert_close(run.own(0), own - c + (origin - upload.weights.params["w"]) / (2 * 0.05))
        # The next round's reference is the new fused model.
        assert ("fused" in run.server.method) == (mode == "code")
        assert mode == "paper" or torch.equal(run.server.method["fused"]["w"], run.w)


def test_a_client_that_takes_no_step_sends_finite_numbers() -> None:
    run = scaffold(clients(), lr=0.05)
    upload = run.play([0], steps=0)[0]
    assert torch.equal(upload.weights.params["w"], torch.zeros(3, dtype=torch.float64))
    assert not upload.payload[Kind.CONTROL_VARIATE]["w"].any()


def test_the_correction_is_inside_the_clip_and_the_variates_leave_the_inputs_alone() -> None:
    settings = ScaffoldSettings()
    objective = ScaffoldObjective(settings)
    w, c, own = (torch.tensor([value], dtype=torch.float64) for value in (2.0, 30.0, 10.0))
    received = model_payload(Weights({"w": w}, {})).also(Kind.CONTROL_VARIATE, {"w": c})
    received = received.also(Kind.SCALARS, scalars(omega=1.5))
    task = LocalTask(0, 0, 1, 0.1, 0.1, 1)
    extras = objective.prepare(received, {"control": {"w": own}}, task)
    grads, norm = SGD(0.1, clip_norm=10.0).clip(objective.adjust([w], {"w": w}, extras))
    assert norm is not None
    assert float(norm) == 2 + 30 / 1.5 - 10
    assert float(grads[0]) == pytest.approx(10, rel=1e-6)
    trained = Trained(Weights({"w": w - 1}, {}), 1, torch.zeros(1), None, torch.zeros(1, dtype=torch.int64))
    objective.finish(received, {"control": {"w": own}}, trained, task)
    assert (float(w), float(c), float(own)) == (2.0, 30.0, 10.0)


def test_modes_fill_only_what_is_not_given() -> None:
    code = ScaffoldSettings(mode="code")
    assert (code.denominator_lr, code.steps, code.displacement_from) == ("initial", "fixed", "fused")
    assert ScaffoldSettings(mode="code", steps="own").steps == "own"
    assert ScaffoldSettings().displacement_from == "broadcast"
    for wrong in ({"mode": "release"}, {"server_lr": 0.0}, {"mu": 1.0}):
        with pytest.raises(ValidationError):
            ScaffoldSettings(**wrong)


def test_the_released_step_count() -> None:
    assert fixed_steps(FederationInfo((500,) * 100, 10, (3, 32, 32)), batch_size=50, epochs=5) == 50
    assert fixed_steps(FederationInfo((3, 8), 2, (1,)), batch_size=2, epochs=1) == 3


def test_the_class_weighted_head_is_a_choice_of_the_fusion() -> None:
    settings = ScaffoldSettings(server_lr=0.5)
    fusion = ScaffoldFusion(settings, FusionSettings(head="class-weighted"))
    assert fusion.needs_label_counts
    assert not ScaffoldFusion(settings).needs_label_counts
    info = FederationInfo((4, 4), 2, (1,), head="head")
    server = fusion.start(Weights({"head.weight": torch.zeros(2, 1), "body": torch.zeros(1)}, {}), info)
    uploads = []
    for client, (value, counts) in enumerate([(1.0, [3, 0]), (5.0, [1, 0])]):
        sent = model_payload(Weights({"head.weight": torch.full((2, 1), value), "body": torch.tensor([value])}, {}))
        sent = sent.also(Kind.CONTROL_VARIATE, {"head.weight": torch.ones(2, 1), "body": torch.ones(1)})
        uploads.append(Upload(client, sent, 4, 1, torch.tensor(counts)))
    after: ServerState = fusion.fuse(server, uploads, RoundContext(0, info))
    # Row 0 is 3/4 * 1 + 1/4 * 5 = 2, row 1 is nobody's and stays; the server goes half of the way; c as ever.
    assert after.weights.params["head.weight"].flatten().tolist() == [1.0, 0.0]
    assert after.weights.params["body"].tolist() == [1.5]
    assert after.method["control"]["head.weight"].flatten().tolist() == [1.0, 1.0]

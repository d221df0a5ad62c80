"""FedDyn: two rounds by hand, its fixed points on quadratics, its invariants, what travels and what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from test_scaffold import Data, Run, Squares, clients, cohorts, fedavg, optimum
from torch import Tensor

from fedstill.conformance.replays.sites import client_turn
from fedstill.conformance.replays.tiny import TinyCNN
from fedstill.federation import LAST_PARAMS
from fedstill.methods.averaging import FusionSettings
from fedstill.methods.base import FederationInfo, LocalTask, RoundContext, Upload
from fedstill.methods.feddyn import FedDynFusion, FedDynObjective, FedDynSettings
from fedstill.models import Stateless, parameter_count, split_state
from fedstill.payload import model_payload
from fedstill.training import SGD
from fedstill.weights import Weights
from small import play, same_state, small, untimed
from stopping import Stop, assert_goes_on_to_the_same_bits


class SquaresFedDyn(Squares, FedDynObjective):
    pass


def feddyn(data: Data, lr: float, **keys: object) -> Run:
    return Run(SquaresFedDyn(), FedDynFusion(FedDynSettings(**keys)), data, lr)


def own(run: Run, client: int) -> Tensor:
    return run.states[client].get("h", {"w": torch.zeros_like(run.w)})["w"]


def mean_h(run: Run) -> Tensor:
    return torch.stack([own(run, client) for client in range(len(run.data))]).mean(0)


def sent_from(run: Run, w: Tensor) -> None:
    """Let the next round start from another model, as after a refinement."""
    run.server = replace(run.server, weights=Weights({"w": w}, {}))


def test_two_rounds_by_hand() -> None:
    # f_0 = (w - 1)^2 / 2 with one sample, f_1 = (w - 3)^2 / 2 with three: omega = 1/2 and 3/2, alpha_k = 3/2 and 1/2.
    ones = torch.ones(3, 1, dtype=torch.float64)
    run = feddyn([(ones[:1], ones[:1, 0]), (ones, 3 * ones[:, 0])], lr=0.5, alpha=0.75)
    uploads = run.play([0, 1], steps=2)
    # Client 0 goes 0, 0.5, then its gradient is -0.5 + 1.5 * 0.5; client 1 goes 0, 1.5, then -1.5 + 0.5 * 1.5.
    assert [float(upload.weights.params["w"]) for upload in uploads] == [0.375, 1.875]
    assert [float(own(run, client)) for client in (0, 1)] == [0.375, 1.875]
    assert float(run.server.method["h"]["w"]) == 1.125
    assert float(run.w) == 1.125 + 1.125  # the uniform mean, whatever the sizes, and h
    # Round 1, client 0 alone: 1.25 from its loss, 1.5 (0.375 - 2.25) from the linear and 1.5 * 2.25 from the
    # quadratic term.
    uploads = run.play([0], steps=1)
    assert float(uploads[0].weights.params["w"]) == 2.25 - 0.5 * 1.8125 == 1.34375
    assert [float(own(run, client)) for client in (0, 1)] == [0.375 - 0.90625, 1.875]
    assert float(run.server.method["h"]["w"]) == 1.125 - 0.5 * 0.90625 == (-0.53125 + 1.875) / 2
    assert float(run.w) == 1.34375 + 0.671875


@pytest.mark.parametrize(
    ("client_weights", "alpha", "lr", "rounds"),
    [
        ("samples", 0.1, 0.3, 500),
        ("samples", 1.0, 0.1, 160),
        ("samples", 5.0, 0.05, 120),
        ("uniform", 1.0, 0.1, 160),
        ("uniform", 5.0, 0.05, 120),
    ],
)
def test_the_fixed_point_is_the_optimum_that_the_client_weights_name(
    client_weights: str, alpha: float, lr: float, rounds: int
) -> None:
    data = clients((6, 10, 14, 30), width=2)
    wanted, other = optimum(data, client_weights == "samples"), optimum(data, client_weights != "samples")
    assert torch.dist(wanted, other) > 1
    run = feddyn(data, lr, alpha=alpha, client_weights=client_weights)
    for cohort in cohorts(rounds, partial=True):
        run.play(cohort, steps=4)
    torch.testing.assert_close(run.w, wanted, rtol=0, atol=1e-5)
    assert float(mean_h(run).norm()) < 1e-5
    for client in range(4):  # at the fixed point alpha_k h_k is minus the client's gradient
        omega = run.info.omega(client) if client_weights == "samples" else 1.0
        torch.testing.assert_close(own(run, client) * alpha / omega, -run.gradient(client, wanted), rtol=0, atol=1e-4)


def test_fedavg_ends_elsewhere_on_the_same_clients() -> None:
    data = clients((6, 10, 14, 30), width=2)
    run = fedavg(data, lr=0.1)
    for _ in range(100):
        run.play([0, 1, 2, 3], steps=4)
    before = run.w.clone()
    run.play([0, 1, 2, 3], steps=4)
    torch.testing.assert_close(run.w, before)  # it has come to rest
    assert torch.dist(run.w, optimum(data, by_samples=True)) > 0.01


@pytest.mark.parametrize("cohort", [[2], [0, 3], [0, 1, 2, 3]])
def test_after_one_round_the_cloud_overshoots_the_mean_whatever_alpha(cohort: list[int]) -> None:
    first = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for alpha in (1e-6, 0.01, 1.0):
        run = feddyn(clients(), lr=0.05, alpha=alpha)
        sent_from(run, first)
        mean = torch.stack([upload.weights.params["w"] for upload in run.play(cohort, steps=3)]).mean(0)
        torch.testing.assert_close(run.w, mean + len(cohort) / 4 * (mean - first), rtol=0, atol=1e-12)


@pytest.mark.parametrize("client_weights", ["samples", "uniform"])
def test_cloud_minus_mean_is_the_mean_of_all_h_and_absentees_keep_theirs(client_weights: str) -> None:
    run = feddyn(clients(), lr=0.05, alpha=0.5, client_weights=client_weights)
    stream = torch.Generator().manual_seed(3)
    for cohort in cohorts(12, partial=True):
        # Whatever model was sent down, refined ones too.
        sent_from(run, run.w + torch.randn(3, generator=stream, dtype=torch.float64))
        kept = {client: own(run, client).clone() for client in range(4) if client not in cohort}
        mean = torch.stack([upload.weights.params["w"] for upload in run.play(cohort, steps=3)]).mean(0)
        torch.testing.assert_close(run.w - mean, mean_h(run), rtol=0, atol=1e-12)
        assert all(torch.equal(own(run, client), value) for client, value in kept.items())


def test_after_a_refinement_the_displacement_is_measured_from_the_refined_model() -> None:
    run = feddyn(clients(), lr=0.05, alpha=0.5)
    run.play([0, 1, 2, 3], steps=2)
    h_0, refined = own(run, 0).clone(), run.w + 1.0
    sent_from(run, refined)
    upload = run.play([0], steps=2)[0]
    torch.testing.assert_close(own(run, 0), h_0 + upload.weights.params["w"] - refined, rtol=0, atol=1e-12)


def test_the_linear_term_is_inside_the_clip_and_the_quadratic_one_outside() -> None:
    # f = (w - 1)^2 / 2 at w_t = 2 with h_k = 30 and alpha = 1: 1 + 28 is clipped to 1, then comes (1 + 0.5) * 2.
    ones = torch.ones(1, 1, dtype=torch.float64)
    run = feddyn([(ones, ones[:, 0])], lr=0.1, alpha=1.0)
    sent_from(run, 2 * ones[0])
    turn = client_turn(
        run.model, run.objective, run.fusion, run.server, run.info, LocalTask(0, 0, 1, 0.1, 0.1, 1),
        (ones, ones[:, 0]), [torch.arange(1)], SGD(0.1, weight_decay=0.5, clip_norm=1.0), {"h": {"w": 30 * ones[0]}},
    )  # fmt: skip
    assert turn.trained.grad_norms is not None
    assert float(turn.trained.grad_norms) == 29
    assert float(turn.upload.weights.params["w"]) == pytest.approx(2 - 0.1 * (1 + 3), rel=1e-7)


def test_the_model_travels_each_way_and_one_number_down() -> None:
    module = TinyCNN(1, 3, 48, 5, 3, norm=True)
    p, info = 4 * parameter_count(module), FederationInfo((4, 12), 3, (1, 8, 8))
    fusion = FedDynFusion(FedDynSettings(alpha=0.3))
    server = fusion.start(Weights(*split_state(module)), info)
    data = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    turn = client_turn(
        Stateless(module), FedDynObjective(), fusion, server, info, LocalTask(0, 0, 4, 0.1, 0.1, 1),
        data, [torch.arange(4)], SGD(0.1), {},
    )  # fmt: skip
    sizes = {"weights": p, "buffers": 4 * 6 + 8}
    assert turn.received.bytes_by_kind() == {**sizes, "scalars": 8}
    assert turn.upload.payload.bytes_by_kind() == sizes
    assert turn.state.keys() == {"h"}
    assert turn.state["h"].keys() == server.weights.params.keys()  # not of the buffers
    assert turn.received.scalar("alpha") == pytest.approx(0.3 / (4 / 8))
    uniform = FedDynFusion(FedDynSettings(alpha=0.3, client_weights="uniform"))
    assert uniform.broadcast(server, 0, info).scalar("alpha") == 0.3


def test_k_counts_the_clients_of_the_architecture() -> None:
    info = FederationInfo((1, 50, 3), 2, (1,), clients=(0, 2), architectures=2)
    fusion = FedDynFusion(FedDynSettings(alpha=0.75))
    server = fusion.start(Weights({"w": torch.tensor([1.0])}, {}), info)
    assert [fusion.broadcast(server, client, info).scalar("alpha") for client in (0, 2)] == [1.5, 0.5]
    upload = Upload(2, model_payload(Weights({"w": torch.tensor([5.0])}, {})), 3, 1)
    after = fusion.fuse(server, [upload], RoundContext(0, info))
    assert after.method["h"]["w"].tolist() == [2.0]  # (5 - 1) / 2
    assert after.weights.params["w"].tolist() == [7.0]


def test_the_class_weighted_head_leaves_the_rows_of_absent_classes_as_they_were_sent() -> None:
    info = FederationInfo((4, 4), 2, (1,), head="head")
    fusion = FedDynFusion(FedDynSettings(), FusionSettings(head="class-weighted"))
    assert fusion.needs_label_counts
    assert not FedDynFusion(FedDynSettings()).needs_label_counts
    first = {"head.weight": torch.full((2, 1), 1.0), "head.bias": torch.ones(2), "body": torch.ones(1)}
    server = fusion.start(Weights(first, {}), info)
    uploads = [
        Upload(
            client, model_payload(Weights({k: torch.full_like(v, value) for k, v in first.items()}, {})), 4, 1, counts
        )
        for client, value, counts in ((0, 1.0, torch.tensor([3, 0])), (1, 5.0, torch.tensor([1, 0])))
    ]
    after = fusion.fuse(server, uploads, RoundContext(0, info))
    # h = ((1 - 1) + (5 - 1)) / 2 = 2 everywhere; row 0 is 3/4 * 1 + 1/4 * 5 + 2, row 1 is nobody's.
    assert after.weights.params["head.weight"].flatten().tolist() == [4.0, 1.0]
    assert after.weights.params["head.bias"].tolist() == [4.0, 1.0]
    assert after.weights.params["body"].tolist() == [5.0]
    assert all(value.unique().tolist() == [2.0] for value in after.method["h"].values())
    assert first["head.weight"].flatten().tolist() == [1.0, 1.0]


def test_settings() -> None:
    assert FedDynSettings().alpha == 0.01
    for wrong in ({"alpha": 0.0}, {"alpha": -1.0}, {"client_weights": "all"}, {"mode": "code"}):
        with pytest.raises(ValidationError):
            FedDynSettings(**wrong)


# Whole federations

UNEQUAL = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5"]
FEDDYN = ["method=feddyn", "feddyn.alpha=0.1", "data.clients=5", *UNEQUAL]


def test_fused_is_the_cloud_model_and_sel_and_all_are_uniform_means() -> None:
    keys = [*FEDDYN, 'eval.models=["sel", "all"]', "train.participation=0.4", "train.rounds=2"]
    federation, state, records = play(*keys)
    assert len(set(federation.info.samples)) > 1
    assert {"fused", "sel", "all"} <= records[-1].keys()
    absent = [client for client in range(5) if client not in state.clients]
    assert absent
    last = [state.clients[c][LAST_PARAMS] if c in state.clients else federation.initial.params for c in range(5)]
    cloud, h = state.server.weights.params, state.server.method["h"]
    everyone = federation.averages(state, None)[0].params
    cohort = [state.clients[client][LAST_PARAMS] for client in records[-1]["cohort"]]
    for name, value in cloud.items():
        torch.testing.assert_close(everyone[name], torch.stack([one[name] for one in last]).mean(0))
        torch.testing.assert_close(value, torch.stack([one[name] for one in cohort]).mean(0) + h[name])
        kept = [state.clients[c]["h"][name] if c in state.clients else torch.zeros_like(value) for c in range(5)]
        torch.testing.assert_close(h[name], torch.stack(kept).mean(0))
    assert (
        records[-1]["fused"]["test"]["loss"] != records[-1]["sel"]["test"]["loss"] != records[-1]["all"]["test"]["loss"]
    )


@pytest.mark.parametrize("method", ["feddyn", "feddyn+fedftg"])
def test_threads_give_the_bits_of_serial(method: str) -> None:
    keys = [*FEDDYN, f"method={method}", "train.participation=0.6", "train.rounds=3"]
    _, serial, records = play(*keys)
    _, state, found = play(*keys, "execution.executor=threads", "execution.workers=2")
    assert same_state(state, serial)
    assert untimed(found) == untimed(records)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = small(*FEDDYN, "train.participation=0.6", "train.rounds=4")
    assert_goes_on_to_the_same_bits(config, tmp_path, Stop(after=2))

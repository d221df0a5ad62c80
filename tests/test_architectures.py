"""Federations of several architectures: who is averaged with whom, who teaches whom, what is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedstill.build import build
from fedstill.config import Config, load_config, to_toml
from fedstill.errors import InputError
from fedstill.evaluation import evaluate
from fedstill.federation import Federation, FederationState
from fedstill.weights import weighted_mean
from small import SMALL, play, same_state, same_weights, untimed

TWO: list[dict[str, Any]] = [{"name": "mlp", "hidden": [16], "clients": [0, 3]}, {"name": "cnn", "width": 4}]


def several(*overrides: str, models: list[dict[str, Any]] | None = None) -> Config:
    """Return the small configuration with clients 0 and 3 on a perceptron and 1 and 2 on a CNN."""
    return load_config(None, overrides, {**SMALL, "model": models or TWO})


def run(config: Config) -> tuple[Federation, FederationState, list[dict[str, Any]]]:
    """Run a federation in memory."""
    federation, _ = build(config)
    state, records = federation.start(), []
    for _ in range(config.train.rounds):
        state, record = federation.run_round(state)
        records.append(record)
    federation.executor.close()
    return federation, state, records


def test_a_client_has_the_model_that_names_it_and_the_others_take_turns() -> None:
    federation, _ = build(several())
    assert [one.info.members for one in federation.architectures] == [(0, 3), (1, 2)]
    three = [{"name": "mlp", "hidden": [width]} for width in (8, 16, 24)]
    federation, _ = build(several("data.clients=7", models=three))
    assert [one.info.members for one in federation.architectures] == [(0, 3, 6), (1, 4), (2, 5)]
    assert [one.name for one in federation.architectures] == ["0-mlp", "1-mlp", "2-mlp"]


def test_an_architecture_averages_its_own_clients_and_nobody_else() -> None:
    federation, _ = build(several())
    state = federation.start()
    works = [federation.work(state, client) for client in range(4)]
    results = federation.train(0, works)
    after, _ = federation.run_round(state)
    for place, members in enumerate([(0, 3), (1, 2)]):
        own = [result.payload.weights() for result in results if result.client in members]
        samples = [float(federation.info.samples[client]) for client in members]
        assert same_weights(after.models[place].server.weights, weighted_mean(own, samples))
    federation.executor.close()


def test_a_group_by_itself_is_the_federation_of_its_clients() -> None:
    # SCAFFOLD's K and omega are the group's, so that c = (1/K) sum omega_k c_k holds in each.
    keys = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5"]
    config = several("method=scaffold", "train.participation=0.5", "train.rounds=3", *keys)
    federation, state, _ = run(config)
    for model, architecture in zip(state.models, federation.architectures, strict=True):
        info = architecture.info
        for name, server in model.server.method["control"].items():
            own = [
                info.omega(client) * state.clients[client]["control"][name]
                for client in info.members
                if client in state.clients
            ]
            total = torch.stack(own).sum(0) if own else torch.zeros_like(server)
            torch.testing.assert_close(server, total / info.size, rtol=1e-4, atol=1e-6)


def test_a_group_without_anyone_in_the_cohort_keeps_its_model() -> None:
    federation, _ = build(several("train.participation=0.25"))
    before = federation.start()
    after, record = federation.run_round(before)
    federation.executor.close()
    cohort: Any = record["cohort"]
    moved = federation.architecture_of[cohort[0]]
    assert same_weights(after.models[1 - moved].server.weights, before.models[1 - moved].server.weights)
    assert not same_weights(after.models[moved].server.weights, before.models[moved].server.weights)


@pytest.mark.parametrize("refinement", ["fedftg"])
def test_every_architecture_learns_from_all_teachers(refinement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = several(f"method=fedavg+{refinement}", "train.rounds=1")
    federation, _ = build(config)
    seen: list[tuple[int, int]] = []
    original = type(federation.method.refinements[0]).refine

    def spy(self: Any, model: Any, student: Any, teachers: Any, state: Any, context: Any) -> Any:
        seen.append((len(teachers), len(student.params)))
        x = federation.trainer.samples.x[:3]
        logits = teachers.logits(x)
        assert logits.shape == (4, 3, 10)
        assert all(torch.equal(logits[place], teachers.logits_of(place, x)) for place in range(4))
        assert teachers.counts.sum(1).tolist() == [federation.info.samples[client] for client in (0, 3, 1, 2)]
        return original(self, model, student, teachers, state, context)

    monkeypatch.setattr(type(federation.method.refinements[0]), "refine", spy)
    _, record = federation.run_round(federation.start())
    federation.executor.close()
    found: Any = record
    assert [teachers for teachers, _ in seen] == [4, 4]
    assert seen[0][1] != seen[1][1]
    assert found["refined"]["by_model"].keys() == {"mlp", "cnn"}
    for name in ("mlp", "cnn"):
        assert found["refined"]["by_model"][name]["test"] != found["fused"]["by_model"][name]["test"]


def test_the_accuracy_is_the_mean_over_clients_of_their_model() -> None:
    models = [{"name": "mlp", "hidden": [16], "clients": [0, 2, 3]}, {"name": "cnn", "width": 4}]
    federation, state, records = run(several(models=models))
    test = federation.evaluation.sets["test"]
    scores = [
        evaluate(one.model, model.server.weights, test, 10, 100).accuracy
        for one, model in zip(federation.architectures, state.models, strict=True)
    ]
    assert records[-1]["fused"]["test"]["accuracy"] == pytest.approx((3 * scores[0] + scores[1]) / 4)
    assert [records[-1]["fused"]["by_model"][name]["test"]["accuracy"] for name in ("mlp", "cnn")] == scores


def test_threads_give_the_bits_of_serial() -> None:
    keys = ["method=scaffold+fedftg", "train.participation=0.75"]
    _, serial, records = run(several(*keys))
    _, threads, found = run(several(*keys, "execution.executor=threads", "execution.workers=2"))
    assert same_state(threads, serial)
    assert untimed(found) == untimed(records)


def test_the_configuration_survives_its_own_toml(tmp_path: Any) -> None:
    config = several("model.1.width=6")
    assert config.model[1].width == 6
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config
    file.write_text(to_toml(config, comments=True))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("overrides", "models", "says"),
    [
        ((), [{"name": "mlp", "clients": [0, 1]}, {"name": "cnn", "clients": [1, 2, 3]}], "client 1 stands in more"),
        ((), [{"name": "mlp", "clients": [0, 9]}, {"name": "cnn"}], "there is no client 9, they are 0 to 3"),
        ((), [{"name": "mlp", "clients": [0]}, {"name": "cnn", "clients": [1, 2]}], "client 3 has no model"),
        ((), [{"name": "mlp"}] * 5, "no client is left for this model; there are 4 clients"),
        (("model.width=3",), TWO, r"there are 2 \[\[model\]\] tables; say which one, model.0 to model.1"),
        ((), [{"name": "mlp"}, {"name": "cnn", "widht": 3}], "unknown key 'model.widht', did you mean 'model.width'"),
        (
            (),
            [{"name": "mlp"}, {"name": "mcmahan-cnn"}, {"name": "resnet18"}, {"name": "feddyn-cnn"}],
            "at least 16x16",
        ),
    ],
)
def test_wrong_models_are_refused(overrides: tuple[str, ...], models: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(several(*overrides, models=models))


# The models beside the fused one


def test_sel_and_all_by_hand() -> None:
    keys = ["train.participation=0.5", "train.rounds=3", "data.partition=dirichlet-per-class", "data.beta=1.0",
            "data.min_size=5", 'eval.models=["sel","all"]']  # fmt: skip
    federation, _ = build(load_config(None, keys, dict(SMALL)))
    state, last = federation.start(), [federation.initial] * 4
    for _ in range(3):
        cohort = federation.sample_cohort(state.round)
        results = federation.train(state.round, [federation.work(state, client) for client in cohort])
        for result in results:
            last[result.client] = result.payload.weights()
        state, record = federation.run_round(state)
        sizes = [float(size) for size in federation.info.samples]
        everyone = weighted_mean(last, sizes)
        found: Any = record
        assert found["sel"] == found["fused"]  # FedAvg's fused model is the cohort's mean
        assert same_weights(federation.averages(state, None)[0], everyone)
        assert (
            found["all"]["test"]["accuracy"]
            == evaluate(federation.model, everyone, federation.evaluation.sets["test"], 10, 100).accuracy
        )
    federation.executor.close()


def test_measuring_more_models_changes_nothing_else() -> None:
    _, plain, _ = play("method=scaffold")
    _, watched, _ = play("method=scaffold", 'eval.models=["sel","all"]')
    assert same_weights(plain.server.weights, watched.server.weights)

"""Whole federations on real digits: what must be equal, what is counted, what is refused, what is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedstill.build import build
from fedstill.client import LocalTrainer, Site
from fedstill.data.dataset import Samples
from fedstill.errors import InputError, RunError
from fedstill.evaluation import Score, by_label_mix, evaluate
from fedstill.federation import Clock, Federation, round_half_up
from fedstill.methods.base import LocalTask, RoundContext
from fedstill.methods.fedavg import FedAvgObjective
from fedstill.models import Stateless, split_state
from fedstill.models.randomness import random_layers
from fedstill.payload import Kind, Payload
from fedstill.training import Trained
from fedstill.weights import State, Weights
from small import flat, play, same_state, same_weights, small, untimed

CNN = ["model.name=cnn", "model.width=4"]
SKEWED = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5"]


# Executors


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold", "fedavg+fedftg", "scaffold+fedftg"])
def test_threads_give_the_bits_of_serial(method: str) -> None:
    keys = [f"method={method}", "fedprox.mu=0.1", "train.participation=0.75", *SKEWED]
    _, serial, records = play(*keys)
    for workers in (2, 3):
        federation, state, found = play(*keys, "execution.executor=threads", f"execution.workers={workers}")
        assert type(federation.executor).__name__ == "ThreadExecutor"
        assert same_state(state, serial)
        assert untimed(found) == untimed(records)


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_threads_give_the_bits_of_serial_for_a_cnn_with_augmentation(norm: str) -> None:
    keys = [*CNN, f"model.norm={norm}", "method=scaffold+fedftg", "data.augment=flip-crop", "fedftg.iterations=1"]
    _, serial, _ = play(*keys, rounds=1)
    _, state, _ = play(*keys, "execution.executor=threads", "execution.workers=2", rounds=1)
    assert same_state(state, serial)


def test_auto_is_made_definite_before_round_0() -> None:
    federation, _ = build(small("execution.executor=auto", "execution.device=auto"))
    execution = federation.config.execution
    assert execution.device in ("cpu", "cuda")
    assert execution.executor == ("threads" if execution.device == "cpu" else "vectorized")
    assert execution.workers is not None
    federation.executor.close()


# One seed, one federation


def spied(monkeypatch: pytest.MonkeyPatch, *keys: str) -> tuple[Federation, list[list[int]], dict[Any, list[Tensor]]]:
    """Run and return the federation, its cohorts, and the batches of each round and client."""
    orders: dict[Any, list[Tensor]] = {}
    original = Site.order

    def spy(self: Site) -> Iterator[Tensor]:
        for batch in original(self):
            orders.setdefault((self.task.round, self.task.client), []).append(batch)
            yield batch

    monkeypatch.setattr(Site, "order", spy)
    federation, _, records = play(*keys)
    monkeypatch.undo()
    return federation, [record["cohort"] for record in records], orders  # type: ignore[misc]


def test_methods_of_one_seed_share_partition_weights_cohorts_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["data.clients=6", "train.participation=0.5", *SKEWED]
    first, cohorts, orders = spied(monkeypatch, "method=fedavg", *keys)
    assert len(orders) == 6
    assert any(len(batches) > 1 for batches in orders.values())
    for method in ("fedprox", "scaffold", "scaffold+fedftg"):
        other, its_cohorts, its_orders = spied(
            monkeypatch, f"method={method}", "execution.executor=threads", "execution.workers=2", *keys
        )
        assert other.partition.fingerprint == first.partition.fingerprint
        assert same_weights(other.initial, first.initial)
        assert its_cohorts == cohorts
        assert its_orders.keys() == orders.keys()
        for key, batches in orders.items():
            assert len(batches) == len(its_orders[key])
            assert all(torch.equal(one, two) for one, two in zip(batches, its_orders[key], strict=True))


def test_the_two_seeds_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["data.clients=6", "train.participation=0.5"]
    base, cohorts, orders = spied(monkeypatch, *keys)
    data, data_cohorts, data_orders = spied(monkeypatch, *keys, "seed.data=1")
    train, train_cohorts, train_orders = spied(monkeypatch, *keys, "seed.train=1")
    assert data.partition.fingerprint != base.partition.fingerprint
    assert same_weights(data.initial, base.initial)
    assert data_cohorts == cohorts
    assert all(torch.equal(data_orders[key][0], orders[key][0]) for key in orders)
    assert train.partition.fingerprint == base.partition.fingerprint
    assert not same_weights(train.initial, base.initial)
    assert train_cohorts != cohorts
    shared = orders.keys() & train_orders.keys()
    assert shared
    assert not all(torch.equal(train_orders[key][0], orders[key][0]) for key in shared)


def test_a_run_is_its_seeds() -> None:
    keys = ["method=scaffold+fedftg", "train.participation=0.5"]
    _, first, records = play(*keys)
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 - a global seed must not matter
    _, again, same = play(*keys)
    assert same_state(first, again)
    assert untimed(records) == untimed(same)
    _, other, _ = play(*keys, "seed.train=1")
    assert not same_state(first, other)


# Cohorts


@pytest.mark.parametrize(
    ("clients", "part", "size"), [(10, 1.0, 10), (10, 0.25, 3), (10, 0.24, 2), (10, 0.01, 1), (7, 0.5, 4)]
)
def test_a_fixed_cohort_has_its_share_of_the_clients(clients: int, part: float, size: int) -> None:
    federation, _ = build(small(f"data.clients={clients}", f"train.participation={part}"))
    cohorts = [federation.sample_cohort(round) for round in range(40)]
    assert all(cohort == sorted(set(cohort)) and len(cohort) == size for cohort in cohorts)
    assert all(0 <= client < clients for cohort in cohorts for client in cohort)
    if size < clients:
        assert len({tuple(cohort) for cohort in cohorts}) > 3
        assert len(set().union(*cohorts)) > clients / 2


def test_a_bernoulli_cohort_draws_each_client_by_itself_and_is_never_empty() -> None:
    federation, _ = build(small("data.clients=10", "train.participation=0.3", "train.sampling=bernoulli"))
    cohorts = [federation.sample_cohort(round) for round in range(400)]
    sizes = [len(cohort) for cohort in cohorts]
    assert min(sizes) >= 1
    assert len(set(sizes)) > 4
    mean = 10 * 0.3 / (1 - 0.7**10)  # of a binomial that is not 0
    assert abs(np.mean(sizes) - mean) < 3 * np.sqrt(10 * 0.3 * 0.7 / 400)
    assert cohorts == [federation.sample_cohort(round) for round in range(400)]


def test_a_half_goes_up() -> None:
    assert [round_half_up(value) for value in (0.5, 1.5, 2.5, 0.1 * 25, 2.4999)] == [1, 2, 3, 3, 2]


# Methods that coincide


@pytest.mark.parametrize("model", [["model.hidden=[16]"], CNN])
def test_methods_that_coincide_with_fedavg(model: list[str]) -> None:
    _, fedavg, _ = play(*model)
    weights = fedavg.server.weights
    _, fedprox, _ = play("method=fedprox", "fedprox.mu=0", *model)
    assert same_weights(fedprox.server.weights, weights)
    _, idle, _ = play("method=fedavg+fedftg", "fedftg.iterations=0", *model)
    assert same_weights(idle.server.weights, weights)
    _, first, _ = play(*model, rounds=1)
    for mode in ("paper", "code"):
        _, scaffold, _ = play("method=scaffold", f"scaffold.mode={mode}", *model, rounds=1)
        assert same_weights(scaffold.server.weights, first.server.weights)
    _, prox, _ = play("method=fedprox", "fedprox.mu=0.5", *model)
    _, scaffold, _ = play("method=scaffold", *model)
    _, fedftg, _ = play("method=fedavg+fedftg", *model)
    for other in (prox, scaffold, fedftg):
        assert not same_weights(other.server.weights, weights)


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_scaffolds_control_variate_is_the_weighted_mean_of_the_clients(weights: str) -> None:
    keys = ["method=scaffold", f"scaffold.client_weights={weights}", "train.participation=0.5", *SKEWED]
    federation, state, _ = play(*keys, rounds=3)
    total = len(federation.info.samples)
    for name, value in state.server.method["control"].items():
        mean = sum(
            (federation.info.omega(client) if weights == "samples" else 1.0) * own["control"][name]
            for client, own in state.clients.items()
        )
        assert isinstance(mean, Tensor)
        torch.testing.assert_close(value, mean / total, rtol=1e-4, atol=1e-6)


# Bytes


def sent(records: list[Any], way: str) -> list[dict[str, int]]:
    return [record["bytes"][way] for record in records]


def test_bytes_are_those_of_the_table() -> None:
    size = 4 * ((64 * 16 + 16) + (16 * 10 + 10))
    clients, active = 4, 2
    keys = ["train.participation=0.5", "train.rounds=3", "model.hidden=[16]"]

    def of(method: str, *more: str) -> tuple[list[dict[str, int]], list[dict[str, int]], list[list[int]]]:
        _, _, records = play(f"method={method}", *keys, *more)
        return sent(records, "down"), sent(records, "up"), [record["cohort"] for record in records]  # type: ignore[misc]

    for method in ("fedavg", "fedprox"):
        down, up, _ = of(method)
        assert down == up == [{"weights": active * size}] * 3
    down, up, _ = of("scaffold")
    assert up == [{"weights": active * size, "control-variate": active * size}] * 3
    assert down == [{**up[0], "scalars": active * 8}] * 3
    down, up, cohorts = of("fedavg+fedftg")
    assert down == [{"weights": active * size}] * 3
    seen: set[int] = set()
    for record, cohort in zip(up, cohorts, strict=True):
        new = set(cohort) - seen
        seen |= new
        expected = {"weights": active * size} | ({"label-counts": len(new) * 10 * 4} if new else {})
        assert record == expected
    assert len(seen) < 6, "some client came twice, and was billed once"
    down, _, _ = of("scaffold+fedftg", "fedftg.mode=code")
    expected = {"weights": size, "control-variate": size, "reference-weights": size, "scalars": 8}
    assert down == [{kind: active * part for kind, part in expected.items()}] * 3
    down, _, _ = of("scaffold+fedftg", "fedftg.mode=paper")
    assert all("reference-weights" not in record for record in down)
    assert clients == 4


def test_bytes_of_batchnorm_buffers() -> None:
    federation, _, records = play(*CNN, "model.norm=bn", rounds=1)
    buffers = sum(value.numel() * value.element_size() for value in federation.initial.buffers.values())
    assert buffers > 0
    assert sent(records, "up")[0]["buffers"] == 4 * buffers


def test_the_class_weighted_head_is_billed_and_differs_in_the_head_alone() -> None:
    keys = [*SKEWED, "data.beta=0.1"]
    federation, mean, _ = play(*keys, rounds=1)
    _, weighted, records = play(*keys, "fusion.head=class-weighted", rounds=2)
    assert [record.get("label-counts", 0) for record in sent(records, "up")] == [4 * 10 * 4, 0]
    _, weighted, _ = play(*keys, "fusion.head=class-weighted", rounds=1)
    assert federation.info.head == "head"
    for name, value in mean.server.weights.params.items():
        assert torch.equal(value, weighted.server.weights.params[name]) != name.startswith("head.")
    assert weighted.label_counts.keys() == {0, 1, 2, 3}
    assert all(counts.sum() == federation.info.samples[client] for client, counts in weighted.label_counts.items())


def test_the_class_weighted_head_needs_a_head() -> None:
    keys = [f"model.name={__name__}:TwoHeads"]
    with pytest.raises(InputError, match=r"needs a linear head: name it with model\.head"):
        build(small(*keys, "fusion.head=class-weighted"))
    assert build(small(*keys))[0].info.head is None
    assert build(small(*keys, "fusion.head=class-weighted", "model.head=two"))[0].info.head == "two"
    with pytest.raises(InputError, match=r"model\.head: 'three' is not a linear layer"):
        build(small(*keys, "model.head=three"))


class TwoHeads(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.as_tensor(self.one(x) + self.two(x))


# Uploads


def damaged(change: str) -> Any:
    class Damaged(FedAvgObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, state = super().finish(received, state, trained, task)
            if task.client != 2:
                return payload, state
            params = dict(payload[Kind.WEIGHTS])
            if change == "nan":
                params["head.bias"] = params["head.bias"].clone().index_fill_(0, torch.tensor([3]), float("nan"))
            elif change == "shape":
                params["head.bias"] = params["head.bias"][:5]
            elif change == "dtype":
                params["head.bias"] = params["head.bias"].double()
            elif change == "missing":
                del params["head.bias"]
            elif change == "extra":
                params["tail.bias"] = params["head.bias"]
            elif change == "empty":
                return Payload(), state
            elif change == "control":
                return payload.also(Kind.CONTROL_VARIATE, {"head.bias": torch.zeros(1)}), state
            elif change == "counts":
                return payload.also(Kind.LABEL_COUNTS, {"counts": torch.tensor([-1] * 9 + [59])}), state
            return Payload({Kind.WEIGHTS: params}), state

    return Damaged()


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("nan", "weights 'head.bias' is not finite"),
        ("shape", r"'head.bias' is float32 \(5,\), expected float32 \(10,\)"),
        ("dtype", "expected float32"),
        ("missing", "weights lack 'head.bias'"),
        ("extra", "unknown tensor 'tail.bias'"),
        ("empty", "it holds no weights"),
        ("control", "control-variate, which was not asked for"),
        ("counts", "label-counts, which was not asked for"),
    ],
)
def test_a_malformed_upload_goes_no_further(change: str, says: str, executor: str) -> None:
    federation, _ = build(small(f"execution.executor={executor}"))
    federation.trainer.objective = damaged(change)
    state = federation.start()
    with pytest.raises(RunError, match=f"round 1, client 2: refused its upload: .*{says}") as caught:
        federation.run_round(state)
    assert caught.value.exit_code == 1
    assert same_weights(state.server.weights, federation.initial)
    federation.executor.close()


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([-1] * 9 + [59], "are not those of its 50 samples"),
        ([5] * 9 + [4], "are not those of its 50 samples"),
        ([50], r"expected int32 \(10,\)"),
    ],
)
def test_wrong_label_counts_go_no_further(counts: list[int], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, _ = build(small("fusion.head=class-weighted"))
    given = torch.tensor(counts, dtype=torch.int32)
    monkeypatch.setattr(LocalTrainer, "label_counts", lambda self, client: given)
    with pytest.raises(RunError, match=f"round 1, client 0: refused its upload: .*{says}"):
        federation.run_round(federation.start())
    federation.executor.close()


def test_a_scaffold_upload_without_its_control_variate_goes_no_further() -> None:
    federation, _ = build(small("method=scaffold"))
    federation.trainer.objective = FedAvgObjective()
    with pytest.raises(RunError, match="refused its upload: it holds no control-variate"):
        federation.run_round(federation.start())
    federation.executor.close()


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_training_that_turns_non_finite_names_round_client_and_loss(executor: str) -> None:
    keys = ["local.lr=1e18", "local.clip_norm=none", "data.clients=2", f"execution.executor={executor}"]
    with pytest.raises(
        RunError, match=r"round 1, client [01]: the training loss became (nan|inf) in local step \d"
    ) as e:
        play(*keys)
    assert "smaller local.lr" in str(e.value)
    assert "unless a key of the method's own" in str(e.value)


def test_a_model_that_turns_non_finite_in_the_last_step_is_named_with_its_loss() -> None:
    with pytest.raises(RunError, match=r"round 1, client 0: the weights became non-finite .* loss of 2\.\d+"):
        play("local.lr=1e30", "local.clip_norm=none", "local.steps=1", "local.weight_decay=1e10")


def test_a_refinement_that_turns_non_finite_is_named() -> None:
    with pytest.raises(RunError, match=r"round 1: fedftg made the global model non-finite.*fedftg\.lr_student"):
        play(
            "method=fedavg+fedftg", "fedftg.lr_student=1e30", "fedftg.weight_decay_student=1e10", "fedftg.inputs=noise"
        )


# What BatchNorm and few samples allow


def test_a_batch_of_one_is_refused_for_batchnorm_and_runs_with_groupnorm() -> None:
    keys = [*CNN, "data.train_samples=170", "data.clients=10"]  # 17 samples each: 16 and 1
    with pytest.raises(InputError, match=r"client 0 holds 17 samples.*BatchNorm would see a batch of one.*'gn'"):
        build(small(*keys, "model.norm=bn"))
    play(*keys, "model.norm=bn", "local.batch_size=15", rounds=1)
    play(*keys, "model.norm=gn", rounds=1)
    with pytest.raises(InputError, match="batch of one"):
        build(small(*CNN, "model.norm=bn", "local.batch_size=1"))


def test_clients_with_one_sample_run_and_are_noted() -> None:
    keys = [*CNN, "data.train_samples=5", "data.clients=5", "train.rounds=1"]
    federation, said = build(small(*keys, "method=scaffold+fedftg"))
    assert federation.info.samples == (1,) * 5
    assert any("hold a single sample" in line for line in said)
    federation.run_round(federation.start())
    with pytest.raises(InputError, match="client 0 holds 1 sample"):
        build(small(*keys, "model.norm=bn"))


def test_a_batch_larger_than_a_clients_data_runs_and_is_noted() -> None:
    federation, said = build(small("local.batch_size=64"))
    assert said == ["4 of 4 clients hold fewer samples than a batch of 64; their batches are what they have"]
    federation.run_round(federation.start())


def test_a_class_that_nobody_holds_runs_and_is_noted() -> None:
    for seed in range(20):
        federation, said = build(small("data.train_samples=16", f"seed.data={seed}", "method=fedavg+fedftg"))
        held = federation.partition.counts.sum(0) > 0
        if not held.all():
            break
    assert any("no client holds a sample of" in line for line in said)
    _, record = federation.run_round(federation.start())
    weighted = build(small("data.train_samples=16", f"seed.data={seed}", "fusion.head=class-weighted"))[0]
    state, _ = weighted.run_round(weighted.start())
    kept = torch.from_numpy(~held)
    before, after = weighted.initial.params["head.weight"], state.server.weights.params["head.weight"]
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[~kept], after[~kept])
    assert record["refined"]


def dropping(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))


def test_a_foreign_model_with_dropout_runs_serially_and_draws_from_streams() -> None:
    keys = [
        f"model.name={__name__}:dropping",
        "execution.executor=threads",
        "method=fedavg+fedftg",
        "train.participation=0.5",
    ]
    federation, said = build(small(*keys))
    assert federation.config.execution.executor == "serial"
    assert any("Dropout" in line and "one after another" in line for line in said)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    _, first, _ = play(*keys)
    assert torch.equal(torch.get_rng_state(), before), "the process's own stream is left alone"
    torch.manual_seed(2)
    _, again, _ = play(*keys)
    assert same_state(first, again)
    assert random_layers(federation.model.module) == ["Dropout"]
    assert random_layers(nn.MultiheadAttention(4, 1)) == []
    assert random_layers(nn.MultiheadAttention(4, 1, dropout=0.1)) == ["MultiheadAttention"]


# Evaluation


def test_evaluation_by_hand() -> None:
    module = nn.Linear(3, 3, bias=False)
    nn.init.eye_(module.weight)
    weights = Weights(*split_state(module))
    x = torch.eye(3)[[0, 0, 1, 2, 2]] * 5
    y = torch.tensor([0, 0, 1, 1, 0])
    score = evaluate(Stateless(module), weights, Samples(x, y), 4, batch_size=2)
    assert score.right.tolist() == [2, 1, 0, 0]
    assert score.seen.tolist() == [3, 2, 0, 0]
    assert score.accuracy == 3 / 5
    assert score.per_class == [2 / 3, 1 / 2, None, None]
    right, wrong = -np.log(np.e**5 / (np.e**5 + 2)), -np.log(1 / (np.e**5 + 2))
    assert score.loss == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-6)
    counts = [[3, 1, 0, 0], [0, 4, 4, 0], [0, 0, 1, 7]]
    assert by_label_mix(score, counts) == [pytest.approx((3 * 2 / 3 + 1 / 2) / 4), pytest.approx(1 / 2), None]


def test_nothing_to_evaluate_on_is_no_division_by_zero() -> None:
    empty = Score(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 0.0)
    assert empty.accuracy == 0.0
    assert empty.per_class == [None, None]


def test_accuracy_by_class_and_client_agrees_with_the_models_own_answers() -> None:
    keys = ["data.client_test=0.2", "data.client_validation=0.1", "data.server_validation=50", *SKEWED]
    federation, state, records = play(*keys, 'eval.on=["test","validation","clients"]', rounds=1)
    scores: Any = records[0]["fused"]
    weights = state.server.weights

    def right(samples: Samples) -> Tensor:
        logits = federation.model(weights.params, weights.buffers, samples.x, train=False)
        return logits.argmax(-1) == samples.y

    test = federation.evaluation.sets["test"]
    assert scores["test"]["accuracy"] == pytest.approx(right(test).double().mean().item())
    for label, accuracy in enumerate(scores["test"]["per_class"]):
        assert accuracy == pytest.approx(right(test)[test.y == label].double().mean().item())
    validation = federation.evaluation.sets["validation"]
    assert len(validation) == 50
    assert scores["validation"]["accuracy"] == pytest.approx(right(validation).double().mean().item())
    parts = federation.evaluation.clients
    assert parts is not None
    answers = [right(part) for part in parts]
    assert scores["clients"]["per_client"] == [pytest.approx(answer.double().mean().item()) for answer in answers]
    assert scores["clients"]["accuracy"] == pytest.approx(torch.cat(answers).double().mean().item())
    trained = sum(federation.info.samples)
    assert federation.held_out is not None
    decided_by = sum(len(part) for part in federation.held_out)
    assert trained + decided_by + sum(len(part) for part in parts) == 200
    assert len(scores["by_client_label_mix"]) == 4


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (['eval.on=["validation"]'], "data.server_validation is 0"),
        (['eval.on=["clients"]'], r"data\.client_test is 0 and data\.client_validation 0 "),
    ],
)
def test_evaluation_on_what_is_not_there_is_refused(keys: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(small(*keys))


def test_evaluation_on_nothing() -> None:
    _, _, records = play("eval.on=[]", "method=fedavg+fedftg")
    assert all(record["fused"] == record["refined"] == {} and "ensembles" not in record for record in records)


def test_evaluation_happens_when_it_is_due() -> None:
    keys = ["train.rounds=7", "eval.every=3", "method=fedavg+fedftg", "fedftg.iterations=1"]
    _, _, records = play(*keys, "eval.ensembles_every=2")
    assert [record["round"] for record in records if "fused" in record] == [1, 3, 6, 7]
    assert [record["round"] for record in records if "refined" in record] == [1, 3, 6, 7]
    assert [record["round"] for record in records if "ensembles" in record] == [1, 2, 4, 6, 7]
    _, _, records = play(*keys)
    assert [record["round"] for record in records if "ensembles" in record] == [1, 7]


def test_evaluation_does_not_change_the_run() -> None:
    keys = ["method=scaffold+fedftg", "train.participation=0.5"]
    _, state, _ = play(*keys)
    _, other, _ = play(*keys, "eval.on=[]", "eval.every=2")
    assert same_state(state, other)


@pytest.mark.parametrize("model", ['{name="mlp"}', '[{name="mlp"},{name="mlp",hidden=[7]}]'])
def test_what_refinement_starts_from_is_measured_where_the_ensembles_are(model: str) -> None:
    keys = ["method=fedavg+fedftg", f"model={model}", "data.partition=dirichlet-per-client"]
    _, _, (first, _) = play(*keys)
    assert first["ensembles"]["fused"] == pytest.approx(first["fused"]["test"]["accuracy"])  # on all test samples

    federation, state, records = play("eval.ensemble_samples=30")
    part = federation.evaluation.ensembles
    assert part is not None
    model_, weights = federation.model, state.server.weights
    right = model_(weights.params, weights.buffers, part.x, train=False).argmax(-1) == part.y
    assert len(part) == 30
    assert records[-1]["ensembles"]["fused"] == pytest.approx(float(right.float().mean()))
    assert records[-1]["ensembles"]["fused"] != records[-1]["fused"]["test"]["accuracy"]


def test_ensembles_do_not_depend_on_whether_the_method_asks_for_label_counts() -> None:
    keys = ["data.client_test=0.4", "data.beta=0.1", "data.partition=dirichlet-per-client", "train.rounds=1"]
    _, _, fedavg = play(*keys)
    _, _, fedftg = play(*keys, "method=fedavg+fedftg")
    assert fedavg[0]["ensembles"] == fedftg[0]["ensembles"]


# The server phase


def test_the_server_phase_leaves_the_teachers_and_the_fused_model_alone() -> None:
    federation, _ = build(small("method=fedavg+fedftg"))
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    refinement = federation.method.refinements[0]
    original = type(refinement).refine

    def spy(self: Any, model: Any, student: Weights, teachers: Any, state: State, context: RoundContext) -> Any:
        held = {**teachers.params, **{f"student {name}": value for name, value in student.params.items()}}
        before = {name: value.clone() for name, value in held.items()}
        refined = original(self, model, student, teachers, state, context)
        seen.append((before, held))
        assert not same_weights(refined.weights, student)
        return refined

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(refinement), "refine", spy)
        federation.run_round(federation.start())
    before, after = seen[0]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_round_does_not_change_the_state_it_started_from() -> None:
    federation, state, _ = play("method=scaffold+fedftg", rounds=1)
    before = {name: value.clone() for name, value in flat(state).items()}
    federation.run_round(state)
    assert all(torch.equal(value, before[name]) for name, value in flat(state).items())


@pytest.mark.parametrize("inputs", ["real", "noise"])
def test_other_inputs_than_the_generators_run_in_simulation(inputs: str) -> None:
    keys = ["method=fedavg+fedftg", f"fedftg.inputs={inputs}", "fedftg.mode=tuned", "fedftg.iterations=3"]
    federation, state, records = play(*keys, "train.participation=0.5")
    assert state.refinements == ({},)
    assert federation.method.refinements[0].simulation_only == (inputs == "real")
    measured: Any = records[0]["refinement"]
    assert measured["fedftg"].keys() >= {"student_loss", "label_accuracy"}


def test_the_oracles_inputs_are_the_cohorts_own_data() -> None:
    federation, _ = build(small("method=fedavg+fedftg", "fedftg.inputs=real", "train.participation=0.5"))
    cohort = federation.sample_cohort(0)
    real = federation.context(0, federation.info, [_Named(client) for client in cohort], with_real=True).real  # type: ignore[misc]
    assert real is not None
    own = torch.cat([federation.trainer.shares[client] for client in cohort])
    assert torch.equal(real.x, federation.trainer.samples.x[own])
    assert federation.context(0, federation.info, [], with_real=False).real is None


class _Named:
    def __init__(self, client: int) -> None:
        self.client = client


# The record


def test_a_rounds_record_holds_what_the_run_directory_promises() -> None:
    _, state, records = play("method=scaffold+fedftg", "fedftg.mode=paper")
    for number, record in enumerate(records, 1):
        found: Any = record
        assert found["round"] == number
        assert found["cohort"] == [0, 1, 2, 3]
        for model in ("fused", "refined"):
            assert found[model]["test"].keys() == {"accuracy", "loss", "per_class"}
            assert len(found[model]["test"]["per_class"]) == 10
            assert len(found[model]["by_client_label_mix"]) == 4
        assert found["ensembles"].keys() == {"uniform", "logits", "class_weighted", "fused"}
        assert found["refinement"]["fedftg"].keys() >= {
            "student_loss",
            "generator_md",
            "generator_cls",
            "generator_dis",
            "label_accuracy",
        }
        assert found["seconds"].keys() == {"train", "fuse", "refine", "evaluate"}
        assert all(value >= 0 for value in found["seconds"].values())
        assert found["bytes"].keys() == {"down", "up"}
        assert np.isfinite(found["train_loss"])
    assert state.round == 2
    assert "generator" in state.refinements[0]


# Data that all have


def test_pooled_clients_train_on_everybodys_training_samples() -> None:
    keys = ["data.client_test=0.2", *SKEWED]
    apart, pooled = build(small(*keys))[0], build(small(*keys, "data.pooled=true"))[0]
    together = sorted(int(row) for share in apart.trainer.shares for row in share)
    assert [share.tolist() for share in pooled.trainer.shares] == [together] * len(apart.trainer.shares)
    assert pooled.info.samples == (len(together),) * len(apart.trainer.shares)
    assert pooled.partition.fingerprint == apart.partition.fingerprint
    assert len(together) < 200  # what clients hold out is nobody's to train on


def test_the_public_subset_has_a_seed_of_its_own(tmp_path: Path) -> None:
    for number in range(40):
        np.save(tmp_path / f"{number}.npy", np.full((8, 8), 6 * number, np.uint8))

    def public(*keys: str) -> Tensor:
        found = build(
            small(f"public.name={tmp_path}", "public.samples=20", "method=fedavg+feddf", "feddf.patience=0", *keys)
        )[0].public
        assert found is not None
        return found.x

    first = public("seed.data=0")
    assert not torch.equal(first, public("seed.data=1"))
    assert torch.equal(first, public("seed.data=1", "public.seed=0"))
    assert torch.equal(first, public("seed.train=1"))


def test_ensembles_that_are_only_measured_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    federation, _ = build(small("eval.ensembles_every=1"))
    began: list[str] = []
    seen = Federation.teachers
    monkeypatch.setattr(Clock, "__call__", noting(Clock.__call__, began))
    monkeypatch.setattr(Federation, "teachers", lambda self, uploads: began.append("teachers") or seen(self, uploads))
    federation.run_round(federation.start())
    assert began[began.index("teachers") - 1] == "evaluate"


def noting(original: Any, began: list[str]) -> Any:
    """Return a clock's call that notes the phase before it begins."""

    def call(self: Clock, phase: str) -> Any:
        began.append(phase)
        return original(self, phase)

    return call

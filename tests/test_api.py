"""The package from Python: an experiment in one call, and its parts alone."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedstill
from fedstill.config import LocalSettings
from fedstill.methods.fedavg import FedAvgObjective
from fedstill.methods.fedprox import FedProxObjective, FedProxSettings
from fedstill.methods.scaffold import ScaffoldObjective, ScaffoldSettings
from fedstill.models import Stateless, split_state
from fedstill.payload import Kind, model_payload, scalars
from fedstill.weights import Weights, weighted_mean, zeros_like
from small import SMALL, same_weights, small


def test_everything_that_is_exported_is_there() -> None:
    assert [name for name in fedstill.__all__ if not hasattr(fedstill, name)] == []
    assert fedstill.__version__


def test_run_without_a_directory_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = fedstill.run({**SMALL, "method": "scaffold+fedftg"})
    assert list(tmp_path.iterdir()) == []
    assert result.directory is None
    assert result.accuracies().keys() == {1, 2}
    assert result.accuracies("validation") == {}
    refined: Any = result.records[-1]["refined"]
    fused: Any = result.records[-1]["fused"]
    assert result.accuracies()[2] == refined["test"]["accuracy"]
    assert fedstill.accuracies(result.records, model="fused")[2] == fused["test"]["accuracy"]
    score = fedstill.evaluate(
        result.federation.model, result.weights, result.federation.evaluation.sets["test"], 10, batch_size=1000
    )
    assert score.accuracy == result.accuracies()[2]


def test_run_takes_a_config_a_mapping_or_a_file(tmp_path: Path) -> None:
    ready = fedstill.run(small("train.rounds=1"))
    given = deepcopy(SMALL)
    mapping = fedstill.run(given, "train.rounds=1")
    assert given == SMALL
    file = tmp_path / "mine.toml"
    file.write_text("".join(f'{key} = "{value}"\n' for key, value in SMALL.items() if isinstance(value, str)))
    for key, table in SMALL.items():
        if isinstance(table, dict):
            lines = (f"{name} = {value!r}" for name, value in table.items())
            file.write_text(file.read_text() + f"[{key}]\n" + "\n".join(lines) + "\n")
    read = fedstill.run(file, "train.rounds=1", directory=tmp_path / "run")
    text = fedstill.run(str(file), "train.rounds=1")
    for other in (mapping, read, text):
        assert other.config == ready.config
        assert same_weights(other.weights, ready.weights)
    again = fedstill.resume(tmp_path / "run")
    assert again.directory == tmp_path / "run"
    assert same_weights(again.weights, ready.weights)


def test_run_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(fedstill.InputError, match="not with a ready Config"):
        fedstill.run(small(), "train.rounds=1")
    with pytest.raises(fedstill.InputError, match=r"unknown key 'data\.bta'"):
        fedstill.run({"data": {"bta": 1}})
    with pytest.raises(fedstill.InputError, match=r"unknown key 'data\.bta'"):
        fedstill.run({"data": {"bta": 1}}, "train.rounds=1")
    with pytest.raises(fedstill.InputError, match="unknown method"):
        fedstill.run({"method": "x"}, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert issubclass(fedstill.InputError, fedstill.FedstillError)


def test_a_federation_can_be_walked_by_hand() -> None:
    federation, notes = fedstill.build(small())
    assert notes == []
    state, first = federation.run_round(federation.start())
    state, second = federation.run_round(state)
    assert [first["round"], second["round"], state.round] == [1, 2, 2]
    assert same_weights(state.server.weights, fedstill.run(small()).weights)


# Parts alone


@pytest.fixture(scope="module")
def digits() -> Any:
    return fedstill.load_dataset("digits")


def shares_of(digits: Any) -> Any:
    return fedstill.make_partition(
        digits.train.y.numpy()[:300],
        digits.num_classes,
        protocol="dirichlet-per-client",
        clients=3,
        beta=0.1,
        sigma=0.0,
        shards_per_client=2,
        min_size=10,
        replay=False,
        seed=0,
    )


def network(digits: Any, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    return fedstill.build_model(
        "cnn", input_shape=digits.shape, num_classes=digits.num_classes, width=4, generator=generator
    )


def test_a_data_set_is_shared_among_clients(digits: Any) -> None:
    partition = shares_of(digits)
    assert [len(own) for own in partition.indices] == [100, 100, 100]
    assert sorted(index for own in partition.indices for index in own) == list(range(300))
    assert partition.counts.shape == (3, 10)
    assert partition.fingerprint == shares_of(digits).fingerprint


def trainer_of(digits: Any, objective: Any, epochs: int = 8) -> fedstill.LocalTrainer:
    shares = [torch.as_tensor(own) for own in shares_of(digits).indices]
    local = LocalSettings(epochs=epochs, batch_size=16)
    return fedstill.LocalTrainer(objective, digits.train, shares, local, digits.num_classes, seed=0)


def test_one_client_is_trained_alone(digits: Any) -> None:
    module = network(digits)
    start = Weights(*split_state(module))
    trainer = trainer_of(digits, FedAvgObjective())
    model = Stateless(module)
    work = fedstill.ClientWork(0, 1, model_payload(start), {}, send_label_counts=True)
    result = trainer([model], work)
    own = digits.train.take(trainer.shares[1])
    before = fedstill.evaluate(model, start, own, 10, 100)
    after = fedstill.evaluate(model, result.payload.weights(), own, 10, 100)
    assert after.accuracy > 0.8 > before.accuracy
    assert result.client == 1
    assert result.steps == 8 * 7
    assert result.state == {}
    assert result.payload[Kind.LABEL_COUNTS]["counts"].tolist() == shares_of(digits).counts[1].tolist()
    again = trainer([model], work)
    assert same_weights(again.payload.weights(), result.payload.weights())
    later = trainer([model], fedstill.ClientWork(1, 1, model_payload(start), {}))
    assert not same_weights(later.payload.weights(), result.payload.weights())
    assert Kind.LABEL_COUNTS not in later.payload


@pytest.mark.parametrize(
    "objective", [FedProxObjective(FedProxSettings(mu=0.1)), ScaffoldObjective(ScaffoldSettings())]
)
def test_one_client_of_another_method_is_trained_alone(digits: Any, objective: Any) -> None:
    module = network(digits)
    start = Weights(*split_state(module))
    payload = model_payload(start).also(Kind.CONTROL_VARIATE, zeros_like(start.params))
    work = fedstill.ClientWork(0, 0, payload.also(Kind.SCALARS, scalars(omega=1.0)), {})
    result = trainer_of(digits, objective, epochs=1)([Stateless(module)], work)
    assert (Kind.CONTROL_VARIATE in result.payload) == bool(result.state) == isinstance(objective, ScaffoldObjective)


def test_a_model_is_refined_from_a_list_of_teachers(digits: Any) -> None:
    trainer, module = trainer_of(digits, FedAvgObjective()), network(digits)
    start = Weights(*split_state(module))
    teachers = []
    for client in range(3):
        trained = trainer([Stateless(module)], fedstill.ClientWork(0, client, model_payload(start), {}))
        teacher = network(digits)
        teacher.load_state_dict(trained.payload.weights().params)
        teachers.append(teacher)
    mean = weighted_mean([Weights(*split_state(teacher)) for teacher in teachers], [1.0] * 3)
    student = network(digits)
    student.load_state_dict(mean.params)
    settings = fedstill.FedFTGSettings(mode="tuned", iterations=100, batch_size=32, inputs="noise", teacher="class")
    held = [{name: value.clone() for name, value in teacher.state_dict().items()} for teacher in teachers]
    counts = shares_of(digits).counts.tolist()
    refined, state, metrics = fedstill.FedFTG(settings, seed=3).distil(student, teachers, counts, digits.shape)
    assert refined is student
    assert state == {}
    assert metrics.keys() >= {"student_loss", "label_accuracy"}
    test = digits.train.take(torch.arange(300, 800))

    def accuracy(one: nn.Module) -> float:
        return fedstill.evaluate(Stateless(one), Weights(*split_state(one)), test, 10, 500).accuracy

    assert accuracy(student) > fedstill.evaluate(Stateless(student), mean, test, 10, 500).accuracy + 0.05
    for teacher, before in zip(teachers, held, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_generator_lives_on_between_two_refinements(digits: Any) -> None:
    teachers = [network(digits, seed) for seed in (1, 2)]
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # of another architecture
    counts = [[5] * 10, [1] * 10, [0, 3] * 5]
    refinement = fedstill.FedFTG(fedstill.FedFTGSettings(iterations=2, generator_width=4, noise_dim=8, batch_size=10))
    _, first, metrics = refinement.distil(network(digits), [*teachers, other], counts, digits.shape)
    assert metrics.keys() >= {"student_loss", "generator_md", "generator_cls", "generator_dis", "label_accuracy"}
    _, second, _ = refinement.distil(network(digits), [*teachers, other], counts, digits.shape, state=first, round=1)
    assert first["generator"].keys() == second["generator"].keys()
    assert any(not torch.equal(value, second["generator"][name]) for name, value in first["generator"].items())


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([[1] * 10], "expected one row of class counts for each of 2 teachers"),
        ([1] * 10, "expected one row of class counts"),
        ([[0] * 10, [0] * 10], "zero everywhere"),
        ([[0.9] * 10, [0.9] * 10], "not whole"),
        ([[float("nan")] * 10, [1.0] * 10], "not whole"),
        ([[float("inf")] * 10, [1.0] * 10], "not whole"),
        ([["many"] * 10, [1] * 10], "cannot be read as a table of numbers"),
    ],
)
def test_class_counts_that_cannot_be_are_refused(digits: Any, counts: Any, says: str) -> None:
    with pytest.raises(fedstill.InputError, match=says):
        fedstill.FedFTG().distil(network(digits), [network(digits), network(digits)], counts, digits.shape)


@pytest.mark.parametrize(("name", "keys"), [("FedFTG", {}), ("FedDF", {"patience": 0})])
def test_a_refinement_refuses_other_settings_and_models_that_cannot_teach(
    digits: Any, name: str, keys: dict[str, Any]
) -> None:
    method = getattr(fedstill, name)
    with pytest.raises(fedstill.InputError, match=rf"expected {name}Settings\(\.\.\.\), not dict"):
        method({"iterations": 1})
    method = partial(method, getattr(fedstill, f"{name}Settings")(inputs="noise", **keys))
    broken = network(digits)
    next(broken.parameters()).data[0] = float("nan")
    counts = [[1] * 10, [1] * 10]
    with pytest.raises(fedstill.InputError, match="teacher 0 has weights that are not finite"):
        method().distil(network(digits), [broken, network(digits)], counts, digits.shape)
    with pytest.raises(fedstill.InputError, match="student has weights that are not finite"):
        method().distil(broken, [network(digits), network(digits)], counts, digits.shape)
    with pytest.raises(fedstill.InputError, match=r"teacher 1 is no torch\.nn\.Module"):
        method().distil(network(digits), [network(digits), {}], counts, digits.shape)


def test_a_refinement_that_diverges_leaves_the_student_as_it_was(digits: Any) -> None:
    student, before = network(digits), network(digits)
    keys: Any = {"inputs": "noise", "iterations": 2, "batch_size": 4, "lr_student": 1e30, "weight_decay_student": 1e10}
    with pytest.raises(fedstill.RunError, match=r"fedftg made the student non-finite; a smaller lr_student or lr_gen"):
        fedstill.FedFTG(fedstill.FedFTGSettings(**keys)).distil(student, [network(digits)], [[1] * 10], digits.shape)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in student.state_dict().items())


def test_the_oracles_inputs_are_refused_outside_a_simulation(digits: Any) -> None:
    refinement = fedstill.FedFTG(fedstill.FedFTGSettings(inputs="real"))
    with pytest.raises(fedstill.InputError, match="an oracle for simulation"):
        refinement.distil(network(digits), [network(digits)], [[1] * 10], digits.shape)

"""The cohort as one batched model against one client after another: the same numbers up to rounding."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedstill.build import build
from fedstill.config import Config, load_config
from fedstill.errors import InputError, RunError
from fedstill.execution.choices import resolve
from fedstill.federation import Federation, FederationState
from fedstill.weights import State
from small import SMALL, flat, play, same_state, small

SKEWED = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5", "local.batch_size=7"]
METHODS = {
    "fedavg": [],
    "fedprox": ["fedprox.mu=0.1"],
    "scaffold": [],
    "feddyn": ["feddyn.alpha=0.1"],
    "moon": ["moon.previous_models=2"],
    "fedgen": ["fedgen.mode=code"],
    "feddistill": ["feddistill.share=weights"],
    "alone": [],
}


def in_float64(federation: Federation) -> Federation:
    """Put a federation's models and data into double precision."""
    for name in ("architectures",):
        for one in getattr(federation, name):
            one.model.module.double()
            for group in (one.initial.params, one.initial.buffers):
                for key, value in group.items():
                    group[key] = value.double() if value.is_floating_point() else value
    object.__setattr__(federation.trainer.samples, "x", federation.trainer.samples.x.double())
    for samples in federation.evaluation.sets.values():
        object.__setattr__(samples, "x", samples.x.double())
    return federation


def trained(config: Config, rounds: int = 3) -> tuple[Federation, FederationState, list[Any]]:
    """Run a federation in double precision."""
    federation, _ = build(config)
    in_float64(federation)
    state, records = federation.start(), []
    for _ in range(rounds):
        state, record = federation.run_round(state)
        records.append(record)
    federation.executor.close()
    return federation, state, records


def agree(one: FederationState, other: FederationState, within: float = 1e-9) -> None:
    """Compare every tensor of two states."""
    left, right = flat(one), flat(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], rtol=within, atol=within, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("method", METHODS)
def test_every_objective_agrees_with_serial(method: str) -> None:
    keys = [f"method={method}", "train.participation=0.75", "local.epochs=2", *SKEWED, *METHODS[method]]
    first, serial, records = trained(small(*keys))
    second, batched, found = trained(small(*keys, "execution.executor=vectorized"))
    assert type(second.executor).__name__ == "VectorizedExecutor"
    assert len(set(first.info.samples)) > 1  # clients of unequal size, with last batches of unequal size
    agree(serial, batched)
    for one, other in zip(records, found, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)
        assert one["bytes"] == other["bytes"]
        assert one["cohort"] == other["cohort"]


@pytest.mark.parametrize(
    "keys",
    [
        ["model.name=cnn", "model.width=4", "local.clip_norm=0.5"],
        ["model.name=cnn", "model.width=4", "model.norm=bn", "local.last_batch=drop"],
        ["local.momentum=0.9", "local.weight_decay=0.01", "local.clip_norm=none"],
        ["local.steps=5"],
        ["execution.clients_at_once=2"],
        ["execution.clients_at_once=1"],
        ["execution.workers=2"],
        ["execution.workers=3", "execution.clients_at_once=1"],
        ["method=scaffold", "scaffold.mode=code"],
        ["model.name=cnn", "model.width=4", "method=moon", "data.augment=flip-crop"],
    ],
)
def test_every_setting_of_local_training_agrees_with_serial(keys: list[str]) -> None:
    _, serial, _ = trained(small(*SKEWED, *keys))
    _, batched, _ = trained(small(*SKEWED, *keys, "execution.executor=vectorized"))
    agree(serial, batched)


COMPILED = ["execution.executor=vectorized", "execution.compile=true", "execution.workers=1"]
NEEDS_A_COMPILER = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler, and there is none"
)


@pytest.fixture
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let ``torch.compile`` trace and guard as always, but run what it traced as it is; counts the traces."""
    found: list[int] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        found.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_it_is))
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_of_every_objective_agrees_with_serial(method: str, traced_alone: list[int]) -> None:
    keys = [f"method={method}", "local.epochs=2", *SKEWED, "data.min_size=7", *METHODS[method]]
    _, serial, _ = trained(small(*keys))
    _, batched, _ = trained(small(*keys, *COMPILED))
    # Only ticks of all clients with whole batches, once for all rounds; what some servers send comes after the first.
    assert len(traced_alone) == (2 if method in ("fedgen", "feddistill") else 1)
    agree(serial, batched)


def test_every_workers_step_is_compiled(traced_alone: list[int]) -> None:
    """PyTorch gives up after eight forms of one function, and each worker's model is a form."""
    keys = ["data.clients=10", *SKEWED, "data.min_size=7"]
    _, serial, _ = trained(small(*keys))
    _, batched, _ = trained(small(*keys, *COMPILED, "execution.workers=10"))
    assert len(traced_alone) == 10
    agree(serial, batched)


@NEEDS_A_COMPILER
def test_a_step_that_the_compiler_made_agrees_with_serial() -> None:
    keys = ["method=scaffold", "local.epochs=2", *SKEWED, "data.min_size=7"]
    _, serial, _ = trained(small(*keys))
    _, batched, _ = trained(small(*keys, *COMPILED))
    agree(serial, batched)


def test_only_a_batched_step_can_be_compiled() -> None:
    assert resolve(small("execution.compile=true", "execution.executor=auto")).execution.executor == "vectorized"
    with pytest.raises(InputError, match=r"execution\.compile: executor = 'threads' has no step to compile"):
        build(small("execution.compile=true", "execution.executor=threads"))


def test_a_step_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(RunError, match=r"execution\.compile: PyTorch cannot compile this step \(.*no compiler here"):
        trained(small(*SKEWED, "data.min_size=7", *COMPILED))
    torch.compiler.reset()


def test_it_gives_its_own_bits_again() -> None:
    keys = ["method=scaffold+fedftg", "execution.executor=vectorized", *SKEWED]
    _, one, _ = play(*keys)
    _, other, _ = play(*keys)
    assert same_state(one, other)


def test_single_precision_stays_close_to_serial() -> None:
    keys = ["method=scaffold", "model.name=cnn", "model.width=4", *SKEWED]
    _, serial, _ = play(*keys)
    _, batched, _ = play(*keys, "execution.executor=vectorized")
    agree(serial, batched, within=1e-4)


def test_architectures_are_batched_each_by_itself() -> None:
    models = [{"name": "mlp", "hidden": [16], "clients": [0, 3]}, {"name": "cnn", "width": 4}]
    base = {**SMALL, "model": models}
    _, serial, _ = trained(load_config(None, ["method=scaffold"], base))
    _, batched, _ = trained(load_config(None, ["method=scaffold", "execution.executor=vectorized"], base))
    agree(serial, batched)


def test_a_client_that_has_finished_no_longer_moves() -> None:
    # One client has a single batch per epoch and three epochs, another many: the first one's result does not depend
    # on who is beside it.
    keys = ["data.partition=dirichlet-per-class", "data.beta=0.3", "data.min_size=4", "local.epochs=3"]
    federation, _ = build(small(*keys, "execution.executor=vectorized"))
    in_float64(federation)
    state = federation.start()
    works = [federation.work(state, client) for client in range(4)]
    together = {result.client: result for result in federation.executor.run(federation.trainer, works)}
    assert len({result.steps for result in together.values()}) > 1
    for work in works:
        (alone,) = federation.executor.run(federation.trainer, [work])
        for name, value in alone.payload.weights().params.items():
            torch.testing.assert_close(
                value, together[work.client].payload.weights().params[name], rtol=1e-12, atol=1e-12
            )


def test_inputs_are_left_alone() -> None:
    federation, _ = build(small("method=scaffold", "execution.executor=vectorized"))
    state, _ = federation.run_round(federation.start())
    works = [federation.work(state, client) for client in range(4)]
    before: list[State] = [
        {str(kind): {name: value.clone() for name, value in own.items()} for kind, own in work.payload.parts.items()}
        for work in works
    ]
    federation.train(1, works)
    for work, kept in zip(works, before, strict=True):
        for kind, own in work.payload.parts.items():
            assert all(torch.equal(value, kept[str(kind)][name]) for name, value in own.items())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["method=fedmd", "public.name=digits", "model.name=mlp"], "more than SGD on one loss"),
        (["model.name=test_vectorized:with_branches"], "cannot be batched over clients"),
        (["model.name=test_vectorized:with_dropout"], "one random stream of the whole process"),
    ],
)
def test_what_cannot_be_batched_runs_serially_and_says_why(keys: list[str], says: str) -> None:
    federation, notes = build(small(*keys, "execution.executor=vectorized", "fedmd.align_samples=20"))
    assert type(federation.executor).__name__ == "SerialExecutor"
    assert federation.config.execution.executor == "serial"
    assert any(says in note for note in notes)


def with_dropout(input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
    """Return a model with PyTorch's dropout."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, num_classes))


class _Branches(torch.nn.Module):
    """A model that looks at its values."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(x if float(x.sum()) >= 0 else -x)


def with_branches(input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
    """Return a model whose forward pass depends on its values."""
    return _Branches(num_classes)

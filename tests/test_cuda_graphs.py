"""The server's step recorded and replayed on a stand-in for CUDA graphs (:class:`far.FarGraph`): eager's numbers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from far import FAR, FarGraph, RefusedInAGraph, far_device
from fedstill.build import build
from fedstill.distill.graphs import Recorder
from fedstill.distill.log import Log
from fedstill.errors import InputError, RunError
from fedstill.execution.choices import resolve
from small import flat, play, small, untimed

CNN = ["model.name=cnn", "model.width=4", "model.norm=bn"]
CASES: dict[str, tuple[list[str], int]] = {
    "paper": ([], 4),
    "code": (["fedftg.mode=code"], 4),
    "tuned": (["fedftg.mode=tuned"], 4),
    "a new z per step": (["fedftg.noise_per=step"], 4),
    "statistics": (["fedftg.lambda_bn=0.1", *CNN], 4),
    "the student in eval mode": (["fedftg.student_norm=eval", "fedftg.generator_norm=train", *CNN], 4),
    "features": (["fedftg.level=feature"], 4),
    "two architectures": (['model=[{name="mlp"},{name="mlp",hidden=[7]}]'], 4),
    "noise": (["fedftg.inputs=noise"], 2),
    "the clients' data": (["fedftg.inputs=real"], 2),
}
"""Keys, and how many graphs a round records."""


GRAPHS = "execution.cuda_graphs=true"


def played(*keys: str, rounds: int = 3) -> tuple[dict[str, Tensor], Any, list[FarGraph]]:
    """Run on the stand-in device; return all tensors, the records without times, and the graphs."""
    with far_device() as device:
        keys = ("method=scaffold+fedftg", "fedftg.iterations=4", "execution.device=cuda", *keys)
        _, state, records = play(*keys, rounds=rounds)
        tensors = {name: getattr(value, "held", value) for name, value in flat(state).items()}
        return tensors, untimed(records), device.graphs


@pytest.mark.parametrize("case", CASES)
def test_what_is_replayed_is_what_is_computed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, pieces = CASES[case]
    replayed, records, graphs = played(*keys, GRAPHS)
    monkeypatch.setattr(Recorder, "of", lambda self, piece: piece)  # Adam keeps its steps on the device all the same
    computed, expected, none = played(*keys, GRAPHS)
    assert records == expected
    assert replayed.keys() == computed.keys()
    for name, value in computed.items():
        assert torch.equal(value, replayed[name]), name
    refinements = 2 if "architectures" in case else 1
    assert len(graphs) == 3 * refinements * pieces
    assert not none


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_usual_ones(case: str) -> None:
    """Adam on the device has other last bits, which later rounds make larger."""
    keys = [*CASES[case][0], "fedftg.freeze_unused_biases=true"]  # other biases follow rounding noise
    usual, records, none = played(*keys, rounds=1)
    replayed, again, _ = played(*keys, GRAPHS, rounds=1)
    assert not none
    assert [list(record) for record in records] == [list(record) for record in again]
    for name, value in usual.items():
        torch.testing.assert_close(
            replayed[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_call_after_the_first_is_a_replay() -> None:
    *_, graphs = played(
        "fedftg.iterations=4", "fedftg.generator_steps=2", "fedftg.student_steps=3", "execution.cuda_graphs=true"
    )
    # In each of three rounds: the generator's steps, what it makes, the teachers' answers, the student's steps.
    assert sorted(graph.replays for graph in graphs) == sorted(3 * [4 * 2 - 1, 4 - 1, 4 - 1, 4 * 3 - 1])


def test_the_host_waits_no_more_often() -> None:
    def waits(*keys: str) -> int:
        with far_device() as device:
            play("method=fedavg+fedftg", "execution.device=cuda", *keys, rounds=1)
        return sum(device.waited.values())

    assert waits(GRAPHS, "fedftg.iterations=9") == waits("fedftg.iterations=3")


def recorded(piece: Any, *calls: Tensor) -> list[Tensor]:
    """Return what a recorded piece answers to each call."""
    recorder = Recorder(True, Log())
    run = recorder.of(piece)
    with recorder.running():
        return [run(given)[0] for given in calls]


def test_the_stand_in_refuses_and_spoils_what_a_graph_would() -> None:
    """Without this, no test above could fail."""
    with far_device():
        calls = [torch.full((2,), float(value), device=FAR) for value in range(4)]
        doubled = recorded(lambda x: (2 * x,), *calls)
        assert [value.tolist() for value in doubled] == [[0, 0], [2, 2], [4, 4], [6, 6]]

        count = iter(range(10))
        by_host = recorded(lambda x: (x + next(count),), *calls)
        assert [value.tolist()[0] for value in by_host] == [0, 2, 3, 4]  # 1 for ever, as it was when recorded

        held = {"sum": torch.zeros(2, device=FAR)}

        def swap(x: Tensor) -> tuple[Tensor]:
            held["sum"] = held["sum"] + x
            return (held["sum"],)

        assert [value.tolist()[0] for value in recorded(swap, *calls)] == [0, 1, 2, 3]  # not 0, 1, 3, 6

        def in_place(x: Tensor) -> tuple[Tensor]:
            return (held["sum"].add_(x).clone(),)

        held["sum"] = torch.zeros(2, device=FAR)
        assert [value.tolist()[0] for value in recorded(in_place, *calls)] == [0, 1, 3, 6]

        stream = torch.Generator(FAR).manual_seed(1)
        with pytest.raises(RunError, match=r"execution\.cuda_graphs: .* draws random numbers"):
            recorded(lambda x: (x + torch.rand(2, generator=stream, device=FAR),), *calls)
        with pytest.raises(RunError, match=r"execution\.cuda_graphs: .* makes the host wait"):
            recorded(lambda x: (x * float(x.sum()),), *calls)
        with pytest.raises(RunError, match=r"execution\.cuda_graphs: .* draws random numbers"):
            recorded(lambda x: (torch.rand_like(x),), *calls)
        for copied in (lambda x: (x[torch.tensor([0, 1])],), lambda x: (x + torch.ones(2).to(FAR, non_blocking=True),)):
            with pytest.raises(RunError, match=r"execution\.cuda_graphs: .* copies from the host"):
                recorded(copied, *calls)
        assert issubclass(RefusedInAGraph, RuntimeError)


def test_a_student_with_dropout_steps_unrecorded() -> None:
    *_, graphs = played('model={name="fedmd-femnist-0"}', GRAPHS, rounds=1)
    assert sorted(graph.replays for graph in graphs) == [3, 3, 3]
    *_, graphs = played('model={name="fedmd-femnist-0"}', "fedftg.student_norm=eval", GRAPHS, rounds=1)
    assert sorted(graph.replays for graph in graphs) == [3, 3, 3, 19]


def test_graphs_are_gone_with_their_refinement() -> None:
    """One that is left to the garbage collector may be destroyed while another is recorded."""
    gc.collect()
    gc.disable()
    try:
        with far_device() as device:
            play("method=fedavg+fedftg", "fedftg.iterations=4", "execution.device=cuda", GRAPHS)
            left = [weakref.ref(graph) for graph in device.graphs]
            device.graphs.clear()
            assert len(left) == 8
            assert not any(graph() for graph in left)
    finally:
        gc.enable()


def test_nothing_to_record_is_said() -> None:
    with far_device():
        _, said = build(small("method=fedavg", "execution.device=cuda", GRAPHS))
        assert [note for note in said if "execution.cuda_graphs" in note] == [
            "execution.cuda_graphs: fedavg has no server step that is recorded, only FedFTG has"
        ]
        _, said = build(small("method=fedavg+fedftg", "execution.device=cuda", GRAPHS))
        assert not [note for note in said if "execution.cuda_graphs" in note]


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(InputError, match=r"execution\.cuda_graphs needs a GPU"):
        resolve(small(GRAPHS))

"""On a GPU: the CPU's numbers, serially and batched, the same bits again, and after a stop.

``FEDSTILL_TEST_DEVICE=cpu`` runs these tests on a CPU, to see that they work before a GPU is at hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedstill.distill.graphs import Recorder
from fedstill.experiment import resume, run
from fedstill.federation import FederationState
from fedstill.runs import read_metrics
from small import flat, play, small, untimed

DEVICE = os.environ.get("FEDSTILL_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

CNN = ["model.name=cnn", "model.width=4", "local.clip_norm=10.0"]
PUBLIC = ["public.name=digits", "public.samples=60"]
METHODS = {
    "fedavg": [],
    "fedprox": ["fedprox.mu=0.1"],
    "scaffold": [],
    "feddyn": ["feddyn.alpha=0.1"],
    "moon": [],
    "fedgen": ["fedgen.mode=code"],
    "feddistill": ["feddistill.share=weights"],
    "fedmd": [*PUBLIC, "fedmd.align_samples=20", "fedmd.private_epochs=2", "fedmd.public_epochs=2"],
    "scaffold+fedftg": ["fedftg.iterations=1", "fedftg.generator_steps=0"],
    "fedavg+feddf": [*PUBLIC, "feddf.steps=4", "feddf.patience=0"],
}
RUNS = {"sgd": "scaffold", "refined": "fedavg+fedftg"}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let PyTorch choose kernels that give the same bits again."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def agree(one: FederationState, other: FederationState, within: float) -> None:
    """Compare two states, wherever they are."""
    left, right = flat(one), flat(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value.cpu(), right[name].cpu(), rtol=within, atol=within)


@pytest.mark.parametrize("method", METHODS)
def test_two_rounds_give_the_cpus_numbers(method: str) -> None:
    keys = [f"method={method}", *CNN, *METHODS[method]]
    _, near, _ = play(*keys)
    for executor in ("serial", "vectorized"):
        _, there, _ = play(*keys, f"execution.device={DEVICE}", f"execution.executor={executor}")
        assert {value.device.type for value in flat(there).values()} >= {DEVICE}
        agree(near, there, within=2e-3)


@pytest.mark.parametrize("executor", ["serial", "vectorized"])
@pytest.mark.parametrize("kind", RUNS)
def test_the_same_run_gives_the_same_bits(kind: str, executor: str) -> None:
    keys = [f"method={RUNS[kind]}", *CNN, f"execution.device={DEVICE}", f"execution.executor={executor}"]
    (_, first, records), (_, again, found) = play(*keys), play(*keys)
    agree(first, again, within=0.0)
    assert untimed(records) == untimed(found)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    keys = [f"method={RUNS[kind]}", *CNN, f"execution.device={DEVICE}", "execution.executor=auto", "train.rounds=3"]
    run(small(*keys), directory=tmp_path / "whole")

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(*keys), directory=tmp_path / "stopped", callbacks=[stop])
    resume(tmp_path / "stopped")
    assert untimed(read_metrics(tmp_path / "stopped")) == untimed(read_metrics(tmp_path / "whole"))


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has no CUDA graphs")
@pytest.mark.parametrize("mode", ["paper", "code", "tuned"])
def test_cuda_graphs_give_the_same_numbers(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    keys = ["method=fedavg+fedftg", f"fedftg.mode={mode}", "fedftg.iterations=4", "execution.cuda_graphs=true"]
    keys += [*CNN, "model.norm=bn", f"execution.device={DEVICE}"]
    _, replayed, _ = play(*keys, rounds=3)
    assert len(set(map(id, replays))) == 3 * 4
    monkeypatch.setattr(Recorder, "of", lambda self, piece: piece)
    _, computed, _ = play(*keys, rounds=3)
    agree(computed, replayed, within=1e-4)


def test_bf16_and_tf32_stay_near() -> None:
    _, fine, _ = play(*CNN, f"execution.device={DEVICE}")
    kinds = ["bf16", "tf32"] if DEVICE == "cuda" else ["bf16"]
    for kind in kinds:
        _, coarse, _ = play(*CNN, f"execution.device={DEVICE}", f"execution.precision={kind}")
        agree(fine, coarse, within=0.05)

"""The cache of FedMD's pre-training: the same bits with it and without, and nothing in it for anything else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from test_fedmd import KEYS, watched
from torch import nn

from fedstill.build import build
from fedstill.errors import RunError
from fedstill.execution import intra_op_threads
from fedstill.experiment import resume, run
from fedstill.federation import FederationState, Record
from fedstill.methods.pretraining import Pretrained, PretrainingCache, machine
from fedstill.runs import RunDirectory
from fedstill.studies.sweep import difference
from fedstill.weights import Weights
from small import play, same_state, small, untimed


def stock_dropout(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A model with PyTorch's own dropout."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))


@pytest.fixture(scope="module")
def uncached() -> tuple[FederationState, list[Record]]:
    _, state, records = play(*KEYS)
    return state, records


def cached(folder: Path, *keys: str) -> tuple[FederationState, list[Record], int]:
    """Run with the cache, and count the clients that learnt the public set themselves."""
    with watched() as seen:
        _, state, records = play(*KEYS, f"fedmd.pretraining_cache={folder}", *keys)
    return state, records, sum(lesson.name == "public" for _, _, lesson, *_ in seen)


def learnt(folder: Path, *keys: str) -> int:
    """Return how many clients learn the public set themselves in the first round."""
    return cached(folder, "train.rounds=1", *keys)[2]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A cache with the models of :data:`KEYS`."""
    assert learnt(tmp_path / "cache") == 3
    return tmp_path / "cache"


# The same bits


def test_a_run_with_the_cache_has_the_bits_of_one_without(
    tmp_path: Path, uncached: tuple[FederationState, list[Record]]
) -> None:
    for expected in (3, 0):  # what is written, then what is read; a model with dropout goes on with its stream
        state, records, count = cached(tmp_path / "a" / "b")
        assert count == expected
        assert same_state(state, uncached[0])
        assert untimed(records) == untimed(uncached[1])
    assert len(list((tmp_path / "a" / "b").iterdir())) == 3


def test_threads_share_it(full: Path, uncached: tuple[FederationState, list[Record]]) -> None:
    state, records, _ = cached(full, "execution.executor=threads", "execution.workers=2")
    assert same_state(state, uncached[0])
    assert untimed(records) == untimed(uncached[1])
    assert len(list(full.iterdir())) == 3


def test_the_steps_are_counted_though_they_are_not_taken(full: Path) -> None:
    federation, _ = build(small(*KEYS, f"fedmd.pretraining_cache={full}"))
    without, _ = build(small(*KEYS))
    models = [one.model for one in federation.architectures]
    for client in range(3):
        ours, theirs = (one.trainer(models, one.work(one.start(), client)) for one in (federation, without))
        assert ours.steps == theirs.steps > 0
        assert "from" in ours.notes[0]
        assert theirs.notes == ()


# What it is for, and what not


@pytest.mark.parametrize(
    "keys",
    [
        ("data.samples_per_class=4",),
        ("data.classes_per_client=2",),
        ("data.pooled=true",),
        ("fedmd.private_epochs=3", "fedmd.revisit_epochs=1", "fedmd.digest_epochs=0", "fedmd.align_samples=7"),
        ("fedmd.min_delta=0.5",),  # means nothing without patience
        ("execution.client_states=disk",),
    ],
)
def test_what_the_phase_does_not_depend_on(full: Path, keys: tuple[str, ...]) -> None:
    assert learnt(full, *keys) == 0


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        (("fedmd.public_epochs=3",), 3),
        (("fedmd.public_batch_size=19",), 3),
        (("fedmd.lr=0.002",), 3),
        (("fedmd.adam=keras",), 3),
        (("fedmd.head_decay=0.0",), 3),
        (("fedmd.patience=5",), 3),
        (("seed.train=1",), 3),
        (("seed.data=1",), 3),  # other public samples
        (("public.samples=89",), 3),
        (("public.seed=9",), 3),
        (("data.classes=[6, 7, 8]",), 3),  # other outputs
        (("model.2.hidden=[8]",), 1),
    ],
)
def test_what_it_depends_on(full: Path, keys: tuple[str, ...], count: int) -> None:
    assert learnt(full, *keys) == count


def test_seeds_of_the_private_data_share_it_where_the_study_fixes_the_others(tmp_path: Path) -> None:
    fixed = ("public.seed=0", "seed.train=0")
    assert [learnt(tmp_path, *fixed, f"seed.data={seed}") for seed in range(3)] == [3, 0, 0]


def test_layers_of_the_same_name_with_other_numbers_are_other_models(full: Path) -> None:
    federation, _ = build(small(*KEYS, f"fedmd.pretraining_cache={full}"))
    models = [one.model for one in federation.architectures]
    for part in models[1].module.modules():
        if hasattr(part, "p"):
            part.p = 0.4
    result = federation.trainer(models, federation.work(federation.start(), 1))
    assert result.notes == ()
    assert len(list(full.iterdir())) == 4


def test_rounding_depends_on_threads_and_precision() -> None:
    cpu = torch.device("cpu")
    before = machine(cpu)
    with intra_op_threads(torch.get_num_threads() + 1):
        assert machine(cpu) != before
    with torch.autocast("cpu", torch.bfloat16):
        assert machine(cpu) != before
    assert machine(cpu) == before


def test_a_model_that_draws_from_the_stream_of_the_process_is_not_stored(tmp_path: Path) -> None:
    own = [f"model.name={__name__}:stock_dropout", f"fedmd.pretraining_cache={tmp_path / 'cache'}"]
    keys = [key for key in KEYS if not key.startswith("model=")]
    run(small(*keys, *own, "train.rounds=1"), directory=tmp_path / "run")
    assert "client 2: its phase on the public set is not cached: Dropout" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "cache").exists()


# Files


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_broken_file_is_said_and_made_again(
    full: Path, tmp_path: Path, uncached: tuple[FederationState, list[Record]], damage: str
) -> None:
    before = {file.name: file.read_bytes() for file in full.iterdir()}
    name = min(before)
    whole = before[name]
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    (full / name).write_bytes({"cut": whole[: len(whole) // 2], "flipped": flipped, "empty": b""}[damage])
    result = run(small(*KEYS, f"fedmd.pretraining_cache={full}"), directory=tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"{full / name} is damaged, its SHA-256 is not its own; its phase on the public set is done") == 1
    assert log.count("its phase on the public set is from") == 2
    assert untimed(result.records) == untimed(uncached[1])
    assert {file.name: file.read_bytes() for file in full.iterdir()} == before


def test_a_run_goes_on_with_another_cache_or_none(
    tmp_path: Path, uncached: tuple[FederationState, list[Record]]
) -> None:
    path = tmp_path / "run"
    run(small(*KEYS, f"fedmd.pretraining_cache={tmp_path / 'cache'}", "checkpoint.keep=9"), directory=path)
    for file in (path / "checkpoints").glob("round-0000[23].json"):
        file.unlink()
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace(str(tmp_path / "cache"), str(tmp_path / "elsewhere")))
    assert untimed(resume(path).records) == untimed(uncached[1])
    assert difference(small(*KEYS), RunDirectory.read_config(path)) is None


def test_many_at_once_see_whole_files_only(tmp_path: Path) -> None:
    cache = PretrainingCache(tmp_path)
    one = Pretrained(Weights({"w": torch.arange(50_000.0)}, {}), 7, None)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            cache.store("key", one)

    cache.store("key", one)
    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            found = cache.load("key")
            assert found is not None
            assert torch.equal(found.weights.params["w"], one.weights.params["w"])
            assert (found.steps, found.layers, found.weights.buffers) == (7, None, {})
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [file.name for file in tmp_path.iterdir()] == ["key.pretrained"]


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_learnt(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with watched() as seen, pytest.raises(RunError, match="file: cannot be written"):
        play(*KEYS, f"fedmd.pretraining_cache={tmp_path / 'file'}")
    assert not seen

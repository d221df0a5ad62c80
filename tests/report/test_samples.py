"""What a run's generator makes, beside real samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedstill import Result, run
from fedstill.data import load_raw
from fedstill.distill.inputs import initial_generator, kept_generator
from fedstill.errors import InputError
from fedstill.report import samples
from fedstill.report.html import sections, write_report
from fedstill.report.html.content import gathered
from fedstill.report.html.grids import tiled
from fedstill.report.samples import ClassSamples, class_samples, has_generator
from fedstill.rng import torch_stream
from fedstill.runs.checkpoint import newest_state
from fedstill.studies.results import RunData, read_run
from invented import METHODS, write_study
from small import small

KEYS = ["method=fedavg+fedftg", "train.rounds=1", "data.train_samples=100"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(small(*KEYS), directory=tmp_path_factory.mktemp("samples") / "run")


@pytest.fixture
def found(done: Result) -> RunData:
    assert done.directory is not None
    return read_run(done.directory)


def test_they_are_the_last_generators_own(found: RunData) -> None:
    shown = class_samples(found, 10, 3, 2)
    assert shown is not None
    assert shown.made.shape == (10, 3, 8, 8, 1)
    assert (shown.classes, shown.class_names, shown.round) == (tuple(range(10)), tuple("0123456789"), 1)
    state = newest_state(found.path)
    assert state is not None
    keys = found.config.fedftg
    made = initial_generator(0, keys.noise_dim, keys.generator_width, 10, (1, 8, 8), torch.device("cpu"))
    generator = kept_generator(made, state.models[0].refinements[0], torch.float32).eval()
    noise = torch.randn((30, keys.noise_dim), generator=torch_stream(0, "report-samples"))
    with torch.no_grad():
        images = generator(noise, torch.arange(10).repeat_interleave(3))
    raw = load_raw("digits")
    pixels = (images * raw.std[0] + raw.mean[0]).clamp(0, 1)
    assert np.allclose(shown.made.reshape(30, 8, 8), pixels[:, 0].numpy(), atol=1e-6)


def test_real_ones_are_of_their_class(found: RunData) -> None:
    shown = class_samples(found, 10, 3, 2)
    assert shown is not None
    assert shown.real is not None
    raw = load_raw("digits")
    for label in range(10):
        first = raw.x_train[raw.y_train == label][:2] / raw.scale
        assert np.allclose(shown.real[label, ..., 0], first)


def test_of_many_classes_some_are_shown_evenly(found: RunData) -> None:
    shown = class_samples(found, 4, 1, 1)
    assert shown is not None
    assert shown.classes == (0, 3, 6, 9)


def test_without_the_data_the_page_says_why(found: RunData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*of: object) -> None:
        raise InputError("the data are elsewhere")

    monkeypatch.setattr(samples, "_raw", missing)
    shown = class_samples(found, 10, 3, 2)
    assert shown is not None
    assert shown.real is None
    page = write_report(found.path, tmp_path / "report").read_text()
    assert "What the generator makes" in page
    assert "Real samples are left out: the data are elsewhere." in page


def test_what_has_none(found: RunData, tmp_path: Path) -> None:
    def made(*keys: str) -> RunData:
        return RunData(tmp_path, small(*keys), found.records, "", None, {})

    assert has_generator(made(*KEYS))
    assert not has_generator(made("method=fedavg"))
    assert not has_generator(made(*KEYS, "fedftg.inputs=noise"))
    assert not has_generator(made(*KEYS, "fedftg.level=feature"))
    assert class_samples(made(*KEYS), 10, 3, 2) is None, "no checkpoint is left"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "round-00001.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        newest_state(tmp_path)
    assert class_samples(made(*KEYS), 10, 3, 2) is None


def test_a_grid_has_classes_downwards_and_gaps_that_show_nothing() -> None:
    grey = np.arange(2 * 3, dtype=np.float32).reshape(2, 3, 1, 1, 1) / 6
    sheet = tiled(grey)
    assert np.ma.getmaskarray(sheet)[:, 1].all()
    assert np.allclose(sheet[::2, ::2], grey[..., 0, 0, 0])
    colour = tiled(np.repeat(grey, 3, axis=-1))
    assert colour.shape == (4, 6, 4)
    assert colour[0, :, 3].tolist() == [1, 0, 1, 0, 1, 0]


def test_every_table_has_its_turn_before_a_second_of_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(tmp_path / "study", METHODS, seeds=[0], rounds=2, betas=[0.1, 0.3])
    content = gathered([study], title=None, on="test", baseline=None, anyway=False)
    asked: list[tuple[float | None, str, int, int]] = []

    def made(run: RunData, classes: int, each: int, real: int) -> ClassSamples:
        asked.append((run.config.data.beta, run.config.method, each, real))
        images = np.zeros((classes, each, 8, 8, 1), np.float32)
        return ClassSamples(images, images[:, :real] if real else None, tuple(range(classes)), ("?",) * classes, 2)

    monkeypatch.setattr(sections, "class_samples", made)
    # Ten classes of 8 x 8 are 640 values: three images and a real one of two methods, then three of another.
    monkeypatch.setattr(sections, "SAMPLE_VALUES", (4 + 4 + 3) * 640 + 100)
    found, left_out = sections._that_fit(content)
    assert asked == [(0.1, "fedavg+fedftg", 3, 1), (0.3, "fedavg+fedftg", 3, 1), (0.1, "scaffold+fedftg", 3, 0)]
    assert len(found) == 3
    assert left_out == 1
    asked.clear()
    monkeypatch.setattr(sections, "SAMPLE_VALUES", 640 * (2 * (8 + 4) + 2 * 8))
    found, left_out = sections._that_fit(content)
    assert [(each, real) for *_, each, real in asked] == [(8, 4), (8, 4), (8, 0), (8, 0)]
    assert (len(found), left_out) == (4, 0)

"""What a run's generator makes of each class, beside real samples: for simulation only, no server has these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedstill.data import RawDataSet, load_raw
from fedstill.data.sources import source_of
from fedstill.distill.inputs import initial_generator, kept_generator
from fedstill.distill.loop import generated
from fedstill.errors import InputError
from fedstill.rng import torch_stream
from fedstill.runs.checkpoint import newest_state
from fedstill.studies.results import RunData
from fedstill.weights import Tensors

Images = npt.NDArray[np.float32]
METHOD = "fedftg"


@dataclass(frozen=True)
class ClassSamples:
    """Images by class: the generator's, and real ones.

    Parameters
    ----------
    made : float32 array, (classes, columns, H, W, 1 or 3)
        The generator's images, 0 to 1.
    real : float32 array of the same form, or None
        None where the data were not found.
    classes, class_names : tuple
        As the run numbers them, and their names.
    round : int
        The checkpoint's.
    model : str
        Which model's generator it is, where there are several.
    missing : str
        Why there are no real samples.
    """

    made: Images
    real: Images | None
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    round: int
    model: str = ""
    missing: str = ""


def has_generator(run: RunData) -> bool:
    """Say whether a run's method is one whose generator makes inputs."""
    keys = run.config.fedftg
    return _place(run) is not None and keys.inputs == "generator" and keys.level == "input" and keys.iterations > 0


def class_samples(run: RunData, classes: int, made: int, real: int) -> ClassSamples | None:
    """Return samples of a run's last generator, the first architecture's where there are several.

    Parameters
    ----------
    run : RunData
    classes : int
        At most so many; of more, evenly spaced ones.
    made, real : int
        Images of each class; with ``real`` 0 there are no real ones, and none are missing.

    Returns
    -------
    ClassSamples or None
        None where the run has no generator, or its checkpoint is gone or cannot be read.
    """
    place = _place(run)
    if place is None or not has_generator(run):
        return None
    try:
        state = newest_state(run.path)
        source = source_of(run.config.data.name)
    except InputError:
        return None
    kept = state.models[0].refinements[place] if state is not None else {}
    if state is None or "generator" not in kept:
        return None
    weights = kept["generator"]
    data, outputs = run.config.data, weights["from_label.weight"].shape[1]
    names = source.class_names if data.classes is None else tuple(source.class_names[own] for own in data.classes)
    shown = tuple(int(label) for label in np.unique(np.linspace(0, len(names) - 1, min(classes, len(names))).round()))
    height, width, *channels = source.shape
    first = outputs - len(names)  # public classes with outputs of their own stand before
    x = _made(run, weights, (*(channels or [1]), height, width), [first + label for label in shown], made)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))
    found, missing = _real(run, shown, real) if real else (None, "")
    return ClassSamples(
        _by_class(x * std + mean, len(shown)),
        found,
        shown,
        tuple(names[label] for label in shown),
        state.round,
        run.config.model[0].name if len(run.config.model) > 1 else "",
        missing,
    )


def _place(run: RunData) -> int | None:
    """Return where among a method's refinements FedFTG stands."""
    refinements = [part.strip() for part in run.config.method.split("+")][1:]
    return refinements.index(METHOD) if METHOD in refinements else None


def _made(run: RunData, weights: Tensors, shape: tuple[int, ...], labels: Sequence[int], each: int) -> Tensor:
    keys, dtype = run.config.fedftg, weights["from_noise.weight"].dtype
    outputs = weights["from_label.weight"].shape[1]
    new = initial_generator(0, keys.noise_dim, keys.generator_width, outputs, shape, torch.device("cpu"))
    generator = kept_generator(new, {"generator": weights}, dtype)
    y = torch.tensor(labels).repeat_interleave(each)
    noise = torch.randn((len(y), keys.noise_dim), generator=torch_stream(0, "report-samples"), dtype=dtype)
    return generated(generator, keys).batch(y, noise)[0].float()


def _real(run: RunData, classes: Sequence[int], each: int) -> tuple[Images | None, str]:
    data = run.config.data
    try:
        raw = _raw(data.name, Path(data.root) if data.root else None, data.classes)
    except InputError as error:
        return None, str(error)
    first = [np.flatnonzero(raw.y_train == label)[:each] for label in classes]
    if any(len(rows) < each for rows in first):
        return None, f"{data.name} has fewer than {each} training samples of a class"
    x = raw.x_train[np.concatenate(first)].astype(np.float32) / raw.scale
    return x.reshape(len(classes), each, *raw.shape[1:], raw.shape[0]), ""


@lru_cache(maxsize=2)
def _raw(name: str, root: Path | None, classes: tuple[int, ...] | None) -> RawDataSet:
    return load_raw(name, root, classes)


def _by_class(x: Tensor, classes: int) -> Images:
    images: Images = x.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()
    return images.reshape(classes, -1, *images.shape[1:])

"""Image data sets in memory: as stored (uint8) and as the models take them (normalised float32)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedstill.errors import InputError

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
Indices = IntArray | Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class Samples:
    """Images and their labels, on one device.

    Attributes
    ----------
    x : Tensor, (N, C, H, W) float32
        Normalised images.
    y : Tensor, (N,) int64
        Labels from 0.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Indices) -> Samples:
        """Return a copy of the samples at ``indices`` (n,), in that order, on the same device."""
        at = torch.as_tensor(indices, dtype=torch.int64, device=self.x.device)
        return Samples(self.x[at], self.y[at])

    def to(self, device: torch.device | str) -> Samples:
        """Return the samples on ``device``; nothing is copied when they are there already."""
        return Samples(self.x.to(device), self.y.to(device))

    def source(self, at: Iterable[Tensor]) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
        """Return images, labels, and the given positions as positions in these."""
        return self.x, self.y, at


class Share:
    """A client's part of all samples, which reads like samples of its own and is copied only when they are asked for.

    Parameters
    ----------
    everyone : Samples
    rows : Tensor, (n,) int64
        The client's positions among them, on their device.
    """

    def __init__(self, everyone: Samples, rows: Tensor) -> None:
        self.everyone = everyone
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def x(self) -> Tensor:
        """The client's images, (n, C, H, W)."""
        return self.everyone.x[self.rows]

    @cached_property
    def y(self) -> Tensor:
        """Their labels, (n,)."""
        return self.everyone.y[self.rows]

    def source(self, at: Iterable[Tensor]) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
        """Return everyone's images and labels, and the given positions as positions in these."""
        return self.everyone.x, self.everyone.y, (self.rows[one] for one in at)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A whole data set, normalised.

    Attributes
    ----------
    name : str
        Name of the source.
    train, test : Samples
        The official parts; ``test`` is empty where the source has no official split.
    num_classes : int
        Number of classes.
    class_names : tuple of str
        One name per class.
    mean, std : tuple of float
        The normalisation applied, one value per channel, of pixels scaled to [0, 1].
    """

    name: str
    train: Samples
    test: Samples
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a sample."""
        return _three(tuple(self.train.x.shape[1:]))


@dataclass(frozen=True, eq=False)
class RawDataSet:
    """A data set as its file has it; only the samples that are asked for become float32.

    Attributes
    ----------
    name : str
        Name of the source.
    x_train, x_test : uint8 array, (N, H, W) or (N, H, W, C)
        Images.
    y_train, y_test : int64 array, (N,)
        Labels from 0.
    class_names : tuple of str
        One name per class.
    mean, std : tuple of float
        Normalisation, one value per channel, of pixels divided by ``scale``.
    scale : float
        The pixel value that stands for 1.
    held_out : int
        For a source without an official split (``x_test`` empty): how many samples of ``x_train`` are
        kept for testing.
    subclasses : int64 array, (N,), or None
        Of each training sample, a label finer than its class; None where there is none.
    """

    name: str
    x_train: ByteArray
    y_train: IntArray
    x_test: ByteArray
    y_test: IntArray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    held_out: int = 0
    subclasses: IntArray | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a sample."""
        height, width, *channels = self.x_train.shape[1:]
        return _three((*(channels or [1]), height, width))

    def train(self, indices: IntArray | None = None) -> Samples:
        """Return the training samples at ``indices`` (n,), or all of them, normalised."""
        return self._samples(self.x_train, self.y_train, indices)

    def test(self, indices: IntArray | None = None) -> Samples:
        """Return the test samples at ``indices`` (n,), or all of them, normalised."""
        return self._samples(self.x_test, self.y_test, indices)

    def only(self, classes: Sequence[int]) -> RawDataSet:
        """Return the samples of some classes, renumbered 0, 1, ... in the order given, training and test alike.

        The samples keep their order and the normalisation that of the whole set. Where part of the training
        samples is kept for testing, ``held_out`` becomes the same part of fewer samples, rounded, at least 1.

        Raises
        ------
        InputError
            For fewer than 2 classes, and for classes that there are not or that stand there twice.
        """
        known = range(self.num_classes)
        wrong = [label for place, label in enumerate(classes) if label not in known or label in classes[:place]]
        if wrong or len(classes) < 2:
            raise InputError(
                f"classes {list(classes)} of {self.name}: name 2 or more of 0 to {self.num_classes - 1}, each once"
                f"{f', which {wrong[0]} is not' if wrong else ''}; correct data.classes (or public.classes)"
            )
        number = np.full(self.num_classes, -1)
        number[list(classes)] = np.arange(len(classes))
        train, test = (np.flatnonzero(number[y] >= 0) for y in (self.y_train, self.y_test))
        held_out = round(self.held_out * len(train) / len(self.y_train))
        return replace(
            self,
            x_train=self.x_train[train],
            y_train=number[self.y_train[train]],
            x_test=self.x_test[test],
            y_test=number[self.y_test[test]],
            class_names=tuple(self.class_names[label] for label in classes),
            held_out=max(1, held_out) if self.held_out else 0,
            subclasses=None if self.subclasses is None else self.subclasses[train],
        )

    def normalised(self) -> DataSet:
        """Return the whole set as float32."""
        return DataSet(self.name, self.train(), self.test(), self.num_classes, self.class_names, self.mean, self.std)

    def _samples(self, x: ByteArray, y: IntArray, indices: IntArray | None) -> Samples:
        if indices is not None:
            x, y = x[indices], y[indices]
        pixels = torch.from_numpy(x)
        pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        # A new tensor even where x is the whole stored array: the in-place steps below must not reach it.
        values = torch.empty(pixels.shape, dtype=torch.float32).copy_(pixels)
        mean, std = (torch.tensor(constants).view(-1, 1, 1) for constants in (self.mean, self.std))
        values.div_(self.scale).sub_(mean).div_(std)
        return Samples(values, torch.from_numpy(np.array(y, dtype=np.int64)))


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width

"""A folder of image files as a set without labels, such as the server's in FedDF."""

from __future__ import annotations

import struct
import tokenize
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image  # needed by matplotlib too, so that it is always there
from torch import Tensor

from fedstill.data.dataset import ByteArray
from fedstill.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".npy")

_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
# What Pillow and NumPy were seen to raise on damaged files, or say that they raise.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, tokenize.TokenError, zlib.error)


def read_folder(path: Path | str, shape: tuple[int, int, int]) -> ByteArray:
    """Read every image under a folder, in the order of the paths below it.

    Files with the suffixes .png, .jpg, .jpeg, .webp and .npy are read, in capitals too; others are left alone. A
    .npy file holds one uint8 image, (H, W), (H, W, 1) or (H, W, 3). Grey images become colour and colour images
    grey, as ``shape`` asks; a layer of transparency is dropped. Nothing is resized.

    Parameters
    ----------
    path : Path or str
        The folder; folders in it are searched too.
    shape : (int, int, int)
        Channels (1 or 3), height and width that every image must have.

    Returns
    -------
    uint8 array, (N, H, W, C)
        Not normalised yet.

    Raises
    ------
    InputError
        For a folder that is missing or has no image; a file that is unreadable or of another size or type, which
        it names; a shape that cannot be.
    """
    channels, height, width = shape
    if channels not in (1, 3) or height < 1 or width < 1:
        raise InputError(f"images are read as (1, H, W) or (3, H, W), not as {tuple(shape)}")
    files = _image_files(Path(path).expanduser())
    pixels = np.empty((len(files), height, width, channels), np.uint8)
    for number, file in enumerate(files):
        pixels[number] = _read(file, (channels, height, width))
    return pixels


def normalised(pixels: ByteArray, path: Path | str) -> Tensor:
    """Return a folder's images as (N, C, H, W), by the mean and the standard deviation of all, by channel.

    Raises
    ------
    InputError
        For images whose pixels are all alike.
    """
    count, height, width, channels = pixels.shape
    # Copied out of the view with the channels last, so that the batches are laid out as those of other sources.
    x = torch.empty((count, channels, height, width)).copy_(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    x.div_(255)
    mean, std = _constants(x, Path(path))
    return x.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _constants(x: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of images (N, C, H, W)."""
    if bool((x.amin(dim=(0, 2, 3)) == x.amax(dim=(0, 2, 3))).any()):
        raise InputError(
            f"{path}: all pixels of a channel are equal, which gives no std to divide by; take images that differ"
        )
    std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
    return mean, std


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name one with images ({', '.join(SUFFIXES)})")
    found = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    if not found:
        raise InputError(f"{folder} has no image in it or below it ({', '.join(SUFFIXES)})")
    # By the text of the path, which sorts alike on every system.
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _read(file: Path, shape: tuple[int, int, int]) -> ByteArray:
    """Return one image (H, W, C) of the channels and the size that are asked for."""
    channels, height, width = shape
    try:
        opened = _from_npy(file) if file.suffix.lower() == ".npy" else Image.open(file)
        with opened as image:
            if image.mode not in _EIGHT_BITS:
                raise InputError(f"{file}: its pixels are of Pillow's mode {image.mode}; 8 bits a channel are needed")
            if image.size != (width, height):
                raise InputError(
                    f"{file} is {image.size[1]} pixels high and {image.size[0]} wide, and {height} x {width} are "
                    f"asked for: scale the images first, or take it out of the folder"
                )
            return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(height, width, channels)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as an image, it is damaged or something else ({error})") from error


def _from_npy(file: Path) -> Image.Image:
    """Return the image in a .npy file; a ValueError says what does not fit."""
    stored = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(stored, np.ndarray):
        raise ValueError("it is an npz file, not an npy file")
    if stored.dtype != np.uint8 or not (stored.ndim == 2 or (stored.ndim == 3 and stored.shape[2] in (1, 3))):
        raise ValueError(f"it must be uint8 (H, W), (H, W, 1) or (H, W, 3), it is {stored.dtype} {stored.shape}")
    return Image.fromarray(np.array(stored[..., 0] if stored.ndim == 3 and stored.shape[2] == 1 else stored))

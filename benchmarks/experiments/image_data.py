"""Images that need no download: UCI digits with scikit-learn; MNIST and Fashion-MNIST from IDX files.

IDX files (https://yann.lecun.com/exdb/mnist) are looked for, compressed by gzip or not, in the directory that is given
and in the places below; Debian's package dataset-fashion-mnist installs Fashion-MNIST there.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets")
FOLDERS = {
    "mnist": (".", "mnist", "MNIST/raw"),
    "fashion-mnist": (".", "fashion-mnist", "FashionMNIST/raw"),
}
NAMES = ("digits", *FOLDERS)
TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
HELD_OUT = 297  # digits


@dataclass(frozen=True)
class Images:
    """Grey images of shape (n, 1, height, width), whole numbers from 0 to `levels` - 1 as float32; labels 0 to 9."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    levels: int


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """An array from an IDX file, which gzip may have compressed."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES:
        raise ValueError(f"{path} is not an IDX file")
    dtype, dimensions = np.dtype(TYPES[content[2]]), content[3]
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    if len(content) - start != dtype.itemsize * int(np.prod(shape)):
        raise ValueError(f"{path} holds {len(content) - start} bytes, which is not a {dtype} array of shape {shape}")
    return np.frombuffer(content[start:], dtype).reshape(shape)


def find_idx(folder: Path, part: str, kind: str) -> Path | None:
    """The file of `part` ("train", "t10k") and `kind` ("images-idx3", "labels-idx1") under one of its usual names."""
    for separator in ("-", "."):
        for suffix in (".gz", ""):
            path = folder / f"{part}-{kind.replace('-idx', separator + 'idx')}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def mnist(name: str, directory: Path | None) -> Images | None:
    """MNIST or Fashion-MNIST, or None if there are no files."""
    for root in (directory, DEBIAN) if directory else (DEBIAN,):
        for folder in FOLDERS[name] if root == directory else FOLDERS[name][1:]:
            paths = [
                find_idx(root / folder, part, kind)
                for part in ("train", "t10k")
                for kind in ("images-idx3", "labels-idx1")
            ]
            if all(paths):
                train, train_labels, test, test_labels = (torch.from_numpy(read_idx(p).astype(np.int64)) for p in paths)
                return Images(train[:, None].float(), train_labels, test[:, None].float(), test_labels, levels=256)
    return None


def digits(side: int = 8) -> Images:
    """The 1797 digits of 8x8 pixels and 17 grey levels that scikit-learn ships; enlarged if another side is given."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8)
    if side != 8:
        images = torch.nn.functional.interpolate(images, size=side, mode="bilinear").round()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order].long()
    return Images(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT], levels=17)


def load(name: str, directory: Path | None) -> tuple[Images, str]:
    """The images, or a stand-in of the same size if the files are not there; and a line that says which."""
    if name == "digits":
        images = digits()
        return images, f"digits: {len(images.train)} training images of 8x8 pixels from scikit-learn"
    images = mnist(name, directory)
    if images is not None:
        return images, f"{name}: {len(images.train)} training images"
    looked = " or ".join(str(root) for root in (directory, DEBIAN) if root)
    return digits(28), f"{name}: no IDX files in {looked}; a stand-in: scikit-learn's digits enlarged to 28x28 pixels"

"""CelebA-HQ at 256 pixels, which circulates in several forms; which one it was is kept with the data.

The folder ``celebahq256``, in the mirror or among the downloads, holds the first of these that is there:

- ``images.npy``: bytes (n, 3, 256, 256) or (n, 256, 256, 3);
- GLOW's TFRecords, ``train-r08-*.tfrecords`` and ``validation-r08-*.tfrecords`` at any depth, on which NVAE was trained;
- ``images.zip`` or a folder ``images``: PNG or JPEG, all of one size, which is 256 pixels or 2, 4 or 8 times that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import decoding, tfrecords
from datasets.mnist import MIRROR
from datasets.pictures import cut_for, decoded, place, provenance, refuse_count, rows_at_once, splits
from datasets.registry import Prepared, Request
from runtime.errors import UserError, first_line

LEVEL = "r08"  # 2^8 pixels


@dataclass(frozen=True)
class Images:
    """Images that are there as pixels: where, how many, and what reads some of them, uint8 (rows, *shape)."""

    place: Path
    count: int
    read: Callable[[range], np.ndarray]


def prepare(request: Request, counts: Mapping[str, int]) -> Prepared:
    """The three splits, in the order that the images have: by the numbers in their names, or in their file.

    NVAE has 27 000 training images and 3 000 for validation. The latter are what numbers are reported on, and are the test
    images here; the last 1 000 of the former are for validation. Only the TFRecords say which 3 000 they are: of the other
    sources, the last. The union of all splits is the same in every case.

    Args:
        request: of the data set.
        counts: images of ``train``, ``validation`` and ``test``.

    Raises:
        UserError: naming the file that is missing, incomplete or broken.
    """
    folder = place(request, "celebahq256")
    if (folder / "images.npy").exists():
        return _direct(request, counts, _array(folder / "images.npy", request.shape), {"source": "npy", "jpeg": None})
    if shards := sorted(folder.rglob(f"*-{LEVEL}-*.tfrecords")):
        return _direct(request, counts, _recorded(shards, request.shape, counts), {"source": "TFRecords", "jpeg": False})
    return _of_pictures(request, counts, folder)


def _of_pictures(request: Request, counts: Mapping[str, int], folder: Path) -> Prepared:
    where = (
        f"{MIRROR} must name a folder whose celebahq256/ holds images.zip, a folder images, images.npy, or GLOW's "
        f"*-{LEVEL}-*.tfrecords"
    )
    pictures, side = decoding.pictures(folder, "images", where), request.shape[1]
    refuse_count(pictures.place, len(pictures.names), sum(counts.values()))
    label = pictures.label(pictures.names[0])
    width, height = decoding.size_of(label, pictures.read(pictures.names[0]))
    if width != height or width not in (side * times for times in (1, 2, 4, 8)):
        raise UserError(
            f"{label} has {width}x{height} pixels, not {side}x{side} or 2, 4 or 8 times that; replace it, and fetch again"
        )
    rows = decoded(request, "images", pictures, pictures.names, cut_for(request.shape, (width, height)))
    found = provenance([pictures])
    found["source"] += f", {width}x{height}" + (f" scaled to {side}x{side}" if width > side else "")
    return Prepared(splits(request.shape, rows, counts), found)


def _direct(request: Request, counts: Mapping[str, int], images: Images, provenance: Mapping[str, Any]) -> Prepared:
    """The splits of images that are there as pixels: they are copied, which needs no scratch."""
    refuse_count(images.place, images.count, sum(counts.values()))
    step, done = rows_at_once(request.shape), 0

    def rows(wanted: range) -> Iterator[Tensor]:
        nonlocal done
        for first in range(wanted.start, wanted.stop, step):
            part = range(first, min(first + step, wanted.stop))
            yield torch.from_numpy(images.read(part))
            done += len(part)
            request.report(done, images.count, "")

    return Prepared(splits(request.shape, rows, counts), provenance)


def _array(path: Path, shape: Sequence[int]) -> Images:
    """Of one array in a NumPy file, mapped. Raises UserError: it is none of such images."""
    try:
        array = np.load(path, mmap_mode="c")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is truncated or no array ({first_line(error)}); replace it, and fetch again") from error
    channels, height, width = shape
    last = array.shape[1:] == (height, width, channels)
    if array.dtype != np.uint8 or not (last or array.shape[1:] == tuple(shape)):
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, not uint8 (n, {height}, {width}, {channels}); replace it"
        )

    def read(rows: range) -> np.ndarray:
        found = array[rows.start : rows.stop]
        return np.ascontiguousarray(found.transpose(0, 3, 1, 2) if last else found)

    return Images(path, len(array), read)


def _recorded(shards: Sequence[Path], shape: Sequence[int], counts: Mapping[str, int]) -> Images:
    """Of GLOW's shards: those of training, then those of validation. Raises UserError: there are more or fewer of either."""
    found: list[tuple[Path, int, int]] = []
    for part, wanted in {"train": sum(counts.values()) - counts["test"], "validation": counts["test"]}.items():
        own = [(path, *record) for path in shards if path.name.startswith(part) for record in tfrecords.records(path)]
        refuse_count(shards[0].parent.parent / f"*/{part}-{LEVEL}-*.tfrecords", len(own), wanted)
        found += own

    def read(rows: range) -> np.ndarray:
        return np.stack([_image(*found[row], shape) for row in rows])

    return Images(shards[0].parent, len(found), read)


def _image(path: Path, begin: int, length: int, shape: Sequence[int]) -> np.ndarray:
    """One record's image, which GLOW keeps as bytes (height, width, channels)."""
    channels, height, width = shape
    with open(path, "rb") as file:
        file.seek(begin)
        content = file.read(length)
    try:
        example = tfrecords.features(content)
        if example["shape"] != [height, width, channels]:
            raise ValueError(f"an image of {example['shape']}, not {[height, width, channels]}")
        data = b"".join(value for value in example["data"] if isinstance(value, bytes))
        return np.frombuffer(data, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
    except Exception as error:  # what is no such example can raise anything
        raise UserError(f"{path}, at byte {begin}: no image of CelebA-HQ ({first_line(error)}); replace the file") from error

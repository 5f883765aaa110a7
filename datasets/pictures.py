"""What the data sets of images have in common: where they lie, decoding them by all cores, and making splits of them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import decoding
from datasets.decoding import Cut, Pictures
from datasets.mnist import MIRROR
from datasets.registry import Request, source_for
from runtime import checkpoints, interruption, processes, rowfiles
from runtime.arrays import Blocks
from runtime.errors import UserError
from runtime.identity import Identity

BYTES_AT_ONCE = 2**25
"""Of pixels: what a kill can cost, and what is in memory at a time."""

Rows = Callable[[range], Iterator[Tensor]]
"""A stretch of images, uint8 (n, channels, height, width), in blocks."""


def place(request: Request, name: str) -> Path:
    """The folder that holds a data set's files: in the mirror that the user names, else among the downloads."""
    mirror = os.environ.get(MIRROR)
    return Path(mirror) / name if mirror else request.raw / name


def require_original(path: Path, checksum: str, where: str) -> None:
    """Hold a file against its md5.

    Args:
        path: the file.
        checksum: its md5.
        where: what to do if it is another one, for the message.

    Raises:
        UserError: it is missing, a web page, or not the original.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {where}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != checksum:
        decoding.refuse_page(path, where)
        raise UserError(f"{path} is corrupt, partial or not the original (its md5 differs); delete it, and {where}")


def cut_for(shape: Sequence[int], size: Sequence[int] | None = None, box: Sequence[int] | None = None) -> Cut:
    """What becomes images of a shape (channels, height, width), out of ones of a size (width, height), that shape's if None.

    ``box`` is (left, top, right, bottom) in them.
    """
    channels, height, width = shape
    original = (width, height) if size is None else (size[0], size[1])
    corners = None if box is None else (box[0], box[1], box[2], box[3])
    return Cut("RGB" if channels == 3 else "L", original, corners, (width, height))


def rows_at_once(shape: Sequence[int]) -> int:
    """Images of a shape in BYTES_AT_ONCE."""
    return max(1, BYTES_AT_ONCE // int(np.prod(shape)))


def decoded(request: Request, name: str, pictures: Pictures, names: Sequence[str], cut: Cut) -> Rows:
    """Decode images into files of some thousand rows in the scratch folder, going on from those that are there.

    Args:
        request: of the data set.
        name: of these images within it.
        pictures: where they are.
        names: which of them, in the order that they are to have.
        cut: what is taken of each.

    Returns:
        What reads the files.

    Raises:
        UserError: an image is broken (:func:`datasets.decoding.stack`), or the disk is full.
    """
    folder, block, made_by = request.scratch / name, rows_at_once(request.shape), "the same command again"
    config = {"pictures": pictures.stamp, "names": _digest(names), "cut": repr(cut)}
    identity = Identity(request.name, 0, config, source_for(request.name, __name__))
    with processes.pool(request.workers) if request.workers > 1 else nullcontext() as pool:

        def compute(rows: range) -> dict[str, Tensor]:
            shares = torch.arange(rows.start, rows.stop).chunk(4 * request.workers)
            work = ([(pictures.label(names[i]), pictures.read(names[i])) for i in share.tolist()] for share in shares)
            if pool is None:
                found = [decoding.stack(images, cut) for images in work]
            else:
                with interruption.left_to_this_process():  # workers are started as work is submitted
                    futures = [pool.submit(decoding.stack, images, cut) for images in work]
                found = [future.result() for future in futures]
            return {"x": torch.from_numpy(np.concatenate(found))}

        rowfiles.fill(folder, identity, len(names), block, block, compute, request.report)
    files = rowfiles.stored(folder, made_by)

    def rows(wanted: range) -> Iterator[Tensor]:
        for file in files:
            first, last = max(wanted.start, file.rows.start), min(wanted.stop, file.rows.stop)
            if first < last:
                yield checkpoints.load(file.path, made_by)[0]["x"][first - file.rows.start : last - file.rows.start]

    return rows


def splits(shape: Sequence[int], rows: Rows, counts: Mapping[str, int], first: int = 0) -> dict[str, Blocks]:
    """Consecutive stretches of images as a data set's splits.

    Args:
        shape: of an image.
        rows: the images.
        counts: how many each split has, in the order that they lie in.
        first: where the first one begins.
    """
    found = {}
    for split, count in counts.items():
        found[split] = Blocks((count, *shape), torch.uint8, rows(range(first, first + count)))
        first += count
    return found


def _digest(names: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()


def provenance(sources: Sequence[Pictures]) -> dict[str, Any]:
    """What is to be known of encoded images (:class:`datasets.registry.Prepared`)."""
    formats = sorted({kind for source in sources for kind in source.formats})
    kind = "folder" if sources[0].place.is_dir() else "zip"
    return {"source": f"{kind} of {' and '.join(formats)} images", "jpeg": "JPEG" in formats}


def refuse_count(where: Path, found: int, wanted: int) -> None:
    """Raises UserError if what is at a place are more or fewer images than there should be."""
    if found != wanted:
        raise UserError(f"{where} holds {found} images, not {wanted}; replace it, and fetch again")

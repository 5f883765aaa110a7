"""A prepared data set: a folder of arrays that are mapped, not read, and the batches and examples that come from it."""

import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from datasets.registry import Prepared, Preparer, Request, source_for, spec
from runtime import arrays
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.options import Options
from runtime.progress import Report, silent
from runtime.randomness import generator

HINT = "priorhole fetch EXPERIMENT"
AT_ONCE = 1000
"""Images that are binarised at a time."""

Rows = slice | Tensor
"""Which rows: all or a stretch of them, or those of indices (n,)."""


class ImageOptions(Options):
    """How a model is shown images of the kind ``images``.

    ``bits``: 8, a level's 255th part; or 5, ⌊level / 8⌋ / 31, as NVAE has CelebA-HQ. ``flip``: training images are mirrored
    left to right with even odds.
    """

    bits: Literal[5, 8] = 8
    flip: bool = False


def _identity(name: str) -> Identity:
    entry = spec(name)
    config, modules = {"dataset": name, "checksums": entry.checksums}, ["datasets.registry"]
    if isinstance(entry.prepare, Preparer):
        config["settings"] = dict(entry.prepare.settings)
        modules.append(entry.prepare.module)
    return Identity("", 0, config, source_for(name, *modules))


def fetch(name: str, folder: Path, raw: Path, report: Report = silent, workers: int = 1) -> None:
    """Prepare a data set into a folder; what is there already and current is kept.

    Args:
        name: the data set.
        folder: to write to (:mod:`runtime.arrays`).
        raw: folder of downloads.
        report: told of the progress, where it takes long.
        workers: processes side by side.

    Raises:
        UserError: no such data set, its source cannot be reached, or it is corrupt.
    """
    identity = _identity(name)
    if arrays.load_current(folder, identity) is None:
        entry, scratch = spec(name), raw / f".decoded-{name}"
        if isinstance(entry.prepare, Preparer):
            found = entry.prepare(Request(name, entry.shape, entry.checksums, raw, scratch, report, workers))
        else:
            found = Prepared(entry.prepare(raw))
        arrays.save(folder, found.arrays, identity, provenance=dict(found.provenance))
        shutil.rmtree(scratch, ignore_errors=True)


def load(name: str, folder: Path, options: ImageOptions | None = None) -> "Dataset":
    """Open a prepared data set, without reading it. Raises UserError if it is missing, corrupt, or another data set's."""
    tensors, document = arrays.load_verified(folder, _identity(name), HINT)
    return Dataset(name, tensors, document["digest"], options, document.get("provenance", {}))


class Dataset:
    """The splits ``train``, ``validation`` and ``test`` of a data set, mapped from the disk as they are kept there.

    No method makes floats of more than the rows that it is asked for.

    Args:
        name: the data set.
        tensors: as its entry's ``prepare`` made them.
        digest: of the contents.
        options: how images are shown to a model; as they are if absent.
        provenance: of the contents (:class:`datasets.registry.Prepared`).
    """

    def __init__(
        self,
        name: str,
        tensors: arrays.Mapped,
        digest: str,
        options: ImageOptions | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        self.name, self.spec, self.digest, self._tensors = name, spec(name), digest, tensors
        self.options, self.provenance = options or ImageOptions(), provenance or {}
        self._binary: dict[str, Tensor] = {}

    def size(self, split: str) -> int:
        """How many examples a split has, or several together (``train+validation``)."""
        return sum(len(self._tensors[part]) for part in split.split("+"))

    def release(self) -> None:
        """Give the memory of what was read back to the system, as after a pass over a split; nothing is lost."""
        self._tensors.release()

    def train_batch(self, size: int, seed: int, step: int) -> Tensor:
        """The training batch of a step, float32 (size, *shape): fresh points, or a shuffled epoch's next images.

        Raises:
            UserError: the batch is larger than the training split.
        """
        stream = generator(seed, "train-batch", step=step)
        if self.spec.fresh is not None:
            return self.spec.fresh(size, stream)
        moved = _shifted(self._tensors["train"][self._train_rows(size, seed, step)], self.spec.shift, stream)
        return self._as_examples(_flipped(moved, stream) if self.options.flip else moved, stream)

    @property
    def views(self) -> int:
        """How many different examples all training batches are made of; 0 if every one is fresh.

        Fresh are points drawn anew, and images binarised or moved at random.
        """
        fresh = self.spec.fresh is not None or self.spec.kind == "binary-images" or self.spec.shift > 0
        return 0 if fresh else self.size("train") * (2 if self.options.flip else 1)

    def train_views(self, size: int, seed: int, step: int) -> Tensor:
        """Which of :attr:`views` a step's :meth:`train_batch` shows, int64 (size,): those that are mirrored come last."""
        rows = self._train_rows(size, seed, step)
        if not self.options.flip:
            return rows
        return rows + self.size("train") * _mirrored(size, generator(seed, "train-batch", step=step))

    def examples(self, split: str, rows: Rows = slice(None)) -> Tensor:
        """Some of the fixed examples of a split, float32 (rows, *shape), never flipped.

        Binary images are binarised once, by a fixed seed.

        Args:
            split: whose.
            rows: which, all of them by default.
        """
        if self.spec.kind == "points":
            return self._tensors[split][rows]
        if self.spec.kind == "images":
            return _scaled(self._tensors[split][rows], self.options.bits)
        if split not in self._binary:
            stream = generator(0, f"binarise-{split}")
            parts = [self._as_examples(part, stream).to(torch.uint8) for part in self._tensors[split].split(AT_ONCE)]
            self._binary[split] = torch.cat(parts)
        return self._binary[split][rows].float()

    def images(self, split: str, rows: Rows = slice(None)) -> Tensor:
        """Some images of a split in [0, 1], of 8 bits whatever a model is shown, float32 (rows, *shape).

        Args:
            split: whose; or several in turn, as ``train+validation``: a reference of all that a publication trained on.
            rows: which, all of them by default.

        Raises:
            UserError: the data are points.
        """
        if self.spec.kind == "points":
            raise UserError(f"{self.name} holds points, not images")
        return _scaled(_chosen([self._tensors[part] for part in split.split("+")], rows), 8)

    def labels(self, split: str) -> Tensor:
        """Class labels of a split, or of several in turn, int64 (n,). Raises UserError if the data set has none."""
        names = [f"{part}-labels" for part in split.split("+")]
        if not all(name in self._tensors for name in names):
            raise UserError(f"{self.name} has no labels")
        return torch.cat([self._tensors[name] for name in names])

    def _train_rows(self, size: int, seed: int, step: int) -> Tensor:
        count = self.size("train")
        if size > count:
            raise UserError(f"a batch of {size} does not fit the {count} training examples of {self.name}; lower batch")
        epoch, position = divmod(step, count // size)
        return _permutation(count, seed, epoch)[position * size : (position + 1) * size]

    def _as_examples(self, values: Tensor, stream: torch.Generator) -> Tensor:
        if self.spec.kind == "points":
            return values
        if self.spec.kind == "images":
            return _scaled(values, self.options.bits)
        return (torch.rand(values.shape, generator=stream) < values.float() / 255).float()


def _chosen(parts: Sequence[Tensor], rows: Rows) -> Tensor:
    """The rows of several tensors as if they were one, without making it."""
    if len(parts) == 1:
        return parts[0][rows]
    wanted, first = torch.arange(sum(map(len, parts)))[rows], 0
    found = torch.empty(len(wanted), *parts[0].shape[1:], dtype=parts[0].dtype)
    for part in parts:
        inside = (wanted >= first) & (wanted < first + len(part))
        found[inside] = part[wanted[inside] - first]
        first += len(part)
    return found


def _scaled(levels: Tensor, bits: int) -> Tensor:
    """uint8 levels in [0, 1], float32: 256 of them, or 32."""
    return levels.float() / 255 if bits == 8 else (levels // 8).float() / 31


def _flipped(images: Tensor, stream: torch.Generator) -> Tensor:
    """Each image (n, c, h, w) mirrored left to right, or not, with even odds."""
    return torch.where(_mirrored(len(images), stream)[:, None, None, None], images.flip(-1), images)


def _mirrored(count: int, stream: torch.Generator) -> Tensor:
    return torch.rand(count, generator=stream) < 0.5


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "epoch", step=epoch))


def _shifted(images: Tensor, shift: int, stream: torch.Generator) -> Tensor:
    """Each image (n, c, h, w) moved by up to ``shift`` pixels along both axes, zeros coming in."""
    if shift == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, (shift,) * 4)
    down, right = torch.randint(2 * shift + 1, (2, count), generator=stream)
    rows = (torch.arange(height) + down[:, None])[:, None, :, None]
    columns = (torch.arange(width) + right[:, None])[:, None, None, :]
    return padded[
        torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns
    ]

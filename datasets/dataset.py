"""A prepared data set: a folder of arrays that are mapped, not read, and the batches and examples that come from it."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from datasets.registry import spec
from runtime import arrays
from runtime.errors import UserError
from runtime.identity import Identity, source_digest
from runtime.randomness import generator

HINT = "priorhole fetch EXPERIMENT"
AT_ONCE = 1000
"""Images that are binarised at a time."""

Rows = slice | Tensor
"""Which rows: all or a stretch of them, or those of indices (n,)."""


def _identity(name: str) -> Identity:
    return Identity("", 0, {"dataset": name, "checksums": spec(name).checksums}, source_digest("datasets.registry"))


def fetch(name: str, folder: Path, raw: Path) -> None:
    """Prepare a data set into a folder; what is there already and current is kept.

    Args:
        name: the data set.
        folder: to write to (:mod:`runtime.arrays`).
        raw: folder of downloads.

    Raises:
        UserError: no such data set, its source cannot be reached, or it is corrupt.
    """
    if arrays.load_current(folder, _identity(name)) is None:
        arrays.save(folder, spec(name).prepare(raw), _identity(name))


def load(name: str, folder: Path) -> "Dataset":
    """Open a prepared data set, without reading it. Raises UserError if it is missing, corrupt, or another data set's."""
    tensors, document = arrays.load_verified(folder, _identity(name), HINT)
    return Dataset(name, tensors, document["digest"])


class Dataset:
    """The splits ``train``, ``validation`` and ``test`` of a data set, mapped from the disk as they are kept there.

    No method makes floats of more than the rows that it is asked for.

    Attributes:
        digest: of the contents.
    """

    def __init__(self, name: str, tensors: arrays.Mapped, digest: str):
        self.name, self.spec, self.digest, self._tensors = name, spec(name), digest, tensors
        self._binary: dict[str, Tensor] = {}

    def size(self, split: str) -> int:
        """How many examples a split has."""
        return len(self._tensors[split])

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
        images = self._tensors["train"]
        if size > len(images):
            raise UserError(
                f"a batch of {size} does not fit the {len(images)} training examples of {self.name}; lower batch"
            )
        epoch, position = divmod(step, len(images) // size)
        chosen = images[_permutation(len(images), seed, epoch)[position * size : (position + 1) * size]]
        return self._as_examples(_shifted(chosen, self.spec.shift, stream), stream)

    def examples(self, split: str, rows: Rows = slice(None)) -> Tensor:
        """Some of the fixed examples of a split, float32 (rows, *shape); images are binarised once, by a fixed seed.

        Args:
            split: whose.
            rows: which, all of them by default.
        """
        if self.spec.kind == "points":
            return self._tensors[split][rows]
        if split not in self._binary:
            stream = generator(0, f"binarise-{split}")
            parts = [self._as_examples(part, stream).to(torch.uint8) for part in self._tensors[split].split(AT_ONCE)]
            self._binary[split] = torch.cat(parts)
        return self._binary[split][rows].float()

    def images(self, split: str, rows: Rows = slice(None)) -> Tensor:
        """Some grey images of a split in [0, 1], float32 (rows, *shape). Raises UserError if the data are points."""
        if self.spec.kind == "points":
            raise UserError(f"{self.name} holds points, not images")
        return self._tensors[split][rows].float() / 255

    def labels(self, split: str) -> Tensor:
        """Class labels, int64 (n,). Raises UserError if the data set has none."""
        if f"{split}-labels" not in self._tensors:
            raise UserError(f"{self.name} has no labels")
        return self._tensors[f"{split}-labels"]

    def _as_examples(self, values: Tensor, stream: torch.Generator) -> Tensor:
        if self.spec.kind == "points":
            return values
        return (torch.rand(values.shape, generator=stream) < values.float() / 255).float()


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

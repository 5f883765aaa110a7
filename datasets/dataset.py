"""A prepared data set: one verified file of tensors, and the batches and examples that come from it."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from datasets.registry import spec
from runtime import checkpoints
from runtime.errors import UserError
from runtime.identity import Identity, source_digest
from runtime.randomness import generator

HINT = "priorhole fetch EXPERIMENT"


def _identity(name: str) -> Identity:
    return Identity("", 0, {"dataset": name, "checksums": spec(name).checksums}, source_digest("datasets.registry"))


def fetch(name: str, path: Path, raw: Path) -> None:
    """Prepare a data set into one file; what is there already and current is kept.

    Args:
        name: the data set.
        path: the file to write.
        raw: folder of downloads.

    Raises:
        UserError: no such data set, its source cannot be reached, or it is corrupt.
    """
    if checkpoints.load_current(path, _identity(name)) is None:
        checkpoints.save(path, spec(name).prepare(raw), _identity(name))


def load(name: str, path: Path) -> "Dataset":
    """Read a prepared data set. Raises UserError if it is missing, corrupt, or another data set's."""
    tensors, document = checkpoints.load_verified(path, _identity(name), HINT)
    return Dataset(name, tensors, document["digest"])


class Dataset:
    """The splits ``train``, ``validation`` and ``test`` of a data set, in memory.

    Attributes:
        digest: of the contents.
    """

    def __init__(self, name: str, tensors: dict[str, Tensor], digest: str):
        self.name, self.spec, self.digest, self._tensors = name, spec(name), digest, tensors

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

    def examples(self, split: str) -> Tensor:
        """The fixed examples of a split, float32 (n, *shape); images are binarised once, by a fixed seed."""
        return self._as_examples(self._tensors[split], generator(0, f"binarise-{split}"))

    def images(self, split: str) -> Tensor:
        """Grey images in [0, 1], float32 (n, *shape). Raises UserError if the data are points."""
        if self.spec.kind == "points":
            raise UserError(f"{self.name} holds points, not images")
        return self._tensors[split].float() / 255

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

"""CIFAR-10: from a mirror folder that the user names, from an earlier download, or from its author's page."""

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.mnist import MIRROR
from datasets.pictures import place, require_original
from datasets.registry import Prepared, Request
from runtime.errors import UserError, first_line
from runtime.torchvision_ops import import_torchvision

ARCHIVE = "cifar-10-python.tar.gz"
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
RECONSTRUCT = np.empty(0).__reduce__()[0]
SAFE = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
}
"""All that a pickled batch is made of, by the names that NumPy gave it over the years."""


def prepare(request: Request, validation: int) -> Prepared:
    """Images and labels; the last ``validation`` training images, in the order of the batches, are for validation.

    NVAE trains on all 50 000 and validates on the test images. Here test images are looked at once, by what is reported, so
    training has 45 000; a FID's reference is still all 50 000 (``Dataset.images("train+validation")``, in their order).

    Args:
        request: of the data set.
        validation: how many images.

    Raises:
        UserError: the archive cannot be had, or is corrupt or partial.
    """
    path = place(request, "cifar10") / ARCHIVE
    where = f"put the original there, or set {MIRROR} to a folder that holds cifar10/{ARCHIVE}"
    if path.is_relative_to(request.raw) and not path.exists():
        _download(path, where)
    require_original(path, request.checksums[ARCHIVE], where)
    batches = dict(_batches(path))
    arrays = {}
    for split, names in BATCHES.items():
        for key, parts in zip(("", "-labels"), zip(*(batches[name] for name in names), strict=True), strict=True):
            arrays[f"{split}{key}"] = torch.cat(parts)
    for key in ("", "-labels"):
        whole = arrays[f"train{key}"]
        arrays[f"train{key}"], arrays[f"validation{key}"] = whole[:-validation], whole[-validation:]
    return Prepared(arrays, {"source": ARCHIVE, "jpeg": False})


def _batches(path: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Images (n, 3, 32, 32) and labels (n,) of each batch in the archive. Raises UserError: one is not like that."""
    wanted = {name for names in BATCHES.values() for name in names}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                file = archive.extractfile(member) if name in wanted else None
                if file is not None:
                    wanted.remove(name)
                    yield name, _batch(f"{path}/{member.name}", file.read())
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} is corrupt ({first_line(error)}); replace it, and fetch again") from error
    if wanted:
        raise UserError(f"{path} lacks {min(wanted)}; replace it, and fetch again")


def _batch(label: str, content: bytes) -> tuple[Tensor, Tensor]:
    try:
        found = _Plain(io.BytesIO(content), encoding="latin1").load()
        images, labels = np.asarray(found["data"]), torch.tensor(found["labels"], dtype=torch.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32) or labels.dim() != 1:
            raise ValueError(f"{images.dtype} {images.shape} and {len(labels)} labels")
    except Exception as error:  # what is no such pickle can raise anything
        raise UserError(f"{label} is no batch of CIFAR-10 ({first_line(error)}); replace it, and fetch again") from error
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), labels


class _Plain(pickle.Unpickler):
    """Reads arrays and what Python's own containers hold, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """One of SAFE."""
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return SAFE[module, name]


def _download(path: Path, where: str) -> None:
    torchvision = import_torchvision()
    original = torchvision.datasets.CIFAR10
    try:
        torchvision.datasets.utils.download_url(original.url, str(path.parent), ARCHIVE, original.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise UserError(f"CIFAR-10 cannot be downloaded ({first_line(error)}); {where}") from error

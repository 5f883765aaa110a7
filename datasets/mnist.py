"""MNIST: from a mirror folder that the user names, from an earlier download, or from torchvision's sources."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path

from torch import Tensor

from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.torchvision_ops import import_torchvision

MIRROR = "PRIORHOLE_MIRROR"
VALIDATION = 5_000

CHECKSUMS = {  # md5 of each file once gunzipped
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def prepare(raw: Path) -> dict[str, Tensor]:
    """Images as uint8 (n, 1, 28, 28) and labels; the last 5 000 training images are for validation.

    Raises:
        UserError: no source can be reached, or a file is corrupt or partial; it is never half used.
    """
    folder = raw / "MNIST" / "raw"  # where torchvision looks
    mirror = os.environ.get(MIRROR)
    if mirror:
        for name, checksum in CHECKSUMS.items():
            _from_mirror(Path(mirror) / "mnist" / f"{name}.gz", folder / name, checksum)
    elif not all((folder / name).exists() for name in CHECKSUMS):
        _download(raw)
    for name, checksum in CHECKSUMS.items():
        if hashlib.md5((folder / name).read_bytes()).hexdigest() != checksum:
            raise UserError(f"{folder / name} is corrupt or partial; delete it and fetch again")
    mnist = import_torchvision().datasets.MNIST
    train, test = mnist(str(raw), train=True), mnist(str(raw), train=False)
    return {
        "train": train.data[:-VALIDATION, None],
        "train-labels": train.targets[:-VALIDATION],
        "validation": train.data[-VALIDATION:, None],
        "validation-labels": train.targets[-VALIDATION:],
        "test": test.data[:, None],
        "test-labels": test.targets,
    }


def _from_mirror(source: Path, target: Path, checksum: str) -> None:
    try:
        content = gzip.decompress(source.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing; {MIRROR} must name a folder that holds mnist/{source.name}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source} is corrupt or partial ({error}); replace it in the mirror and fetch again") from error
    if hashlib.md5(content).hexdigest() != checksum:
        raise UserError(
            f"{source} is not the original (its contents' md5 differs); replace it in the mirror and fetch again"
        )
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def _download(raw: Path) -> None:
    try:
        import_torchvision().datasets.MNIST(str(raw), download=True)
    except (OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())  # torchvision's messages have several lines
        raise UserError(
            f"MNIST cannot be downloaded ({cause}); set {MIRROR} to a folder that holds mnist/*-ubyte.gz"
        ) from error

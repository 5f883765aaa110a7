"""Every data set that params.yaml can name, one entry each."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Generator, Tensor

from datasets import digits, gaussians25, mnist
from runtime.arrays import Blocks
from runtime.errors import UserError
from runtime.identity import source_digest
from runtime.progress import Report


@dataclass(frozen=True)
class Truth:
    """What is known of a synthetic data set's density.

    Attributes:
        log_density: nats of points (n, d), shape (n,).
        ceiling: expected log density under the truth itself, nats.
        means: of its modes, (modes, d).
        sigma: standard deviation of each mode, data units.
    """

    log_density: Callable[[Tensor], Tensor]
    ceiling: float
    means: Tensor
    sigma: float


@dataclass(frozen=True)
class Request:
    """What a :class:`Preparer` is given.

    Attributes:
        name, shape, checksums: of the data set, as its entry has them.
        raw: folder of downloads.
        scratch: folder for what is done already, so that a killed preparation goes on; it is deleted in the end.
        report: told of the progress.
        workers: processes side by side.
    """

    name: str
    shape: tuple[int, ...]
    checksums: Mapping[str, str]
    raw: Path
    scratch: Path
    report: Report
    workers: int


@dataclass(frozen=True)
class Prepared:
    """The tensors of a data set (:class:`DatasetSpec`), and where they are from.

    ``provenance`` holds ``source``, for people, and ``jpeg``: whether the pixels went through JPEG, None if nobody knows.
    """

    arrays: Mapping[str, Tensor | Blocks]
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preparer:
    """The function ``prepare`` of a module, called with a :class:`Request` and with ``settings``, plain JSON values.

    The module is imported when the data set is prepared and not before: readers of images and archives are no part of what
    trains on other data, and a change in them makes no result of those stale.
    """

    module: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, request: Request) -> Prepared:
        """The data set. Raises UserError: its source cannot be reached, is incomplete or corrupt."""
        return importlib.import_module(self.module).prepare(request, **self.settings)


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Attributes:
        shape: of an example.
        kind: ``points`` are used as they are; ``binary-images`` are uint8 grey levels whose 255th part is each pixel's
            probability of being 1 (dynamic binarisation); ``images`` are uint8 levels, mapped to [0, 1].
        licence, source: for people.
        prepare: maps the folder of raw downloads to the tensors ``train``, ``validation``, ``test`` and, where there are
            labels, ``train-labels`` …; or a :class:`Preparer` of them.
        checksums: of the raw files.
        fresh: draws new training examples; None if the training split is all there is.
        shift: augmentation of training images, pixels in either direction of both axes.
        truth: the density, where it is known.
        labelled: whether its examples have classes.
    """

    shape: tuple[int, ...]
    kind: Literal["points", "binary-images", "images"]
    licence: str
    source: str
    prepare: Callable[[Path], Mapping[str, Tensor | Blocks]] | Preparer
    checksums: dict[str, str] = field(default_factory=dict)
    fresh: Callable[[int, Generator], Tensor] | None = None
    shift: int = 0
    truth: Truth | None = None
    labelled: bool = True


DATASETS: dict[str, DatasetSpec] = {
    "gaussians25": DatasetSpec(
        shape=(2,),
        kind="points",
        licence="none needed: synthetic",
        source="drawn here",
        prepare=gaussians25.prepare,
        fresh=gaussians25.fresh,
        truth=Truth(gaussians25.log_density, gaussians25.CEILING, gaussians25.MEANS, gaussians25.SIGMA),
    ),
    "digits": DatasetSpec(
        shape=(1, 8, 8),
        kind="binary-images",
        licence="CC BY 4.0",
        source="UCI, E. Alpaydin and C. Kaynak, as bundled with scikit-learn",
        prepare=digits.prepare,
        shift=1,
    ),
    "mnist": DatasetSpec(
        shape=(1, 28, 28),
        kind="binary-images",
        licence="CC BY-SA 3.0",
        source="Y. LeCun and C. Cortes",
        prepare=mnist.prepare,
        checksums=mnist.CHECKSUMS,
    ),
    "cifar10": DatasetSpec(
        shape=(3, 32, 32),
        kind="images",
        licence="none stated",
        source="A. Krizhevsky, 2009",
        prepare=Preparer("datasets.cifar10", {"validation": 5_000}),
        checksums={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    "cifar10-jpeg": DatasetSpec(
        shape=(3, 32, 32),
        kind="images",
        licence="none stated",
        source="A. Krizhevsky, 2009, every image recompressed as JPEG (quality 75, 4:2:0): a lossy copy",
        prepare=Preparer("datasets.folders", {"validation": 5_000, "counts": {"train": 50_000, "test": 10_000}}),
    ),
    "celeba64": DatasetSpec(
        shape=(3, 64, 64),
        kind="images",
        licence="non-commercial research only",
        source="Z. Liu, P. Luo, X. Wang and X. Tang, 2015; the aligned images, cropped to 148 pixels as for NVAE",
        prepare=Preparer("datasets.celeba", {"box": [15, 40, 163, 188]}),
        labelled=False,
        checksums={"list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668"},
    ),
    "celeba64-140": DatasetSpec(
        shape=(3, 64, 64),
        kind="images",
        licence="non-commercial research only",
        source="Z. Liu, P. Luo, X. Wang and X. Tang, 2015; the aligned images, cropped to 140 pixels as for RAE",
        prepare=Preparer("datasets.celeba", {"box": [19, 39, 159, 179]}),
        labelled=False,
        checksums={"list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668"},
    ),
    "celebahq256": DatasetSpec(
        shape=(3, 256, 256),
        kind="images",
        licence="CC BY-NC 4.0",
        source="T. Karras, T. Aila, S. Laine and J. Lehtinen, 2018",
        prepare=Preparer("datasets.celebahq", {"counts": {"train": 26_000, "validation": 1_000, "test": 3_000}}),
        labelled=False,
    ),
}


def spec(name: str) -> DatasetSpec:
    """The entry of that name. Raises UserError if there is none."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r} does not exist; there are {', '.join(DATASETS)}")
    return DATASETS[name]


FIRST = ("datasets.digits", "datasets.gaussians25", "datasets.mnist")
"""What digests of code have had in them since the first results, on whatever data these are."""


def source_for(name: str, *modules: str) -> str:
    """Digest of modules that know data sets (:func:`runtime.identity.source_digest`), as far as this one goes.

    So another data set's entry, a new one's or one that is mended, makes nothing stale that is made of this one.
    """
    return source_digest(*modules, *FIRST, entries={__name__: name})

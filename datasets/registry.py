"""Every data set that params.yaml can name, one entry each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Generator, Tensor

from datasets import digits, gaussians25, mnist
from runtime.errors import UserError


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
class DatasetSpec:
    """One data set.

    Attributes:
        shape: of an example.
        kind: ``points`` are used as they are; ``binary-images`` are uint8 grey levels whose 255th part is each pixel's
            probability of being 1 (dynamic binarisation).
        licence, source: for people.
        prepare: maps the folder of raw downloads to the tensors ``train``, ``validation``, ``test`` and, where there are
            labels, ``train-labels`` …
        checksums: of the raw files.
        fresh: draws new training examples; None if the training split is all there is.
        shift: augmentation of training images, pixels in either direction of both axes.
        truth: the density, where it is known.
    """

    shape: tuple[int, ...]
    kind: Literal["points", "binary-images"]
    licence: str
    source: str
    prepare: Callable[[Path], dict[str, Tensor]]
    checksums: dict[str, str] = field(default_factory=dict)
    fresh: Callable[[int, Generator], Tensor] | None = None
    shift: int = 0
    truth: Truth | None = None


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
}


def spec(name: str) -> DatasetSpec:
    """The entry of that name. Raises UserError if there is none."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r} does not exist; there are {', '.join(DATASETS)}")
    return DATASETS[name]

"""What a sampler drew from a prior: the files of it, and how they are filled and read a file at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metrics import mmd
from metrics.features import BATCH
from models.protocol import Group
from priors.samplers import ESS_FLOOR
from runtime import checkpoints, rowfiles
from runtime.blocks import Rows
from runtime.errors import UserError
from runtime.options import Options
from runtime.rowfiles import RowFile

Pixels = Literal["uint8", "float32"]

LATENT_ROWS = mmd.ROWS
"""Latents of so many first rows are kept, for MMD and pictures: they can be a hundred times an image's bytes."""

LATENT_BYTES = 2**28
"""Where the latents are so large that these bytes hold fewer rows, latents of fewer are kept."""


def latent_rows(layout: Sequence[Group]) -> int:
    """Of how many first rows latents are kept."""
    bytes_per_row = sum(torch.Size(group.latent).numel() for group in layout) * 4
    return max(2, min(LATENT_ROWS, LATENT_BYTES // bytes_per_row))


def rows_per_file(wanted: int, batch: int) -> int:
    """At least the wanted rows, and whole batches: of what makes them, and of the network that looks at them later."""
    whole = math.lcm(batch, BATCH)
    return -(-wanted // whole) * whole


def chain_states(sampler: Options) -> int | None:
    """How many states the chain of a sampler with these settings has, its start among them; None where it runs none."""
    steps: int | None = getattr(sampler, "steps", None)
    return None if steps is None else steps + 1


def row_parts(total: int, per_file: int) -> list[tuple[int, int]]:
    """The rows of each file, from the first to the one behind the last: what can be made, and measured, on its own."""
    return [(first, min(first + per_file, total)) for first in range(0, total, per_file)]


def to_store(drawn: Rows, rows: range, pixels: Pixels | None, latents: int) -> Rows:
    """What is kept of a block.

    Args:
        drawn: as ``priors.sampling.draw`` returns it.
        rows: which they are.
        pixels: how ``x`` is kept: rounded to 8 bits, as in an image file, or as floats. None for points.
        latents: of how many first rows latents are kept.
    """
    left = max(0, latents - rows.start)
    kept = {name: value for name, value in drawn.items() if not name.startswith("z/")}
    if left:
        kept |= {name: value[:left] for name, value in drawn.items() if name.startswith("z/")}
    if pixels == "uint8":
        kept["x"] = (drawn["x"].clamp(0, 1) * 255).round().to(torch.uint8)
    return kept


@dataclass(frozen=True)
class Samples:
    """All rows of a draw.

    Attributes:
        files: in the order of their rows; the last may hold more than ``total``.
        total: number of rows.
        made_by: the command that makes them, for error messages.
    """

    files: Sequence[RowFile]
    total: int
    made_by: str

    def diagnostic(self, name: str) -> Tensor:
        """One number of each row, (total,): ``ess/k00``, ``proposals/k00``, ``acceptance/k00``, ``seconds``, ``block``."""
        return rowfiles.column(self.files, name, self.made_by)[: self.total]

    def latents(self, k: int) -> Tensor:
        """Latents of group k of the first rows, (at most total, *latent)."""
        return rowfiles.column(self.files, f"z/k{k:02d}", self.made_by)[: self.total]

    def parts(self) -> Iterator[Tensor]:
        """``x`` file by file: points, or images in [0, 1] from which floats may stray."""
        for file in self.files:
            yield self.whole(file)[: self.total - file.rows.start]

    def whole(self, file: RowFile) -> Tensor:
        """``x`` of all rows of a file, its contents verified. Raises UserError if they are not what was written."""
        x = checkpoints.load(file.path, self.made_by)[0]["x"]
        return x.float() / 255 if x.dtype == torch.uint8 else x

    def first(self, count: int) -> Tensor:
        """The first rows of ``x``."""
        found: list[Tensor] = []
        for x in self.parts():
            found.append(x)
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def require_finite(self, what: str) -> None:
        """:func:`require_finite`, file by file."""
        for file in self.files:
            require_finite(checkpoints.load(file.path, self.made_by)[0], what)

    def under_floor(self, groups: int, states: int | None = None) -> dict[str, float]:
        """Share of images with an effective sample size under ESS_FLOOR by group; none where r was not evaluated at all.

        Args:
            groups: how many there are.
            states: of a chain, whose effective sample size is a fraction of them; else it is one of the proposals.
        """
        shares = {}
        for k in range(groups):
            proposals, ess = self.diagnostic(f"proposals/k{k:02d}"), self.diagnostic(f"ess/k{k:02d}")
            few = (proposals > 0) & (ess * (states or proposals) < ESS_FLOOR)
            shares[f"k{k:02d}"] = few.double().mean().item()
        return shares


def require_finite(drawn: Rows, what: str) -> None:
    """Refuse latents and images that are not finite; a diagnostic may well be.

    Args:
        drawn: as ``priors.sampling.draw`` returns it, or as it is kept.
        what: names the draw in the message.

    Raises:
        UserError: naming the first group that broke, or the image, and in how many rows.
    """
    for key in (*sorted(key for key in drawn if key.startswith("z/")), "x"):
        broken = int((~drawn[key].isfinite()).flatten(1).any(1).sum())
        if broken:
            raise UserError(
                f"{what}: {key} is not finite in {broken} of {len(drawn[key])}; the sampler or the prior diverged: lower "
                "the sampler's step_size, or the prior's learning rate, in params.yaml"
            )

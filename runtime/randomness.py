"""Randomness without global state: every draw is a pure function of (seed, purpose, group, step, row).

Nothing here, and nothing that uses it, reads or moves torch's global generators. Results therefore do not depend on how
the work was sharded over processes, split into batches, or interrupted and resumed.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor


def generator(seed: int, purpose: str, group: int = 0, step: int = 0, device: torch.device | str = "cpu") -> Generator:
    """A fresh generator whose stream depends on the four named parts alone.

    torch's generator for CPUs (MT19937) is seeded with 32 bits, whatever it is given; the one for GPUs with all 63. So on a
    CPU two named streams are the same with probability 2^-32: among a hundred thousand streams, about one pair.
    """
    digest = hashlib.blake2b(f"{seed}|{purpose}|{group}|{step}".encode(), digest_size=8).digest()
    result = Generator(device)
    result.manual_seed(int.from_bytes(digest, "little") >> 1)
    return result


@contextmanager
def initialising(seed: int, purpose: str, group: int = 0) -> Iterator[None]:
    """Let modules made in this block draw their initial weights from a stream of their own.

    torch's initialisers know only the global generator, so it is set here and put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, purpose, group).initial_seed())
        yield


class Noise:
    """A source of standard noise for distributions over a batch of rows.

    With ``rows``, row i's numbers come from a stream of its own, so that an image gets the same noise whatever batch it
    travels in. Without, one stream serves the whole batch (cheaper: right for training, where the batch is part of the
    protocol). Successive calls continue the streams.

    Args:
        seed, purpose, group, step: the parts that name the stream (see :func:`generator`).
        rows: index of each row of the batch, or None for one stream.
        repeats: the batch holds each row this many times, repeat-major: (repeats x rows, ...).
    """

    def __init__(
        self,
        seed: int,
        purpose: str,
        group: int = 0,
        step: int = 0,
        rows: Sequence[int] | None = None,
        repeats: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.device = device
        self.repeats = repeats
        names = [purpose] if rows is None else [f"{purpose}|row{row}" for row in rows]
        self._by_row = rows is not None
        self._part: tuple[range, int] | None = None
        self._generators = [generator(seed, name, group, step, device) for name in names]

    def of(self, rows: Sequence[int]) -> "Noise":
        """The streams of some of the rows, by their position in the batch; reading them moves this source's streams on.

        A source of one stream for the whole batch serves any rows. Raises ValueError for repeated rows.
        """
        if self.repeats > 1:
            raise ValueError("rows that are repeated cannot be picked")
        picked = copy.copy(self)
        if self._by_row:
            picked._generators = [self._generators[row] for row in rows]
        return picked

    def cut(self, rows: range, of: int) -> "Noise":
        """For a batch of these rows of one of ``of``: the numbers that they get in that one.

        Raises ValueError where rows have streams of their own: :meth:`of` picks those.
        """
        if self._by_row:
            raise ValueError("rows that have streams of their own are picked, not cut out")
        part = copy.copy(self)
        part._part = rows, of
        return part

    def normal(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, float32, shape (*lead, *batch); ``batch[0]`` counts the rows."""
        return self._draw(torch.randn, lead, batch)

    def uniform(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """Uniform numbers in [0, 1), float32, shape (*lead, *batch); ``batch[0]`` counts the rows."""
        return self._draw(torch.rand, lead, batch)

    def exponential(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """Exponential numbers of mean 1, positive float32, shape (*lead, *batch); ``batch[0]`` counts the rows."""
        return -torch.log(self.uniform(lead, batch).clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24))

    def gumbel(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """Standard Gumbel numbers, float32, shape (*lead, *batch); ``batch[0]`` counts the rows."""
        return -torch.log(self.exponential(lead, batch))

    def _draw(self, kind, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        if self._part is not None:
            rows, of = self._part
            whole = kind((*lead, of, *batch[1:]), generator=self._generators[0], device=self.device)
            return whole.narrow(len(lead), rows.start, len(rows)).contiguous()
        if not self._by_row:
            return kind((*lead, *batch), generator=self._generators[0], device=self.device)
        count, event = batch[0] // self.repeats, batch[1:]
        if count != len(self._generators):
            raise ValueError(f"noise for {len(self._generators)} rows was asked for {count}")
        shape = (*lead, self.repeats, *event)
        per_row = [kind(shape, generator=stream, device=self.device) for stream in self._generators]
        return torch.stack(per_row, dim=len(lead) + 1).reshape(*lead, *batch)

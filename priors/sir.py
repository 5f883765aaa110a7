"""SIR, sampling-importance-resampling: of M proposals, one kept with probability proportional to its weight w.

Proposals come from the base, and w = r; or from the prior's own proposal density g, and w = base·r / g.

The one kept is found by an exponential race, which needs no normaliser: proposal j starts at a time t_j ~ Exp(1), and the
smallest t_j / w_j wins (the Gumbel-max trick: −log t_j is Gumbel noise). Proposals stream through, and nothing of them stays
but a running winner and the running sums of w and w². Memory does not depend on M.

Proposals are alike before they are seen, so they may come in the order of their times: t_j − t_{j−1} ~ Exp(1) / (M − j + 1)
(Rényi 1953). Then the race can be over long before M: a later proposal wins only if its weight makes up for its time, and
from some time on only a weight never met could. Stopping there saves the proposals, and keeps the draw of SIR with all M.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from models.protocol import LearnedPrior
from priors.samplers import GroupDraw, Sampler, Streams
from runtime.hardware import Precision, autocast, elements_at_once

BLOCK = 100
"""Proposals that an image reads from its streams at a time. Part of the definition of the draws, unlike the chunks."""

MARGIN = 2.0
"""Nats. A race counts as decided when a weight of up to so much above the largest met could not win it any more."""


def log_ratios(prior: LearnedPrior, k: int, z: Tensor, prepared: Tensor, precision: Precision = "fp32") -> Tensor:
    """log r of many proposals, scored in parts that fit the fast memory: of one image at a time at least.

    Args:
        prior: whose group ``k``.
        z: (proposals, batch, *latent shape).
        prepared: ``prior.prepare`` of the contexts, (batch, …).
        precision: of the scoring network; the result is float32 anyway.

    Returns:
        Shape (proposals, batch), nats.
    """
    images = max(1, elements_at_once(z.device.type) // (len(z) * prior.footprint(k)))
    with autocast(precision, z.device.type):
        parts = zip(z.split(images, dim=1), prepared.split(images), strict=True)
        return torch.cat([prior.prepared_log_ratio(k, *part).float() for part in parts], dim=1)


class SIR(Sampler):
    """M proposals, one kept with probability proportional to its weight; or as many of them as it takes to know which."""

    weighs = True

    class Options(Sampler.Options):
        """``proposals``: M. ``until_ess``: an image stops before M, at a full block of proposals, once the race is decided
        (``MARGIN``) and so large an effective sample size, (Σw)² / Σw², says that their weights are known. It keeps what it
        would have kept of M unless a weight above all met comes later. ``precision``: of the scores; ``auto`` is bf16 where
        the hardware gains from it.
        """

        proposals: Annotated[int, Field(ge=1, le=2**20)]
        until_ess: Annotated[float, Field(gt=1)] | None = None
        precision: Precision = "fp32"

    options: Options

    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """Stream the proposals of all images through, block by block."""
        race = _Race(self.options.proposals, len(context), context.device)
        with autocast(self.options.precision, context.device.type):
            prepared = prior.prepare(k, context)
        proposing, choosing = streams("proposals"), streams("race")
        unfinished = torch.arange(len(context), device=context.device)
        at_once = max(1, elements_at_once(context.device.type) // (BLOCK * prior.footprint(k)))
        for first in range(0, self.options.proposals, BLOCK):
            count = min(BLOCK, self.options.proposals - first)
            for rows in unfinished.split(at_once):
                proposal = prior.proposal(k, context[rows])
                z = proposal.draw(proposing.of(rows.tolist()), (count,))
                log_w = log_ratios(prior, k, z, prepared[rows], self.options.precision)
                if prior.proposes:
                    log_w = log_w + (prior.base(k, context[rows]).log_prob(z) - proposal.log_prob(z)).float()
                race.add(rows, z, log_w, choosing.of(rows.tolist()).exponential((count,), (len(rows),)))
            if self.options.until_ess is not None:
                over = race.decided & (race.ess >= self.options.until_ess)
                unfinished = unfinished[~over[unfinished]]
                if not len(unfinished):
                    break
        race.kept[~race.best.isfinite()] = math.nan  # a weight that is none stops a race: its winner so far is no draw
        return GroupDraw(race.kept, race.ess / race.proposals, race.proposals, torch.ones_like(race.proposals))


class _Race:
    """Row by row M proposals, in the order of their times, and what is kept of those seen so far."""

    def __init__(self, entrants: int, rows: int, device: torch.device):
        self.entrants = entrants
        self.best = torch.full((rows,), -math.inf, dtype=torch.float64, device=device)  # log w − log t of the winner so far
        self.log_sum, self.log_sum_squares, self.largest = self.best.clone(), self.best.clone(), self.best.clone()
        self.time = torch.zeros_like(self.best)  # of the last proposal seen
        self.proposals = torch.zeros(rows, device=device)
        self.kept = torch.empty(0)

    @property
    def ess(self) -> Tensor:
        """(Σw)² / Σw², in proposals, shape (rows,)."""
        return (2 * self.log_sum - self.log_sum_squares).exp().float()

    @property
    def decided(self) -> Tensor:
        """Whether no later proposal of a weight up to ``MARGIN`` above the largest so far can win, shape (rows,)."""
        return self.largest + MARGIN - self.time.log() <= self.best

    def add(self, rows: Tensor, z: Tensor, log_w: Tensor, exponential: Tensor) -> None:
        """Take in the next proposals of some rows: z (count, len(rows), *latent), log_w and noise (count, len(rows))."""
        if not self.kept.numel():
            self.kept = z.new_full((len(self.best), *z.shape[2:]), math.nan)
        # Row by row in float64: a sum over the first axis has an order that depends on the number of rows.
        log_w, exponential = log_w.T.contiguous().double(), exponential.T.contiguous().double()
        waiting = self.entrants - self.proposals[rows, None] - torch.arange(len(z), device=z.device)
        times = self.time[rows, None] + (exponential / waiting).cumsum(1)
        keys, winner = (log_w - times.log()).max(1)
        better = keys > self.best[rows]
        self.kept[rows[better]] = z[winner, torch.arange(len(rows), device=z.device)][better]
        self.best[rows] = torch.maximum(self.best[rows], keys)
        self.largest[rows] = torch.maximum(self.largest[rows], log_w.amax(1))
        self.time[rows] = times[:, -1]
        self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], log_w.logsumexp(1))
        self.log_sum_squares[rows] = torch.logaddexp(self.log_sum_squares[rows], (2 * log_w).logsumexp(1))
        self.proposals[rows] += len(z)

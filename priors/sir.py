"""SIR, sampling-importance-resampling: of M proposals, one kept with probability proportional to its weight w.

Proposals come from the base, and w = r; or from the prior's own proposal density g, and w = base·r / g. The one kept is the
argmax of log w + Gumbel noise, which needs no normaliser: proposals stream through, and nothing of
them stays but a running winner and the running sums of w and w². Memory does not depend on M.
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
    """M proposals, one kept with probability proportional to its weight; or as many as an image needs."""

    weighs = True

    class Options(Sampler.Options):
        """``proposals``: M, or at most so many if ``until_ess`` is given: then an image stops at the first full block of
        proposals with so large an effective sample size, (Σw)² / Σw². ``precision``: of the scores; ``auto`` is bf16 where
        the hardware gains from it.
        """

        proposals: Annotated[int, Field(ge=1, le=2**20)]
        until_ess: Annotated[float, Field(gt=1)] | None = None
        precision: Precision = "fp32"

    options: Options

    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """Stream the proposals of all images through, block by block."""
        running = _Running(len(context), context.device)
        with autocast(self.options.precision, context.device.type):
            prepared = prior.prepare(k, context)
        proposing, choosing = streams("proposals"), streams("gumbel")
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
                running.add(rows, z, log_w, choosing.of(rows.tolist()).gumbel((count,), (len(rows),)))
            if self.options.until_ess is not None:
                unfinished = unfinished[running.ess[unfinished] < self.options.until_ess]
                if not len(unfinished):
                    break
        return GroupDraw(
            running.kept, running.ess / running.proposals, running.proposals, torch.ones_like(running.proposals)
        )


class _Running:
    """What is kept of the proposals seen so far, row by row."""

    def __init__(self, rows: int, device: torch.device):
        self.best = torch.full((rows,), -math.inf, device=device)
        self.log_sum, self.log_sum_squares = self.best.double(), self.best.double()
        self.proposals = torch.zeros(rows, device=device)
        self.kept = torch.empty(0)

    @property
    def ess(self) -> Tensor:
        """(Σw)² / Σw², in proposals, shape (rows,)."""
        return (2 * self.log_sum - self.log_sum_squares).exp().float()

    def add(self, rows: Tensor, z: Tensor, log_w: Tensor, gumbel: Tensor) -> None:
        """Take in proposals of some rows: z (count, len(rows), *latent), log_w and gumbel (count, len(rows))."""
        if not self.kept.numel():
            self.kept = z.new_empty(len(self.best), *z.shape[2:])
        keys, winner = (log_w + gumbel).max(0)
        better = keys > self.best[rows]
        self.kept[rows[better]] = z[winner, torch.arange(len(rows), device=z.device)][better]
        self.best[rows] = torch.maximum(self.best[rows], keys)
        # Row by row in float64: a sum over the first axis has an order that depends on the number of rows.
        by_row = log_w.T.contiguous().double()
        self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], by_row.logsumexp(1))
        self.log_sum_squares[rows] = torch.logaddexp(self.log_sum_squares[rows], (2 * by_row).logsumexp(1))
        self.proposals[rows] += len(z)

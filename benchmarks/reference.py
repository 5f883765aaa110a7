"""SIR straight from the formula, to measure the engine in ``priors/sir.py`` against and to test it with.

One image at a time, in fp32, the context concatenated to every proposal, all M of them in memory.
"""

import copy

import torch
from torch import Tensor, nn

from models.distributions import DiagonalNormal
from priors.networks import MapScorer


class Concatenating(nn.Module):
    """A MapScorer with its first layer over the concatenation of z and context: the same function."""

    def __init__(self, scorer: MapScorer):
        super().__init__()
        z, context = scorer.see_z, scorer.see_context
        self.first = nn.Conv2d(z.in_channels + context.in_channels, z.out_channels, 3, padding=1)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([z.weight, context.weight], 1))
            self.first.bias.copy_(z.bias)
        self.judge = copy.deepcopy(scorer.judge).to(memory_format=torch.contiguous_format)

    def forward(self, both: Tensor) -> Tensor:
        """(n, latent + context channels, h, w) to (n,)."""
        return self.judge(self.first(both)).flatten()


@torch.no_grad()
def sir(classifier: Concatenating, base: DiagonalNormal, context: Tensor, proposals: int) -> Tensor:
    """Draw one image's z (1, *latent) from its base and its context (1, c, h, w), both for one image."""
    z = base.sample((proposals,)).flatten(0, 1)
    log_r = classifier(torch.cat([z, context.expand(proposals, -1, -1, -1)], 1))
    return z[torch.multinomial(log_r.softmax(0), 1)]

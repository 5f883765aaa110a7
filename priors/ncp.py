"""NCP: the noise-contrastive prior (Aneja, Schwing, Kautz, Vahdat, NeurIPS 2021).

    p_NCP(z_k | c_k) = p(z_k | c_k) r(z_k, c_k) / Z_k(c_k),   r = D / (1 − D)

D tells posterior samples (D → 1) from base samples (D → 0) in the same context; log r is its logit. With D optimal,
r = q / p and Z = 1.
"""

import torch
from torch import Tensor
from torch.nn import functional

from models.protocol import Group
from priors.networks import NetworkOptions, scorer
from priors.protocol import Pair, TrainedPrior
from runtime.training import Terms


class NoiseContrastivePrior(TrainedPrior):
    """The base reweighted by a binary classifier of one group."""

    exact = False

    class Options(TrainedPrior.Options):
        """``network``: the classifier."""

        network: NetworkOptions = NetworkOptions()

    def __init__(self, options: Options, group: Group):
        super().__init__(options, group)
        self.classifier = scorer(options.network, group)

    def log_ratio(self, z: Tensor, context: Tensor) -> Tensor:
        """The classifier's logit: log D − log(1 − D)."""
        return self.prepared_log_ratio(z, self.prepare(context))

    def prepare(self, context: Tensor) -> Tensor:
        """The part of the classifier's first layer that sees the context."""
        return self.classifier.prepare(context)

    def prepared_log_ratio(self, z: Tensor, prepared: Tensor) -> Tensor:
        """The classifier's logit, given that part."""
        return self.classifier(z, prepared)

    @property
    def footprint(self) -> int:
        """Of the classifier."""
        return self.classifier.footprint

    def loss(self, pair: Pair, step: int) -> Terms:  # noqa: ARG002
        """Binary cross-entropy, summed over the two classes: 2 ln 2 at chance.

        Both classes pass in one batch, lest batch statistics tell them apart.
        """
        logits = self.log_ratio(torch.stack([pair.posterior, pair.base]), pair.context).float()
        return {"posterior": functional.softplus(-logits[0]).mean(), "base": functional.softplus(logits[1]).mean()}

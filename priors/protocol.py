"""What a prior method is: one class for one latent group.

The groups of a hierarchical model are corrected independently of each other, so a method says what it does to *one* group,
given the shapes of that group's latent variable and context. :class:`Prior` puts the groups together.

A new method is a subclass of :class:`GroupPrior` (nothing to learn), :class:`FittedPrior` (fitted to posterior samples) or
:class:`TrainedPrior` (trained by gradient descent), in a file of its own, and a line in ``priors/registry.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.distributions import Distribution
from models.protocol import Group, HierarchicalVAE
from runtime import options
from runtime.hardware import Precision
from runtime.training import Terms


class GroupPrior(nn.Module):
    """The prior of one group: base(z | c) r(z, c) / Z(c). This class corrects nothing: it is the base itself."""

    exact: ClassVar[bool] = True  # r = 1: the density needs no normaliser, and the base can be sampled directly
    proposes: ClassVar[bool] = False  # it has a density of its own to draw proposals from, close to base·r
    on_proposal: ClassVar[bool] = False  # what it is put on is the proposal of the prior below, not its base
    smooth: ClassVar[bool] = True  # the base is drawn as a smooth function of one Normal number per coordinate

    class Options(options.Options):
        """Settings of the method, as they stand in params.yaml."""

    def __init__(self, options: Options, group: Group):
        super().__init__()
        self.options, self.group = options, group

    def base(self, below: Distribution, context: Tensor) -> Distribution:  # noqa: ARG002
        """The base density over (batch, *latent). ``below`` is the model's own prior, or the prior this one is put on."""
        return below

    def proposal(self, below: Distribution, context: Tensor) -> Distribution:
        """The density over (batch, *latent) that proposals are drawn from. ``below`` as in :meth:`base`; here that base."""
        return self.base(below, context)

    def log_ratio(self, z: Tensor, context: Tensor) -> Tensor:  # noqa: ARG002
        """log r(z, c) in nats, unnormalised.

        Args:
            z: (*lead, batch, *latent shape).
            context: (batch, *context shape), shared by the leading dimensions of z.

        Returns:
            Shape (*lead, batch).
        """
        return z.new_zeros(z.shape[: z.dim() - len(self.group.latent)])

    def prepare(self, context: Tensor) -> Tensor:
        """What log r needs of the context (batch, *context shape), worked out once for many z; here the context itself."""
        return context

    def prepared_log_ratio(self, z: Tensor, prepared: Tensor) -> Tensor:
        """:meth:`log_ratio`, given what :meth:`prepare` made of the context. Overridden together with it."""
        return self.log_ratio(z, prepared)

    @property
    def footprint(self) -> int:
        """How many numbers the widest layer that scores one z holds."""
        return torch.Size(self.group.latent).numel()


class FittedPrior(GroupPrior, ABC):
    """A prior that is fitted in one go to the aggregate posterior."""

    class Options(GroupPrior.Options):
        """``codes``: number of training images' codes to fit to, ``batch`` at a time.

        ``codes_of``: posterior samples, which the aggregate posterior is made of; or posterior means, as RAE's tables have
        for VAEs too (of a deterministic autoencoder they are the same).
        """

        codes: Annotated[int, Field(ge=2)] = 5000
        batch: Annotated[int, Field(ge=1)] = 500
        codes_of: Annotated[Literal["sample", "mean"], Field(exclude_if=lambda value: value == "sample")] = "sample"

    options: Options

    @abstractmethod
    def fit(self, codes: Tensor, seed: int) -> None:
        """Set the buffers from codes of group k, shape (codes, *latent shape)."""


@dataclass
class Pair:
    """One group's part of a pass of the frozen VAE over a batch of examples.

    Attributes:
        posterior: z ~ q(z_k | z_<k, x), shape (batch, *latent shape).
        base: z ~ base(z_k | c_k), shape (batch, *latent shape).
        context: c_k, shape (batch, *context shape).
        below: the base's density.
        normal, uniform: fresh numbers for the loss, shapes (batch, *latent shape) and (batch,).
    """

    posterior: Tensor
    base: Tensor
    context: Tensor
    below: Distribution
    normal: Tensor
    uniform: Tensor


class TrainedPrior(GroupPrior, ABC):
    """A prior that is trained by gradient descent, on pairs of a posterior and a base sample in the same context."""

    class Options(GroupPrior.Options):
        """Adam on ``batch`` images for each of ``steps``.

        ``schedule``: ``cosine`` from ``learning_rate`` to ``final_learning_rate``, as NCP-VAE has it; or ``plateau``: the
        rate is cut, and in the end the training stopped, where ``patience`` checks bring no better held-out criterion
        (``runtime.training.Plateau``), so that ``steps`` is only the most it may take. ``checks``: how often, evenly over
        ``steps``, that criterion is measured on ``held_out`` validation examples. ``keep``: the ``last`` state or the
        ``best`` by it. ``weight_decay``: decoupled, as AdamW has it: against networks that learn the training images by
        heart. ``precision``: ``auto`` is bf16 autocast where the hardware gains from it.
        """

        steps: Annotated[int, Field(ge=1)]
        batch: Annotated[int, Field(ge=2)]
        learning_rate: Annotated[float, Field(gt=0)] = 1e-3
        final_learning_rate: Annotated[float, Field(ge=0)] = 1e-7
        schedule: Literal["cosine", "plateau"] = "cosine"
        patience: Annotated[int, Field(ge=1)] = 5
        checks: Annotated[int, Field(ge=1)] = 10
        held_out: Annotated[int, Field(ge=2)] = 1000
        keep: Literal["last", "best"] = "last"
        weight_decay: Annotated[float, Field(ge=0), options.unless(0.0)] = 0.0
        precision: Precision = "fp32"

    options: Options

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # Adam's

    @abstractmethod
    def loss(self, pair: Pair, step: int) -> Terms:
        """Named terms of the loss, float32 scalars, ``step`` being the number of steps made so far."""

    def held_out_loss(self, pair: Pair, step: int) -> Terms:
        """Terms of the held-out criterion, nats, small is good. Here the loss."""
        return self.loss(pair, step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters for the optimiser; a group's ``scale`` is its learning rate over ``learning_rate``."""
        return [{"params": list(self.parameters())}]


class Prior:
    """A learned prior over all groups of a model (a ``models.protocol.LearnedPrior``).

    Args:
        model: the VAE, frozen.
        groups: one GroupPrior per group.
        below: the prior whose base (or proposal) this one corrects; None for the model's own. It must be exact (or propose).
    """

    def __init__(self, model: HierarchicalVAE, groups: Sequence[GroupPrior], below: "Prior | None" = None):
        self.model, self.groups, self.below = model, groups, below
        self.exact = all(group.exact for group in groups)
        self.on_proposal = all(group.on_proposal for group in groups)
        self.proposes = any(group.proposes for group in groups)
        self.smooth: bool = all(group.smooth for group in groups) and (below is None or below.smooth)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def base(self, k: int, context: Tensor) -> Distribution:
        """The distribution that r corrects, over (batch, *latent shape of k)."""
        return self.groups[k].base(self._under(k, context), context)

    def proposal(self, k: int, context: Tensor) -> Distribution:
        """The density over (batch, *latent shape of k) that proposals are drawn from: the base, or the method's own."""
        return self.groups[k].proposal(self._under(k, context), context)

    def _under(self, k: int, context: Tensor) -> Distribution:
        if self.below is None:
            return self.model.prior(k, context)
        return self.below.proposal(k, context) if self.on_proposal else self.below.base(k, context)

    def log_ratio(self, k: int, z: Tensor, context: Tensor) -> Tensor:
        """log r(z, c): z (*lead, batch, *latent shape of k), context (batch, …), result (*lead, batch), nats."""
        return self.groups[k].log_ratio(z, context)

    def prepare(self, k: int, context: Tensor) -> Tensor:
        """What r needs of the contexts (batch, …), worked out once: shape (batch, …)."""
        return self.groups[k].prepare(context)

    def prepared_log_ratio(self, k: int, z: Tensor, prepared: Tensor) -> Tensor:
        """:meth:`log_ratio`, given what :meth:`prepare` returned."""
        return self.groups[k].prepared_log_ratio(z, prepared)

    def footprint(self, k: int) -> int:
        """How many numbers the widest layer that scores one z of group k holds."""
        return self.groups[k].footprint

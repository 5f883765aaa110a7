"""EVaLP: an energy-based prior with an amortised sampler, learned without Markov chains (2025).

    p(z_k | c_k) = p_0(z_k | c_k) exp(−E(z_k, c_k)) / Z_k(c_k),    log Z = max_g E_g[−E] − KL(g ‖ p_0)

An energy E and a sampler g, a flow with an exact density, are trained against each other:

    E minimises  E_q[E(z)] − E_g[E(z)] + λ (‖∇E‖ − 1)²      (the gradient penalty of Gulrajani et al. 2017)
    g minimises  E_g[E(z)] + w_KL KL(g ‖ p_0)

w_KL = 1 is the bound as it is stated; the released code runs 1e-3, 1e-8 and 0.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from models.distributions import Distribution
from models.protocol import Group
from priors.flow import FlowOptions, flow
from priors.protocol import GroupPrior, Pair, TrainedPrior
from runtime.options import Options
from runtime.training import Terms

CRITERION_PROPOSALS = 50


class EnergyOptions(Options):
    """``width``, ``depth``: of the perceptron, hidden layers with leaky rectifiers."""

    width: Annotated[int, Field(ge=1)] = 200
    depth: Annotated[int, Field(ge=1)] = 2


class Energy(nn.Module):
    """E(z, c), a perceptron over flattened latents and, past the first group, contexts.

    Without batch norm, since the penalty is on each sample's own gradient.
    """

    def __init__(self, options: EnergyOptions, group: Group):
        super().__init__()
        self.event = len(group.latent)
        seen = torch.Size(group.context).numel() if group.k else 0
        self.see_z = nn.Linear(torch.Size(group.latent).numel(), options.width)
        self.see_context = nn.Linear(seen, options.width, bias=False) if seen else None
        layers: list[nn.Module] = [nn.LeakyReLU(0.2)]
        for _ in range(options.depth - 1):
            layers += [nn.Linear(options.width, options.width), nn.LeakyReLU(0.2)]
        self.judge = nn.Sequential(*layers, nn.Linear(options.width, 1, bias=False))

    def prepare(self, context: Tensor) -> Tensor:
        """The first layer's part of the context (batch, …); nothing, (batch, 0), where it is not looked at."""
        return context.new_zeros(len(context), 0) if self.see_context is None else self.see_context(context.flatten(1))

    def forward(self, z: Tensor, prepared: Tensor) -> Tensor:
        """z (*lead, batch, *latent) in prepared contexts to (*lead, batch)."""
        hidden = self.see_z(z.flatten(z.dim() - self.event))
        return self.judge(hidden if self.see_context is None else hidden + prepared).squeeze(-1)


class EnergyPrior(TrainedPrior):
    """The base reweighted by exp(−E), with the sampler's density to draw proposals from."""

    exact = False
    proposes = True
    betas = (0.5, 0.999)

    class Options(TrainedPrior.Options):
        """``energy``, ``flow``: the networks; ``kl``: w_KL; ``penalty``: λ; ``ratio``: energy steps to a sampler's one.

        ``sampler_learning_rate``: of the sampler, if it is not the energy's ``learning_rate``. ``criterion``: what held-out
        examples are to say, in nats: ``prior`` is −log of the density that SIR with CRITERION_PROPOSALS draws from,
        ``sampler`` is −log g. ``keep`` is ``best`` by default, since the released code keeps the best epoch; it goes by the
        FID of the images that are then reported, which no held-out criterion may.
        """

        keep: Literal["last", "best"] = "best"
        sampler_learning_rate: Annotated[float, Field(gt=0)] | None = None
        criterion: Literal["prior", "sampler"] = "prior"
        energy: EnergyOptions = EnergyOptions()
        flow: FlowOptions = FlowOptions()
        kl: Annotated[float, Field(ge=0)] = 1.0
        penalty: Annotated[float, Field(ge=0)] = 10.0
        ratio: Annotated[int, Field(ge=1)] = 5

    options: Options

    def __init__(self, options: Options, group: Group):
        super().__init__(options, group)
        self.energy, self.flow = Energy(options.energy, group), flow(options.flow, group)

    def proposal(self, below: Distribution, context: Tensor) -> Distribution:
        """The sampler g."""
        return self.flow(below, context)

    def log_ratio(self, z: Tensor, context: Tensor) -> Tensor:
        """−E."""
        return self.prepared_log_ratio(z, self.prepare(context))

    def prepare(self, context: Tensor) -> Tensor:
        """The part of the energy's first layer that sees the context."""
        return self.energy.prepare(context)

    def prepared_log_ratio(self, z: Tensor, prepared: Tensor) -> Tensor:
        """−E, given that part."""
        return -self.energy(z, prepared)

    @property
    def footprint(self) -> int:
        """A hidden layer's width."""
        return self.options.energy.width

    def loss(self, pair: Pair, step: int) -> Terms:
        """The energy's terms, and every ``ratio``-th step the sampler's; gradients of either stay in its own network."""
        sampler_moves = step % self.options.ratio == self.options.ratio - 1
        with torch.set_grad_enabled(sampler_moves):
            sampler = self.flow(pair.below, pair.context)
            z = sampler.transform(pair.normal)
        prepared = self.prepare(pair.context)
        terms = {
            "posterior": self.energy(pair.posterior, prepared).float().mean(),
            "sampler": -self.energy(z.detach(), prepared).float().mean(),
            "penalty": self.options.penalty * self._penalty(pair, z.detach(), prepared),
        }
        if sampler_moves:
            frozen = {name: parameter.detach() for name, parameter in self.energy.named_parameters()}
            terms["energy"] = functional_call(self.energy, frozen, (z, prepared.detach())).float().mean()
            terms["kl"] = self.options.kl * (sampler.log_prob(z) - pair.below.log_prob(z)).mean()
        return terms

    def _penalty(self, pair: Pair, z: Tensor, prepared: Tensor) -> Tensor:
        """(‖∇E‖ − 1)² on random points between posterior and sampler."""
        with torch.enable_grad():
            share = pair.uniform.view(-1, *[1] * (z.dim() - 1))
            between = (share * pair.posterior + (1 - share) * z).requires_grad_()
            energy = self.energy(between, prepared).float()
            (gradient,) = torch.autograd.grad(energy.sum(), between, create_graph=True)
            return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The energy's, and the sampler's with a learning rate of its own."""
        sampler_rate = self.options.sampler_learning_rate or self.options.learning_rate
        return [
            {"params": list(self.energy.parameters())},
            {"params": list(self.flow.parameters()), "scale": sampler_rate / self.options.learning_rate},
        ]

    @torch.no_grad()
    def held_out_loss(self, pair: Pair, step: int) -> Terms:  # noqa: ARG002
        """−log density of posterior samples, by ``criterion``: the game's own loss says nothing of how good the players are.

        That of SIR is bounded as metrics/likelihood.py does it, with the sample itself among its proposals (Lawson et al.
        2019).
        """
        sampler, z = self.flow(pair.below, pair.context), pair.posterior.float()
        if self.options.criterion == "sampler":
            return {"sampler": -sampler.log_prob(z).mean()}
        prepared, count = self.prepare(pair.context), min(CRITERION_PROPOSALS - 1, len(z))

        def log_density(z: Tensor) -> Tensor:
            return pair.below.log_prob(z) + self.prepared_log_ratio(z, prepared).float()

        def log_weight(z: Tensor) -> Tensor:
            return log_density(z) - sampler.log_prob(z)

        def served(values: Tensor) -> Tensor:
            """What belongs to an example, (batch, …), given to ``count`` of them, (count, batch, …)."""
            return torch.stack([values.roll(shift, 0) for shift in range(count)])

        # The noise of one example serves the others too: in any one context it is fresh. In the first group's, the same for
        # all, so do its proposal and that one's weight, found once.
        others = (
            served(log_weight(sampler.transform(pair.normal)))
            if self.group.k == 0
            else log_weight(sampler.transform(served(pair.normal)))
        )
        own = log_density(z)
        log_weights = torch.cat([(own - sampler.log_prob(z))[None], others])
        normaliser = log_weights.logsumexp(0) - math.log(len(log_weights))
        return {"prior": (normaliser - own).mean()}


class AmortisedPrior(GroupPrior):
    """The density that another prior proposes from, as a prior of its own: exact, and sampled in one pass."""

    on_proposal = True

"""Importance-weighted likelihoods of a VAE under several priors at once, on the same posterior samples.

    log p(x) ≥ E log (1/S) Σ_s p(x | z_s) Π_k p_prior(z_k | c_k) / q(z_k | c_k, x)      (Burda et al. 2016)

A corrected prior base·r/Z needs Z_k(c_k), and the log of a Monte-Carlo mean is biased low, which flatters the prior. Hence
two numbers for it:

- *plug-in*: log Ẑ_k from N base samples per context. Optimistic, since E log Ẑ ≤ log Z; its curve over N shows by how much.
- *sampler*: the density of what SIR with M proposals really draws, estimated without bias by
  base(z) r(z) / ((1/M) (r(z) + Σ_{j≥2} r(z_j))), z_j ~ base (Lawson et al. 2019). A product of unbiased estimates inside the
  log leaves a rigorous lower bound.

A prior may have a proposal density g of its own instead of the base: then w = base·r / g takes r's place in Ẑ and in the
normaliser of SIR.

Both tend to the energy-based prior's value as N and M grow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from models.distributions import kl_divergence
from models.protocol import HierarchicalVAE, LearnedPrior, descend
from runtime.options import Options
from runtime.progress import Report, silent
from runtime.randomness import Noise

PROPOSALS_AT_ONCE = 100
SAMPLES_AT_ONCE = 100  # of each example: what a pass works on stays in the cache, and memory does not grow with S
SOME_BLOCKS = 8

Count = Annotated[int, Field(ge=1)]


class GainOptions(Options):
    """A smaller measurement, where normalisers are dear: on so many ``examples``, with ``samples`` each."""

    examples: Count
    samples: Count


class LikelihoodOptions(Options):
    """What is measured.

    ``samples``: S, importance samples per example. ``normaliser``: the numbers N of base samples per context at which the
    plug-in is read off. ``proposals``: the numbers M of SIR proposals at which the sampler bound is read off. ``pool``: base
    samples of the first group, whose context all examples share. ``gains``: the measurement of every prior but the model's
    own, and of its gain over that one; if absent, all are measured alike.
    """

    samples: Count
    normaliser: list[Count]
    proposals: list[Count]
    pool: Count = 2**20
    gains: GainOptions | None = None

    @model_validator(mode="after")
    def _fits(self) -> "LikelihoodOptions":
        if max(*self.normaliser, *self.proposals) > self.pool:
            raise ValueError(f"pool: {self.pool} base samples are fewer than the largest of normaliser and proposals")
        return self


@dataclass
class Pool:
    """log r of base samples of a group whose context is the same for every example: the first group.

    Blocks of the pool stand in for fresh samples, so that normalisers of any size cost nothing more.
    """

    log_r: Tensor  # (samples,)
    _sums: dict[int, Tensor] = field(default_factory=dict)

    def _block_sums(self, count: int) -> Tensor:
        """log Σ r over each block of ``count`` samples, shape (blocks,)."""
        if count not in self._sums:
            self._sums[count] = self.log_r[: len(self.log_r) // count * count].double().view(-1, count).logsumexp(1).float()
        return self._sums[count]

    def log_sums(self, count: int, positions: Tensor) -> Tensor:
        """log Σ r over a block of ``count`` samples for each of ``positions`` (n,), round and round the pool: shape (n,)."""
        sums = self._block_sums(count)
        return sums[(positions % len(sums)).to(sums.device)]

    def error(self, count: int) -> float:
        """Standard error, nats, of the mean over blocks of ``count`` samples of log Σ r: one for all examples."""
        sums = self._block_sums(count)
        between = (sums.std() / math.sqrt(len(sums))).item() if len(sums) >= SOME_BLOCKS else 0.0
        log_sum, log_sum_squares = self.log_r.double().logsumexp(0), (2 * self.log_r.double()).logsumexp(0)
        inverse_ess = (log_sum_squares - 2 * log_sum).exp().item()  # delta method, for blocks too few to be compared
        return max(between, math.sqrt(max(0.0, inverse_ess - 1 / len(self.log_r))))


def proposal_weight(prior: LearnedPrior, k: int, z: Tensor, context: Tensor) -> Tensor:
    """log w = log r + log base − log proposal of z (*lead, batch, *latent), shape (*lead, batch): log r for most priors."""
    log_r = prior.log_ratio(k, z, context).float()
    if not prior.proposes:
        return log_r
    return log_r + (prior.base(k, context).log_prob(z) - prior.proposal(k, context).log_prob(z)).float()


@torch.no_grad()
def fill_pool(model: HierarchicalVAE, prior: LearnedPrior, seed: int, size: int, report: Report = silent) -> Pool:
    """Score ``size`` base samples of the first group, telling ``report`` of the progress."""
    context = model.start(1)
    noise, proposal = Noise(seed, "pool", device=context.device), prior.proposal(0, context)
    chunk, scores = 2**12, []
    for first in range(0, size, chunk):
        scores.append(proposal_weight(prior, 0, proposal.draw(noise, (min(chunk, size - first),)), context))
        report(min(first + chunk, size), size, "proposals of the first group")
    return Pool(torch.cat(scores).flatten().float())


def _marks(options: LikelihoodOptions) -> list[int]:
    """The counts at which log Σ r is needed: N for the plug-in, M − 1 for the sampler bound (z itself is the M-th)."""
    return sorted({*options.normaliser, *(m - 1 for m in options.proposals if m > 1)})


def _fresh_log_sums(prior: LearnedPrior, k: int, context: Tensor, noise: Noise, marks: Sequence[int]) -> dict[int, Tensor]:
    """log Σ r over the first n of a stream of base samples, in every context: n -> (batch,), in constant memory."""
    proposal, running, found, done = prior.proposal(k, context), context.new_full((len(context),), -math.inf), {}, 0
    for mark in marks:
        while done < mark:
            count = min(PROPOSALS_AT_ONCE, mark - done)
            log_w = proposal_weight(prior, k, proposal.draw(noise, (count,)), context)
            running = torch.logaddexp(running, log_w.logsumexp(0))
            done += count
        found[mark] = running
    return found


@torch.no_grad()
def log_likelihoods(
    model: HierarchicalVAE,
    priors: Mapping[str, LearnedPrior],
    pools: Mapping[str, Pool],
    x: Tensor,
    rows: Sequence[int],
    seed: int,
    options: LikelihoodOptions,
) -> dict[str, Tensor]:
    """Log-likelihood of each example under each prior, all from the same posterior samples.

    Args:
        model: the VAE, frozen, in eval mode.
        priors: by name.
        pools: of the priors that are not exact (:func:`fill_pool`).
        x: (rows, *data shape).
        rows: index of each example; it names the example's draws, so that the split into batches does not matter.
        seed: names the draws too.
        options: sample counts.

    Returns:
        Tensors (rows,), nats: ``NAME`` for an exact prior; for a corrected one ``NAME/plugin/N``, ``NAME/sampler/M``, and
        ``NAME/log-z/k00/N`` … (mean over the example's posterior samples of log Ẑ_k) and ``NAME/elbo-gain/k00`` … (the
        like mean of log r − log normaliser of SIR with the most proposals: what the group adds to the ELBO).
    """
    S, features = options.samples, model.encode(x)
    passes = [
        _one_pass(model, priors, pools, x, features, rows, range(first, min(first + SAMPLES_AT_ONCE, S)), seed, options)
        for first in range(0, S, SAMPLES_AT_ONCE)
    ]
    weights = {key: torch.stack([one[key] for one, _ in passes]).logsumexp(0) - math.log(S) for key in passes[0][0]}
    return weights | {key: torch.stack([one[key] for _, one in passes]).sum(0) / S for key in passes[0][1]}


def _one_pass(
    model: HierarchicalVAE,
    priors: Mapping[str, LearnedPrior],
    pools: Mapping[str, Pool],
    x: Tensor,
    features: Sequence[Tensor],
    rows: Sequence[int],
    samples: range,
    seed: int,
    options: LikelihoodOptions,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Some of the posterior samples of every example: log Σ of their importance weights, and Σ of what is averaged."""
    device, S, marks = x.device, len(samples), _marks(options)
    features = [feature.repeat(S, *[1] * (feature.dim() - 1)) for feature in features]
    positions = (torch.tensor(rows)[None] * options.samples + torch.tensor(samples)[:, None]).flatten()
    log_q = x.new_zeros(S * len(x))
    log_base = {name: torch.zeros_like(log_q) for name in priors}
    log_norm: dict[str, Tensor] = {}
    by_group: dict[str, Tensor] = {}

    def stream(purpose: str, k: int) -> Noise:
        step = samples.start // SAMPLES_AT_ONCE
        return Noise(seed, f"likelihood-{purpose}", k, step, rows=rows, repeats=S, device=device)

    def choose(k: int, context: Tensor) -> Tensor:
        nonlocal log_q
        posterior = model.posterior(k, context, features)
        z = posterior.draw(stream("posterior", k))
        log_q = log_q + posterior.log_prob(z)
        for name, prior in priors.items():
            log_base[name] += prior.base(k, context).log_prob(z)
            if not prior.exact:
                log_w = proposal_weight(prior, k, z, context)
                log_r = prior.log_ratio(k, z, context).float() if prior.proposes else log_w
                log_base[name] += log_r
                sums = (
                    {mark: pools[name].log_sums(mark, positions) for mark in marks}
                    if k == 0
                    else _fresh_log_sums(prior, k, context, stream(f"normaliser-{name}", k), marks)
                )
                _add_normalisers(name, sums, log_w, options, log_norm)
                for n in options.normaliser:
                    by_group[f"{name}/log-z/k{k:02d}/{n}"] = (sums[n] - math.log(n)).view(S, -1).sum(0)
                gain = log_r - _sampler_normaliser(sums, log_w, max(options.proposals))
                by_group[f"{name}/elbo-gain/k{k:02d}"] = gain.view(S, -1).sum(0)
        return z

    decoded = model.decode(descend(model, S * len(x), choose))
    log_weight = decoded.log_prob(x.repeat(S, *[1] * (x.dim() - 1))) - log_q

    def weighed(log_prior: Tensor) -> Tensor:
        return (log_weight + log_prior).view(S, -1).logsumexp(0)

    exact = {name: weighed(log_base[name]) for name, prior in priors.items() if prior.exact}
    corrected = {key: weighed(log_base[key.split("/")[0]] - norm) for key, norm in log_norm.items()}
    return exact | corrected, by_group


def _sampler_normaliser(sums: Mapping[int, Tensor], log_w: Tensor, m: int) -> Tensor:
    """log of the mean of w over z itself and m − 1 proposals."""
    return (torch.logaddexp(log_w, sums[m - 1]) if m > 1 else log_w) - math.log(m)


def _add_normalisers(
    name: str, sums: Mapping[int, Tensor], log_w: Tensor, options: LikelihoodOptions, log_norm: dict[str, Tensor]
) -> None:
    """Add this group's log normalisers to the running sums over groups, one for each N and each M."""
    terms = {f"{name}/plugin/{n}": sums[n] - math.log(n) for n in options.normaliser}
    terms |= {f"{name}/sampler/{m}": _sampler_normaliser(sums, log_w, m) for m in options.proposals}
    for key, term in terms.items():
        log_norm[key] = log_norm.get(key, 0) + term


@torch.no_grad()
def contrastive_losses(
    model: HierarchicalVAE, prior: LearnedPrior, x: Tensor, rows: Sequence[int], seed: int
) -> list[Tensor]:
    """The NCE loss of r on given examples, group by group: K tensors (rows,), nats, 2 ln 2 at chance.

    softplus(−log r) of a posterior sample plus softplus(log r) of a base sample in the same context.
    """
    features, found = model.encode(x), []

    def choose(k: int, context: Tensor) -> Tensor:
        z = model.posterior(k, context, features).draw(Noise(seed, "nce-posterior", k, rows=rows, device=x.device))
        other = prior.base(k, context).draw(Noise(seed, "nce-base", k, rows=rows, device=x.device))
        losses = [torch.nn.functional.softplus(sign * prior.log_ratio(k, at, context)) for sign, at in ((-1, z), (1, other))]
        found.append(losses[0] + losses[1])
        return z

    descend(model, len(x), choose)
    return found


@torch.no_grad()
def divergences(model: HierarchicalVAE, x: Tensor, rows: Sequence[int], seed: int) -> list[Tensor]:
    """KL(q(z_k | z_<k, x) || p(z_k | z_<k)) under the model's own prior, z_<k ~ q: K tensors (rows,), nats."""
    features, found = model.encode(x), []

    def choose(k: int, context: Tensor) -> Tensor:
        posterior = model.posterior(k, context, features)
        found.append(kl_divergence(posterior, model.prior(k, context)))
        return posterior.draw(Noise(seed, "kl", k, rows=rows, device=x.device))

    descend(model, len(x), choose)
    return found


StandardError = tuple[float, float, int]


def mean_and_error(values: Tensor) -> StandardError:
    """Mean, its standard error and the count of independent values (n,)."""
    values = values.double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values)), len(values)

"""Importance-weighted likelihoods of a VAE under several priors at once, on the same posterior samples.

    log p(x) ≥ E log (1/S) Σ_s w_s,   w_s = p(x | z_s) Π_k p_prior(z_k | c_k) / q(z_k | c_k, x)      (Burda et al. 2016)

The bound rises with S, and the worse a prior fits the posterior, the more: a gain over the base is measured at the same S
for both, and falls as S grows. So S, the numbers N and M below, and the examples are part of what a number is.

A corrected prior base·r/Z needs Z_k(c_k), and the log of a Monte-Carlo mean is biased low, which flatters the prior. Hence
two numbers for it:

- *plug-in*: log Ẑ_k from N base samples per context. Optimistic, since E log Ẑ ≤ log Z; its curve over N shows by how much.
- *sampler*: the density of what SIR with M proposals really draws, estimated without bias by
  base(z) r(z) / ((1/M) (r(z) + Σ_{j≥2} r(z_j))), z_j ~ base (Lawson et al. 2019). A product of unbiased estimates inside the
  log leaves a rigorous lower bound.

A prior may have a proposal density g of its own instead of the base: then w = base·r / g takes r's place in Ẑ and in the
normaliser of SIR.

Both tend to the energy-based prior's value as N and M grow.

**Normalisers for a few of the samples.** Past the first group every posterior sample has contexts of its own, and
normalisers for all of S would cost M times what the samples do. With v_s = w_s Z_s, the weight before it is normalised, and
π_s = v_s / Σ v,

    (1/S) Σ_s w_s = (1/S) Σ_s v_s · Σ_s π_s / Z_s,

and the second factor, a mean of 1/Z under π, is estimated without bias by the mean over T samples drawn from π. What stands
inside the log still has the right expectation, so the bound remains one; it is a little lower than with all S normalisers,
by about the variance of 1/Z under π over 2T. S samples then cost S scores and T·M, not S·M.

**Memory.** What an example reads from its streams at a time is part of the definition of the draws: SAMPLES_AT_ONCE and
PROPOSALS_AT_ONCE, the latter fewer on maps so large that DRAWN_AT_ONCE says so. How much of that is then worked on at a time
is not: so many examples, samples and proposals that no tensor has more than BYTES_AT_ONCE, tried out on a few samples first
(:class:`_Costs`). Larger can be only what cannot be parted: one sample, the TRIED of the trial where one takes more than
BYTES_AT_ONCE / TRIED, and the noise of one example, drawn whole, for latents of more than 670 000 numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import softplus
from torch.overrides import TorchFunctionMode

from models.distributions import Distribution
from models.protocol import HierarchicalVAE, LearnedPrior, descend, posterior_pass
from runtime.options import Options
from runtime.progress import Report, silent
from runtime.randomness import Noise

PROPOSALS_AT_ONCE = 100
SAMPLES_AT_ONCE = 100  # of each example: what a pass works on stays in the cache, and memory does not grow with S
POOL_AT_ONCE = 2**12
DRAWN_AT_ONCE = 2**24  # numbers of a pool's or an example's proposals
BYTES_AT_ONCE = 2**28
TRIED = 8
SOME_BLOCKS = 30

Count = Annotated[int, Field(ge=1)]
Counts = Annotated[list[Count], Field(min_length=1)]


class LikelihoodOptions(Options):
    """What is measured.

    ``samples``: the numbers S of importance samples per example at which everything is read off. ``normaliser``: the numbers
    N of base samples per context at which the plug-in is. ``proposals``: the numbers M of SIR proposals at which the sampler
    bound is. ``resamples``: T, for how many of the S samples normalisers are estimated; a model of one group, where all
    samples share the context, has them for all. ``pool``: base samples of the first group, whose context all examples share.
    """

    samples: Counts
    normaliser: Counts
    proposals: Counts
    resamples: Annotated[int, Field(ge=1, le=SAMPLES_AT_ONCE)] = 16
    pool: Count = 2**20

    @model_validator(mode="after")
    def _fits(self) -> "LikelihoodOptions":
        for name in ("samples", "normaliser", "proposals"):
            counts = getattr(self, name)
            if len(set(counts)) != len(counts):
                raise ValueError(f"{name}: {counts} names a number twice")
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
        if len(sums) >= SOME_BLOCKS:
            return (sums.std() / math.sqrt(len(sums))).item()
        log_sum, log_sum_squares = self.log_r.double().logsumexp(0), (2 * self.log_r.double()).logsumexp(0)
        inverse_ess = (log_sum_squares - 2 * log_sum).exp().item()  # delta method, for blocks too few to be compared
        return math.sqrt(max(0.0, inverse_ess - 1 / len(self.log_r)))


def scores(prior: LearnedPrior, k: int, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """log w = log r + log base − log proposal, which is log r for most priors, and log r itself.

    Args:
        prior: whose group ``k``.
        z: (*lead, batch, *latent).
        context: (batch, *context shape).

    Returns:
        Two tensors (*lead, batch), nats.
    """
    log_r = prior.log_ratio(k, z, context).float()
    if not prior.proposes:
        return log_r, log_r
    return log_r + (prior.base(k, context).log_prob(z) - prior.proposal(k, context).log_prob(z)).float(), log_r


class _Sizes(TorchFunctionMode):
    """Notes the bytes of the largest tensor that torch's functions return."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return result


def _fitting(size: int, most: int) -> int:
    """How many things of ``size`` bytes to work on at a time: 1 to ``most``."""
    return min(max(BYTES_AT_ONCE // max(size, 1), 1), most)


class _Shared(Noise):
    """What is read from streams for many proposals in many contexts, handed out to parts of them.

    A part's n-th reading is its part of the n-th reading for all, which the first part to get so far makes.

    Args:
        whole: the streams.
        count, contexts: how many proposals in how many contexts.
    """

    def __init__(self, whole: Noise, count: int, contexts: int):
        self.whole, self.size, self.device = whole, (count, contexts), whole.device
        self._drawn: list[Tensor] = []

    def part(self, proposals: slice, contexts: slice) -> Noise:
        """Those of some of the proposals in some of the contexts, from their first reading on."""
        self._chosen, self._next = (proposals, contexts), 0
        return self

    def normal(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:  # noqa: ARG002
        """The part's share."""
        return self._share(self.whole.normal, batch[1:])

    def uniform(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:  # noqa: ARG002
        """The part's share."""
        return self._share(self.whole.uniform, batch[1:])

    def _share(self, draw: Callable[..., Tensor], event: tuple[int, ...]) -> Tensor:
        if self._next == len(self._drawn):
            self._drawn.append(draw(self.size[:1], (self.size[1], *event)))
        self._next += 1
        return self._drawn[self._next - 1][self._chosen]


def _parts(size: int, whole: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, whole, size)]


class _Proposals:
    """Proposals of a group in contexts (batch, …), drawn and scored in parts of which each tensor fits the memory.

    Args:
        prior, k, context: whose proposals, of which group, and where.
        cost: bytes that one takes (:func:`_proposal`).
    """

    def __init__(self, prior: LearnedPrior, k: int, context: Tensor, cost: int):
        self.prior, self.k, self.context = prior, k, context
        contexts = _fitting(cost, len(context))
        self.at_once = max(1, _fitting(cost, BYTES_AT_ONCE) // contexts)
        self.parts = [(some, context[some], prior.proposal(k, context[some])) for some in _parts(contexts, len(context))]

    def log_w(self, noise: Noise, count: int) -> Tensor:
        """log w (:func:`scores`) of the next ``count`` in every context, (count, batch)."""
        shared, columns = _Shared(noise, count, len(self.context)), list[Tensor]()
        for some, seen, proposal in self.parts:
            found = list[Tensor]()
            for chosen in _parts(self.at_once, count):
                z = proposal.draw(shared.part(chosen, some), (len(range(count)[chosen]),))
                found.append(scores(self.prior, self.k, z, seen)[0])
            columns.append(torch.cat(found))
        return torch.cat(columns, dim=1)


def _proposal(prior: LearnedPrior, k: int, context: Tensor) -> tuple[int, int]:
    """How many numbers a z of group k has, and bytes of the largest tensor that scoring one makes: tried in context[:1]."""
    seen = context[:1]
    with _Sizes() as sizes:
        z = prior.proposal(k, seen).draw(Noise(0, "likelihood-tried", k, device=seen.device), (TRIED,))
        scores(prior, k, z, seen)
    return z[0].numel(), -(-sizes.largest // TRIED)


@torch.no_grad()
def fill_pool(model: HierarchicalVAE, prior: LearnedPrior, seed: int, size: int, report: Report = silent) -> Pool:
    """Score ``size`` base samples of the first group, telling ``report`` of the progress."""
    context = model.start(1)
    noise, found = Noise(seed, "pool", device=context.device), list[Tensor]()
    numbers, cost = _proposal(prior, 0, context)
    proposals, chunk = _Proposals(prior, 0, context, cost), _drawn(POOL_AT_ONCE, numbers)
    for first in range(0, size, chunk):
        found.append(proposals.log_w(noise, min(chunk, size - first)))
        report(min(first + chunk, size), size, "proposals of the first group")
    return Pool(torch.cat(found).flatten().float())


def _marks(options: LikelihoodOptions) -> list[int]:
    """The counts at which log Σ r is needed: N for the plug-in, M − 1 for the sampler bound (z itself is the M-th)."""
    return sorted({*options.normaliser, *(m - 1 for m in options.proposals if m > 1)})


def _drawn(most: int, numbers: int) -> int:
    """How many things of so many ``numbers`` are drawn at a time: 1 to ``most``, whatever the memory."""
    return min(max(DRAWN_AT_ONCE // max(numbers, 1), 1), most)


class _Streams(Noise):
    """The streams of some of the repeats of every row: what the others read is drawn too, and dropped.

    Args:
        whole: the streams of all repeats.
        part: which of them these are.
    """

    def __init__(self, whole: Noise, part: range):
        self.whole, self.part, self.device = whole, part, whole.device

    def normal(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """As all repeats have it."""
        return self._of(self.whole.normal, lead, batch)

    def uniform(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """As all repeats have it."""
        return self._of(self.whole.uniform, lead, batch)

    def _of(self, draw: Callable[..., Tensor], lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        rows, repeats = batch[0] // len(self.part), self.whole.repeats
        drawn = draw(lead, (repeats * rows, *batch[1:])).unflatten(len(lead), (repeats, rows))
        return drawn.narrow(len(lead), self.part.start, len(self.part)).flatten(len(lead), len(lead) + 1)


def _fresh_log_sums(
    prior: LearnedPrior, k: int, context: Tensor, noise: Noise, marks: Sequence[int], at_once: int, cost: int
) -> dict[int, Tensor]:
    """log Σ r over the first n of a stream of base samples, in every context: n -> (batch,), in constant memory.

    ``at_once`` of them are drawn at a time, and ``cost`` is what :func:`_proposal` says of one.
    """
    proposals, running, found, done = (
        _Proposals(prior, k, context, cost),
        context.new_full((len(context),), -math.inf),
        {},
        0,
    )
    for mark in marks:
        while done < mark:
            count = min(at_once, mark - done)
            running = torch.logaddexp(running, proposals.log_w(noise, count).logsumexp(0))
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
        Tensors (rows,), nats: ``NAME/S`` for an exact prior; for a corrected one ``NAME/plugin/N/S``, ``NAME/sampler/M/S``,
        and ``NAME/log-z/k00/N`` … (mean over posterior samples of log Ẑ_k) and ``NAME/elbo-gain/k00`` … (the like mean of
        log r − log normaliser of SIR with the most proposals: what the group adds to the ELBO).
    """
    costs = _Costs.of(model, priors, x[:1], options)
    at_once = _fitting(costs.example, len(x))
    parts = [
        _Likelihoods(model, priors, pools, some, rows[first : first + at_once], seed, options, costs).measure()
        for first, some in zip(range(0, len(x), at_once), x.split(at_once), strict=True)
    ]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@dataclass(frozen=True)
class _Costs:
    """What the work on one example takes, found by trying a few samples of it.

    Attributes:
        sample: bytes of the largest tensor that a posterior sample makes, or of all its latents together.
        drawn: of a corrected prior's group, how many proposals are drawn at a time, by name and group.
        proposals: bytes of the largest tensor that one of those makes.
        example: bytes of the largest tensor of an example at so many samples and proposals at a time as are drawn, but for
            those that score proposals.
    """

    sample: int
    drawn: Mapping[tuple[str, int], int]
    proposals: Mapping[tuple[str, int], int]
    example: int

    @classmethod
    def of(
        cls, model: HierarchicalVAE, priors: Mapping[str, LearnedPrior], x: Tensor, options: LikelihoodOptions
    ) -> "_Costs":
        """Those of an example x (1, *data shape)."""
        drawn: dict[tuple[str, int], int] = {}
        proposals: dict[tuple[str, int], int] = {}
        latents, noise = 0, 0

        def visit(k: int, context: Tensor, posterior: Distribution, z: Tensor) -> None:
            nonlocal latents, noise
            latents += z.nbytes
            noise = max(noise, SAMPLES_AT_ONCE * z[0].nbytes)
            posterior.log_prob(z)
            for name, prior in priors.items():
                prior.base(k, context).log_prob(z)
                if not prior.exact:
                    scores(prior, k, z, context)
                if not prior.exact and k > 0:
                    numbers, proposals[name, k] = _proposal(prior, k, context)
                    drawn[name, k] = _drawn(PROPOSALS_AT_ONCE, options.resamples * numbers)
                    noise = max(noise, drawn[name, k] * options.resamples * z[0].nbytes)

        with _Sizes() as sizes:
            context = posterior_pass(
                model, x, lambda k: Noise(0, "likelihood-tried", k, device=x.device), visit, repeats=TRIED
            )
            model.decode(context).log_prob(x.repeat(TRIED, *[1] * (x.dim() - 1)))
        sample = -(-max(sizes.largest, latents) // TRIED)
        return cls(sample, drawn, proposals, max(SAMPLES_AT_ONCE * sample, noise))


@dataclass
class _Likelihoods:
    """:func:`log_likelihoods` of one batch."""

    model: HierarchicalVAE
    priors: Mapping[str, LearnedPrior]
    pools: Mapping[str, Pool]
    x: Tensor
    rows: Sequence[int]
    seed: int
    options: LikelihoodOptions
    costs: _Costs

    def __post_init__(self) -> None:
        self.corrected = [name for name, prior in self.priors.items() if not prior.exact]
        self.shares_context = self.model.groups == 1
        self.at_once = _fitting(self.costs.sample * len(self.x), SAMPLES_AT_ONCE)
        self.sums: dict[str, _PrefixSums] = {}
        self.drawn = {name: _Resampled(self.options.resamples, len(self.x), self.x.device) for name in self.corrected}
        above = [size for size in self.options.samples if size > self.options.resamples]
        # Which part of the work normalises the winners of S samples: it names their draws.
        self.parts = {size: 1 + i for i, size in enumerate(sorted(above, key=lambda size: (size - 1) // SAMPLES_AT_ONCE))}
        self.resampled: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self.corrected}
        self.by_group: dict[str, list[Tensor]] = {}

    def measure(self) -> dict[str, Tensor]:
        """All of it."""
        most, found = max(self.options.samples), dict[str, Tensor]()
        for first in range(0, most, SAMPLES_AT_ONCE):
            drawn = range(first, min(first + SAMPLES_AT_ONCE, most))
            for start in range(0, len(drawn), self.at_once):
                self._add(drawn, drawn[start : start + self.at_once])
        for key, sums in self.sums.items():
            found |= {f"{key}/{count}": total - math.log(count) for count, total in sums.found.items()}
        for name in self.corrected:  # the S above T, from their mean weights before they are normalised
            for size, norms in self.resampled[name].items():
                for key, norm in norms.items():
                    total = found[f"{name}/{size}"] + (-norm).logsumexp(0)
                    found[f"{key}/{size}"] = total - math.log(self.options.resamples)
        for name in self.corrected:  # before it is normalised, a corrected prior's sum is nobody's likelihood
            found = {key: value for key, value in found.items() if key.rpartition("/")[0] != name}
        return found | {key: torch.cat(parts).mean(0) for key, parts in self.by_group.items()}

    def _stream(self, purpose: str, k: int, step: int, repeats: int, part: range) -> Noise:
        """The streams of ``part`` of the repeats that are drawn at a time."""
        whole = Noise(self.seed, f"likelihood-{purpose}", k, step, self.rows, repeats, self.x.device)
        return whole if len(part) == repeats else _Streams(whole, part)

    def _add(self, drawn: range, samples: range) -> None:
        """Take in the next posterior samples of every example, of those that are drawn at a time."""
        count, step, codes = len(samples), drawn.start // SAMPLES_AT_ONCE, list[Tensor]()
        part = range(samples.start - drawn.start, samples.stop - drawn.start)
        log_q = self.x.new_zeros(count * len(self.x))
        log_prior = {name: torch.zeros_like(log_q) for name in self.priors}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.corrected}

        def visit(k: int, context: Tensor, posterior: Distribution, z: Tensor) -> None:
            nonlocal log_q
            codes.append(z)
            log_q = log_q + posterior.log_prob(z)
            for name, prior in self.priors.items():
                log_prior[name] += prior.base(k, context).log_prob(z)
                if not prior.exact:
                    found[name].append(scores(prior, k, z, context))
                    log_prior[name] += found[name][-1][1]

        context = posterior_pass(
            self.model, self.x, lambda k: self._stream("posterior", k, step, len(drawn), part), visit, count
        )
        log_weight = self.model.decode(context).log_prob(self.x.repeat(count, *[1] * (self.x.dim() - 1))) - log_q
        log_v = {name: (log_weight + value).view(count, -1) for name, value in log_prior.items()}
        for name, value in log_v.items():
            self._sum(name, value, samples)
        if self.shares_context:
            positions = (
                torch.tensor(self.rows)[None] * max(self.options.samples) + torch.tensor(samples)[:, None]
            ).flatten()
            for name in self.corrected:
                norms = self._log_normalisers(name, codes, positions, step, len(drawn), part, found[name])
                for key, norm in norms.items():
                    self._sum(key, log_v[name] - norm, samples)
            return
        latents = [z.view(count, len(self.x), *z.shape[1:]) for z in codes]
        resamples = self.options.resamples
        if samples.start < min(resamples, len(drawn)) and self.corrected:
            # The first samples as they are: means over the posterior, and every S up to T without resampling.
            first = range(samples.start, min(resamples, samples.stop))
            own, positions = [z[: len(first)].flatten(0, 1) for z in latents], self._positions(0, first)
            for name in self.corrected:
                known = [(log_w[: len(positions)], log_r[: len(positions)]) for log_w, log_r in found[name]]
                together = min(resamples, len(drawn))
                for key, norm in self._log_normalisers(name, own, positions, 0, together, first, known).items():
                    self._sum(key, log_v[name][: len(first)] - norm, first)
        marks = {size - samples.start: size for size in self.parts}
        for name in self.corrected:
            race = self._stream(f"resample-{name}", 0, step, 1, range(1)).gumbel((resamples, len(drawn)), (len(self.x),))
            keys = log_v[name] + race[:, part.start : part.stop]
            for size, winners in self.drawn[name].add(keys, latents, marks).items():
                self.resampled[name][size] = self._normalisers_of(name, self.parts[size], winners)

    def _sum(self, key: str, log_values: Tensor, samples: range) -> None:
        self.sums.setdefault(key, _PrefixSums(self.options.samples)).add(log_values, samples)

    def _positions(self, part: int, repeats: range) -> Tensor:
        """Which blocks of a pool some of the samples of one part of the work read, (repeats x rows,)."""
        parts = 1 + len(self.options.samples)
        first = (torch.tensor(self.rows)[None] * parts + part) * self.options.resamples
        return (first + torch.tensor(repeats)[:, None]).flatten()

    def _normalisers_of(self, name: str, part: int, winners: Sequence[Tensor]) -> dict[str, Tensor]:
        """Σ_k of the log normalisers of the T winners among the first S, by key: (T, rows)."""
        resamples, found = self.options.resamples, list[dict[str, Tensor]]()
        for first in range(0, resamples, self.at_once):
            some = range(first, min(first + self.at_once, resamples))
            flat = [z[some.start : some.stop].flatten(0, 1) for z in winners]
            found.append(self._log_normalisers(name, flat, self._positions(part, some), part, resamples, some))
        return {key: torch.cat([norms[key] for norms in found]) for key in found[0]}

    def _log_normalisers(
        self,
        name: str,
        codes: Sequence[Tensor],
        positions: Tensor,
        step: int,
        repeats: int,
        some: range,
        known: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Σ_k of the log normalisers of given latents, for each N and each M.

        Args:
            name: of the prior.
            codes: z of every group, (some x rows, *latent), repeat-major.
            positions: of each in the pool.
            step, repeats: name the draws, which are of so many samples at a time.
            some: which of them these are.
            known: :func:`scores` of every group's z, of samples as the posterior drew them: their means are taken note of.

        Returns:
            ``NAME/plugin/N`` and ``NAME/sampler/M``, each (some, rows).
        """
        prior, marks, norms, count = self.priors[name], _marks(self.options), dict[str, Tensor](), len(some)

        def choose(k: int, context: Tensor) -> Tensor:
            z = codes[k]
            log_w, log_r = scores(prior, k, z, context) if known is None else known[k]
            if k == 0:
                sums = {mark: self.pools[name].log_sums(mark, positions) for mark in marks}
            else:
                noise = self._stream(f"normaliser-{name}", k, step, repeats, some)
                at_once, cost = self.costs.drawn[name, k], self.costs.proposals[name, k]
                sums = _fresh_log_sums(prior, k, context, noise, marks, at_once, cost)
            _add_normalisers(name, sums, log_w, self.options, norms)
            if known is not None:
                for n in self.options.normaliser:
                    self._mean(f"{name}/log-z/k{k:02d}/{n}", sums[n] - math.log(n), count)
                gain = log_r - _sampler_normaliser(sums, log_w, max(self.options.proposals))
                self._mean(f"{name}/elbo-gain/k{k:02d}", gain, count)
            return z

        descend(self.model, len(codes[0]), choose)
        return {key: norm.view(count, -1) for key, norm in norms.items()}

    def _mean(self, key: str, values: Tensor, count: int) -> None:
        self.by_group.setdefault(key, []).append(values.view(count, -1))


class _PrefixSums:
    """log Σ exp over the first S of a stream of values, example by example, for several S."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = sizes
        self.found: dict[int, Tensor] = {}  # S -> (rows,)
        self._before: Tensor | None = None

    def add(self, log_values: Tensor, samples: range) -> None:
        """Take in the values (samples, rows) of the next samples."""
        for size in self.sizes:
            if samples.start < size <= samples.stop:
                self.found[size] = self._until(log_values[: size - samples.start])
        self._before = self._until(log_values)

    def _until(self, log_values: Tensor) -> Tensor:
        total = log_values.logsumexp(0)
        return total if self._before is None else torch.logaddexp(self._before, total)


class _Resampled:
    """T samples of every example, drawn in proportion to their weights from the first S of a stream, for several S.

    By the Gumbel-max trick, so that nothing but the T winners of every example is kept.
    """

    def __init__(self, count: int, rows: int, device: torch.device):
        self.best = torch.full((count, rows), -math.inf, device=device)
        self.codes: list[Tensor] = []  # of every group, (T, rows, *latent)

    def add(self, keys: Tensor, latents: Sequence[Tensor], marks: Mapping[int, int]) -> dict[int, list[Tensor]]:
        """Take in the next samples.

        Args:
            keys: log weight plus Gumbel noise, (T, samples, rows).
            latents: of every group, (samples, rows, *latent).
            marks: after how many samples from the first of these on the winners are wanted, and under which S.

        Returns:
            The winners' latents of every group, (T, rows, *latent), by S, of those S that end in these samples.
        """
        found = {
            size: self._winners(keys[:, :prefix], latents)[1]
            for prefix, size in marks.items()
            if 0 < prefix <= keys.shape[1]
        }
        self.best, self.codes = self._winners(keys, latents)
        return found

    def _winners(self, keys: Tensor, latents: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        values, winner = keys.max(1)
        better, columns = values > self.best, torch.arange(keys.shape[2], device=keys.device)
        chosen = [z[winner, columns] for z in latents]
        if self.codes:
            wide = [better.view(*better.shape, *[1] * (z.dim() - 2)) for z in chosen]
            chosen = [torch.where(*parts) for parts in zip(wide, chosen, self.codes, strict=True)]
        return torch.maximum(values, self.best), chosen


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
    found: list[Tensor] = []

    def visit(k: int, context: Tensor, posterior: Distribution, z: Tensor) -> None:  # noqa: ARG001
        base = prior.base(k, context).draw(Noise(seed, "nce-base", k, rows=rows, device=x.device))
        found.append(softplus(-prior.log_ratio(k, z, context)) + softplus(prior.log_ratio(k, base, context)))

    posterior_pass(model, x, _streams(seed, "nce-posterior", rows, x.device), visit)
    return found


@torch.no_grad()
def divergences(model: HierarchicalVAE, x: Tensor, rows: Sequence[int], seed: int) -> list[Tensor]:
    """KL(q(z_k | z_<k, x) || p(z_k | z_<k)) under the model's own prior, z_<k ~ q: K tensors (rows,), nats."""
    found: list[Tensor] = []

    def visit(k: int, context: Tensor, posterior: Distribution, z: Tensor) -> None:
        found.append(model.divergence(k, context, posterior, z))

    posterior_pass(model, x, _streams(seed, "kl", rows, x.device), visit)
    return found


def _streams(seed: int, purpose: str, rows: Sequence[int], device: torch.device) -> Callable[[int], Noise]:
    return lambda k: Noise(seed, purpose, k, rows=rows, device=device)


StandardError = tuple[float, float, int]


def mean_and_error(values: Tensor) -> StandardError:
    """Mean, its standard error and the count of independent values (n,)."""
    values = values.double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values)), len(values)

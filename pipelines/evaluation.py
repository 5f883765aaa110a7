"""Everything that is measured of one seed of one experiment, as rows of the results table."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from datasets.registry import spec
from metrics import features, frechet, kid, mmd, modes
from metrics.likelihood import (
    LikelihoodOptions,
    Pool,
    contrastive_losses,
    divergences,
    fill_pool,
    log_likelihoods,
    mean_and_error,
)
from models.folding import folded
from models.protocol import HierarchicalVAE, posterior_pass
from pipelines.config import BASELINE, Experiment, plain
from pipelines.results import Row
from pipelines.work import Seeded, under_floor
from priors.protocol import Prior
from priors.registry import PRIORS, SAMPLERS
from runtime import hardware
from runtime.blocks import in_blocks
from runtime.files import exclusive
from runtime.identity import Identity, revision, source_digest
from runtime.progress import Report
from runtime.randomness import Noise

AGGREGATE = "aggregate-posterior"
"""Stands in the prior column for samples decoded from q(z): what a perfect prior would reach with this decoder."""

DATA = "data"
"""Stands in the prior column for the data themselves: the exact density, or real against real."""


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one seed."""

    at: Seeded
    report: Report
    examples: int | None = None  # for a quick look: this many test examples, for the likelihoods

    @cached_property
    def _model(self) -> HierarchicalVAE:
        """What likelihoods are computed by."""
        return folded(self.at.vae)

    def rows(self) -> Iterator[Row]:
        """All of them."""
        for prior, sampler in self.at.draws():  # likelihoods take long: better to miss samples before them than after
            self.at.samples(prior, sampler)
        yield from self._training()
        yield from self._likelihoods()
        for prior, options in self.at.experiment.priors.items():
            for sampler in options.samplers:
                yield from self._samples(prior, sampler)
        yield from self._yardsticks()

    def _row(self, prior: str, metric: str, value: float, stderr: float, n: int, **more: Any) -> Row:
        at = self.at
        common: dict[str, Any] = {
            "experiment": at.name,
            "dataset": at.experiment.dataset,
            "model": f"{at.experiment.model.name}/{at.experiment.model.likelihood}",
            "sampler": "",
            "seed": at.seed,
            "seconds": 0.0,
            "device": hardware.device_name(),
            "features": "",
            "target": "",
            "revision": revision(),
        }
        return Row(prior=prior, metric=metric, value=value, stderr=stderr, n=n, **(common | more))

    def _training(self) -> Iterator[Row]:
        at = self.at
        yield self._row(BASELINE, "train-seconds", at.vae_document["seconds"], 0.0, at.vae_document["step"])
        for name in (name for name, options in at.experiment.priors.items() if options.method != "normal"):
            documents = [at.prior_document(name, k) for k in range(at.vae.groups)]
            yield self._row(name, "train-seconds", sum(d["seconds"] for d in documents), 0.0, documents[0]["step"])

    def _measured(
        self, name: str, seed: int, priors: dict[str, Prior], pools: dict[str, Pool], options: LikelihoodOptions, limit: int
    ) -> dict[str, Tensor]:
        """Per-example numbers of some priors, on ``limit`` test examples (:func:`spread`), kept on disk block by block.

        They are log-likelihoods, NCE losses of the priors that have a normaliser, and the model's KL terms.
        """
        at = self.at
        examples = spread(at.dataset.examples("test"), limit)

        def compute(rows: range) -> dict[str, Tensor]:
            x = examples[rows.start : rows.stop].to(hardware.device())
            found = log_likelihoods(self._model, priors, pools, x, rows, seed, options)
            for prior in pools:
                losses = contrastive_losses(self._model, priors[prior], x, rows, seed)
                found |= {f"{prior}/nce-loss/k{k:02d}": loss for k, loss in enumerate(losses)}
            terms = divergences(self._model, x, rows, seed)
            return found | {f"{BASELINE}/kl/k{k:02d}": term for k, term in enumerate(terms)}

        digests = [at.prior_document(prior, k)["digest"] for prior in priors for k in range(at.vae.groups)]
        config = {"vae digest": at.vae_document["digest"], "prior digests": digests, "likelihood": plain(options)}
        methods = (PRIORS[at.experiment.priors[prior].method].__module__ for prior in priors)
        source = source_digest("metrics.likelihood", *methods)
        identity = Identity(at.name, seed, config | {"examples": len(examples)}, source)
        path = at.workspace.evaluation(at.name) / f"{name}-{len(examples)}-seed-{seed}.safetensors"
        return in_blocks(path, identity, len(examples), at.experiment.evaluate.batch, compute, self.report)

    @property
    def _limit(self) -> int:
        """How many test examples likelihoods are measured on."""
        limits = (self.examples, self.at.experiment.evaluate.examples, len(self.at.dataset.examples("test")))
        return min(one for one in limits if one is not None)

    def base(self) -> tuple[dict[str, Tensor], LikelihoodOptions]:
        """The model's own prior, in full, and how it was measured: the same for every seed that shares the VAE."""
        alone = {"gains": None, "normaliser": [1], "proposals": [1]}
        options = self.at.experiment.evaluate.likelihood.model_copy(update=alone)
        priors = {BASELINE: self.at.prior(BASELINE, self._model)}
        return self._measured("base", self.at.vae_seed, priors, {}, options, self._limit), options

    def _likelihoods(self) -> Iterator[Row]:
        at, options, limit = self.at, self.at.experiment.evaluate.likelihood, self._limit
        priors = {name: at.prior(name, self._model) for name in at.experiment.priors}
        if options.gains is not None:
            found, alone = self.base()
            yield from self._likelihood_rows(found, {}, alone)
            limit = min(limit, options.gains.examples)
            options = options.model_copy(update={"samples": options.gains.samples})
        pools = {
            name: fill_pool(self._model, prior, at.seed, options.pool, self.report)
            for name, prior in priors.items()
            if not prior.exact
        }
        found = self._measured("likelihood", at.seed, priors, pools, options, limit)
        for row in self._likelihood_rows(found, pools, options):
            if row.prior != BASELINE or options.gains is None:
                yield row

    def _likelihood_rows(
        self, found: dict[str, Tensor], pools: dict[str, Pool], options: LikelihoodOptions
    ) -> Iterator[Row]:
        how = f"{options.samples} importance samples"
        samplers = sir_of_size(self.at.experiment)
        for key, values in found.items():
            prior, _, what = key.partition("/")
            if prior == "seconds":
                continue
            kind, _, detail = what.partition("/")
            value, stderr, n = mean_and_error(values)
            if kind in ("nce-loss", "kl", "elbo-gain"):
                shared = pools[prior].error(max(options.proposals)) if what == "elbo-gain/k00" else 0.0
                yield self._row(prior, what, value, math.hypot(stderr, shared), n)
                continue
            if kind == "log-z":
                group, _, count = detail.partition("/")
                for suffix in _suffixes(int(count), options):
                    yield self._row(prior, f"log-z/{group}{suffix}", value, stderr, n)
                continue
            gain, gain_error, _ = mean_and_error(values.double() - found[BASELINE].double())
            if kind == "":
                yield self._row(prior, "loglik", value, stderr, n, features=how)
                if prior != BASELINE:
                    yield self._row(prior, "loglik-gain", gain, gain_error, n, features=how)
                continue
            # The pool of base samples is shared by all examples, so its error does not average out over them.
            shared = pools[prior].error(int(detail))
            total, gain_total = (math.hypot(error, shared) for error in (stderr, gain_error))
            sampler = samplers.get(int(detail), f"sir-{detail}") if kind == "sampler" else ""
            for suffix in _suffixes(int(detail), options) if kind == "plugin" else [""]:
                yield self._row(prior, f"loglik-{kind}{suffix}", value, total, n, sampler=sampler, features=how)
                yield self._row(prior, f"loglik-gain-{kind}{suffix}", gain, gain_total, n, sampler=sampler, features=how)

    @cached_property
    def _posterior_pass(self) -> tuple[list[Tensor], Tensor]:
        """z_k ~ q(z_k) for test examples, group by group, and what they decode to (as samples are decoded)."""
        at, device = self.at, hardware.device()
        x = spread(at.dataset.examples("test"), at.experiment.sample.images).to(device)
        rows, codes = range(len(x)), []
        with torch.no_grad():
            context = posterior_pass(
                at.vae,
                x,
                lambda k: Noise(at.seed, "aggregate", k, rows=rows, device=device),
                lambda k, context, posterior, z: codes.append(z.cpu()),  # noqa: ARG005
            )
            decoded = at.vae.decode(context)
            noise = Noise(at.seed, "aggregate-decoder", rows=rows, device=device)
            images = decoded.mean if at.experiment.sample.decoding == "mean" else decoded.draw(noise)
        return codes, images.cpu()

    def _samples(self, prior: str, sampler: str) -> Iterator[Row]:
        at = self.at
        drawn = at.samples(prior, sampler)
        by = SAMPLERS[at.experiment.samplers[sampler].method](at.experiment.samplers[sampler])
        n, seconds = len(drawn["x"]), drawn["seconds"]

        def row(metric: str, value: float, stderr: float, **more: Any) -> Row:
            return self._row(prior, metric, value, stderr, n, sampler=sampler, seconds=seconds.sum().item(), **more)

        yield row("seconds-per-image", *mean_and_error(seconds)[:2])
        proposals = torch.stack([drawn[f"proposals/k{k:02d}"] for k in range(at.vae.groups)]).sum(0)
        yield row("proposals-per-image", *mean_and_error(proposals)[:2])
        for group, share in under_floor(drawn).items():
            yield row(f"ess-floor-share/{group}", share, (share * (1 - share) / n) ** 0.5)
        for k in range(at.vae.groups):
            yield row(f"ess-fraction/k{k:02d}", *mean_and_error(drawn[f"ess/k{k:02d}"])[:2])
            if by.accepts:
                yield row(f"acceptance/k{k:02d}", *mean_and_error(drawn[f"acceptance/k{k:02d}"])[:2])
            distance = mmd.mmd(self._posterior_pass[0][k], drawn[f"z/k{k:02d}"])
            yield row(f"mmd2/k{k:02d}", distance.value, distance.stderr, features=_bandwidths(distance.bandwidths))
        for quality in self._quality(prior, drawn["x"]):
            yield replace(quality, sampler=sampler)

    def _quality(self, prior: str, x: Tensor) -> Iterator[Row]:
        """How good decoded samples are: off the modes where the modes are known, FID and KID where there is a network."""
        at = self.at
        if truth := spec(at.experiment.dataset).truth:
            share, stderr = modes.off_mode_share(x, truth.means, truth.sigma)
            yield self._row(prior, "off-mode-share", share, stderr, len(x))
            yield self._row(prior, "modes-hit", modes.modes_hit(x, truth.means, truth.sigma), 0.0, len(x))
        if at.experiment.evaluate.features is not None:
            network, reference = self._network, self._reference
            settings = at.experiment.sample
            cold = f"; temperature {settings.temperature:g}" if settings.temperature != 1 else ""
            name = f"{network.name}@{network.digest[:8]}; {settings.decoding} decoding{cold}"
            ours = network(x)
            for metric, measure in (("fid", frechet.fid), ("kid", kid.kid)):
                value, stderr = measure(ours, reference, at.seed)
                yield self._row(prior, f"{metric}-{network.name}-{len(x)}", value, stderr, len(x), features=name)

    def _yardsticks(self) -> Iterator[Row]:
        """What the numbers are to be read against: the data's own, and the aggregate posterior's."""
        at = self.at
        yield from self._quality(AGGREGATE, self._posterior_pass[1])
        if truth := spec(at.experiment.dataset).truth:
            density = truth.log_density(spread(at.dataset.examples("test"), self._limit).double())
            yield self._row(DATA, "loglik", *mean_and_error(density))
            yield from self._quality(DATA, at.dataset.examples("test"))
        if at.experiment.evaluate.features is not None:
            yield from self._quality(DATA, at.dataset.images("test"))

    @cached_property
    def _network(self) -> features.FeatureNetwork:
        return load_features(self.at, self.report)

    @cached_property
    def _reference(self) -> Tensor:
        return self._network(self.at.dataset.images("train"))


def sir_of_size(experiment: Experiment) -> dict[int, str]:
    """Names of the SIR samplers that always draw M proposals, by M."""
    return {
        options.proposals: name
        for name, options in experiment.samplers.items()
        if options.method == "sir" and options.until_ess is None
    }


def spread(examples: Tensor, count: int) -> Tensor:
    """``count`` examples, or all if there are fewer, evenly spread over the set (n, *shape).

    Not the first ones: a set need not be in random order (the second half of MNIST's test set is of other writers).
    """
    count = min(count, len(examples))
    return examples[torch.arange(count) * len(examples) // count]


def _suffixes(count: int, options: LikelihoodOptions) -> list[str]:
    """Of the metrics that are read off at several N: the largest stands under the plain name too."""
    return [f"/N{count}", ""] if count == max(options.normaliser) else [f"/N{count}"]


def _bandwidths(values: list[float]) -> str:
    return "rbf " + " ".join(f"{value:.4g}" for value in values)


def _features_identity(at: Seeded) -> Identity:
    return Identity(at.name, 0, {"dataset digest": at.dataset.digest}, source_digest("metrics.features"))


def load_features(at: Seeded, report: Report) -> features.FeatureNetwork:
    """The experiment's feature network; the small classifier is trained, or found trained, on the training images."""
    name, data = at.experiment.evaluate.features, at.dataset
    if name in features.INCEPTIONS:
        return features.INCEPTIONS[name]()
    path = at.workspace.evaluation(at.name) / "features.safetensors"
    training, held_out = (features.Labelled(data.images(split), data.labels(split)) for split in ("train", "validation"))
    return features.OwnClassifier(data.name, training, held_out, path, _features_identity(at), report)


def features_task(report: Report, at: Seeded) -> None:
    """Make the feature network once, before the seeds share it."""
    with exclusive(at.workspace.locks, f"{at.name}/features"):
        load_features(at, report)


def base_task(report: Report, at: Seeded, examples: int | None) -> None:
    """Measure the base alone, before the seeds that share it read it."""
    with exclusive(at.workspace.locks, f"{at.name}/base-{at.vae_seed}"):
        Evaluation(at, report, examples).base()


def evaluation_task(report: Report, at: Seeded, examples: int | None) -> list[Row]:
    """All measurements of one seed; see :class:`Evaluation`."""
    with exclusive(at.workspace.locks, f"{at.name}/evaluation/seed-{at.seed}"):
        return list(Evaluation(at, report, examples).rows())

"""Everything that is measured of one seed of one experiment, as rows of the results table."""

import glob
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from datasets.registry import spec
from metrics import frechet, kid, mmd, modes
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
from models.protocol import HierarchicalVAE
from pipelines.aggregate import aggregate_posterior, chosen_examples
from pipelines.config import plain
from pipelines.fanout import Task
from pipelines.features import Features
from pipelines.fingerprints import fingerprint
from pipelines.identities import chain_modules, choice
from pipelines.recipe import Recipe
from pipelines.results import AGGREGATE, BASELINE, DATA, Row
from pipelines.samples import Samples, chain_states, row_parts
from pipelines.stored import Stored
from pipelines.work import opened
from priors.protocol import Prior
from priors.registry import SAMPLERS
from runtime import checkpoints, hardware
from runtime.blocks import in_blocks, join, mean_and_error_over_blocks, partial_path
from runtime.errors import UserError
from runtime.files import exclusive
from runtime.identity import Identity, revision, source_digest
from runtime.progress import Report, silent

CURVE_POINTS = 25

PARTS = 16
"""Into which the test examples of a seed are parted, for workers to share; it changes no number."""


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one seed."""

    stored: Stored
    report: Report
    examples: int | None = None  # for a quick look: this many test examples, for the likelihoods

    @cached_property
    def _model(self) -> HierarchicalVAE:
        """What likelihoods are computed by."""
        return folded(self.stored.vae)

    def rows(self) -> Iterator[Row]:
        """All of them. Raises UserError for samples or likelihoods that are not finite, of what and how many."""
        recipe = self.stored.recipe
        for prior, sampler in recipe.draws():  # likelihoods take long: better to miss samples before them than after
            self.stored.samples(prior, sampler).require_finite(f"{recipe.name}: {prior} by {sampler}, seed {recipe.seed}")
        yield from self._training()
        yield from self._likelihoods()
        for prior, options in self.stored.recipe.experiment.priors.items():
            for sampler in options.samplers:
                yield from self._samples(prior, sampler)
        yield from self._yardsticks()

    def _row(self, prior: str, metric: str, value: float, stderr: float, n: int, **more: Any) -> Row:
        stored, sampler = self.stored, more.get("sampler", "")
        made_by = fingerprint(stored.recipe.experiment, prior, sampler, metric, stored.sources(prior, sampler))
        assert made_by is not None
        common: dict[str, Any] = {
            "experiment": stored.recipe.name,
            "dataset": stored.recipe.experiment.dataset,
            "model": f"{stored.recipe.experiment.model.name}/{stored.recipe.experiment.model.likelihood}"
            + (" (imported)" if "imported" in stored.vae_document else ""),
            "sampler": "",
            "samples": 0,
            "normaliser": 0,
            "proposals": 0,
            "step": 0,
            "seed": stored.recipe.seed,
            "vae_seed": stored.recipe.vae_seed,
            "seconds": 0.0,
            "device": hardware.device_name(),
            "precision": "fp32",
            "features": "",
            "target": "",
            "revision": revision(),
            "fingerprint": made_by,
        }
        return Row(prior=prior, metric=metric, value=value, stderr=stderr, n=n, **(common | more))

    def _training(self) -> Iterator[Row]:
        stored = self.stored
        made_on = _made_on(stored.vae_document)
        if "imported" not in stored.vae_document:
            yield self._row(
                BASELINE, "train-seconds", stored.vae_document["seconds"], 0.0, stored.vae_document["step"], **made_on
            )
        priors = stored.recipe.experiment.priors
        # The base's row is its VAE's, also where the base was fitted to codes afterwards: in seconds.
        for name in (name for name, options in priors.items() if options.method != "normal" and name != BASELINE):
            documents = [stored.prior_document(name, k) for k in range(stored.vae.groups)]
            made_on = _made_on(*documents)
            seconds, steps = (sum(document[key] for document in documents) for key in ("seconds", "step"))
            yield self._row(name, "train-seconds", seconds, 0.0, steps // len(documents), **made_on)
            for k in range(stored.vae.groups):
                yield from self._training_of_group(name, k, made_on)

    def _training_of_group(self, name: str, k: int, made_on: dict[str, str]) -> Iterator[Row]:
        """The curve of a group's held-out criterion, and whether training ended since it had stopped improving.

        A prior without parameters of its own is as well trained as what it is put on.
        """
        documents = [self.stored.prior_document(below, k) for below in self.stored.recipe.experiment.chain(name)]
        checks = getattr(self.stored.recipe.experiment.priors[name], "checks", 1)
        for step, loss, _ in _thinned(documents[0].get("held_out", []), checks):
            yield self._row(name, f"held-out/k{k:02d}", loss, 0.0, 1, step=int(step), **made_on)
        trained = [document for document in documents if document.get("held_out")]
        if trained:
            plateaued = all(document.get("ended") == "plateau" for document in trained)
            yield self._row(name, f"plateaued/k{k:02d}", float(plateaued), 0.0, 1, **made_on)
            kept = float(trained[0].get("kept") or trained[0]["step"])
            yield self._row(name, f"kept-step/k{k:02d}", kept, 0.0, 1, **made_on)

    @property
    def _limit(self) -> int:
        """How many test examples likelihoods are measured on."""
        limits = (self.examples, self.stored.recipe.experiment.evaluate.examples, self.stored.dataset.size("test"))
        return min(limit for limit in limits if limit is not None)

    def _likelihoods(self) -> Iterator[Row]:
        if self.stored.recipe.experiment.evaluate.likelihood is None:
            return
        stored = self.stored
        found = self._measured()
        pools = {name: self.pool(name) for name in self._corrected}
        for key, values in found.items():
            prior, _, what = key.partition("/")
            broken = int((~values.isfinite()).sum())
            if broken and not what.startswith(("nce-loss", "log-z")):
                self._refuse(prior, f"the log-likelihoods {what!r} of test examples", broken, len(values))
        truth = spec(stored.recipe.experiment.dataset).truth
        density = None if truth is None else truth.log_density(self._examples().double())
        for key, values in found.items():
            yield from self._likelihood_rows(key, values, found, pools, density)

    def _refuse(self, prior: str, what: str, broken: int, count: int) -> NoReturn:
        """Raises UserError for numbers that are not finite, of which a mean would say nothing."""
        recipe = self.stored.recipe
        raise UserError(
            f"{recipe.name}: {prior}, seed {recipe.seed}: {what}: {broken} of {count} are not finite; the prior's training "
            "diverged: lower its learning rate in params.yaml"
        )

    def _examples(self, rows: slice = slice(None)) -> Tensor:
        """The test examples that likelihoods are measured on, or some of them."""
        dataset = self.stored.dataset
        return dataset.examples("test", chosen_examples(dataset, self._limit, self._limit)[rows])

    @cached_property
    def _priors(self) -> dict[str, Prior]:
        return {name: self.stored.prior(name, self._model) for name in self.stored.recipe.experiment.priors}

    @property
    def _corrected(self) -> list[str]:
        """The priors that need a normaliser."""
        return [name for name, prior in self._priors.items() if not prior.exact]

    def pool(self, name: str) -> Pool:
        """Base samples of the first group under a prior, kept on disk. Raises UserError if a weight is not finite."""
        stored, recipe, size = self.stored, self.stored.recipe, self._likelihood.pool
        config = {
            "vae digest": stored.vae_document["digest"],
            "prior digests": stored.identities.chain_digests(name, stored.groups),
            "pool": size,
        }
        source = source_digest("metrics.likelihood", *sorted(set(chain_modules(recipe.experiment, name))))
        identity = Identity(recipe.name, recipe.seed, config, source)
        path = recipe.workspace.evaluation(recipe.name) / f"pool-{name}-seed-{recipe.seed}.safetensors"
        found = checkpoints.load_current(path, identity)
        if found is not None:
            return Pool(found[0]["log_r"].to(hardware.device()))
        pool = fill_pool(self._model, self._priors[name], recipe.seed, size, self.report)
        broken = int((pool.log_r.isnan() | pool.log_r.isposinf()).sum())  # a weight of 0 is one
        if broken:
            self._refuse(name, "the weights of base samples in the first group", broken, len(pool.log_r))
        checkpoints.save(path, {"log_r": pool.log_r.cpu()}, identity, rows=size)
        return pool

    def _measured(self) -> dict[str, Tensor]:
        """Per-example numbers of all priors on the same test examples (:func:`spread`), each prior's kept on disk.

        They are log-likelihoods, NCE losses of the priors that have a normaliser, and the model's KL terms. What is missing
        is measured in one go: the priors share the posterior samples, and a prior that is added costs itself alone.
        """
        self._deal_out()
        for names in self._missing():
            parts = [self._part(names, part) for part in self.stretches()]
            if any(path.exists() for path, *_ in parts):  # several workers had begun
                for path, identity, rows in parts:
                    self._in_blocks(path, identity, rows, names)
            join(self._joint, self._identity(names), {path: identity for path, identity, _ in parts}, self._batch)
            self._in_blocks(self._joint, self._identity(names), range(self._limit), names)
            self._deal_out()
        for left_over in self._parts():  # of other settings
            left_over.unlink(missing_ok=True)
        found: dict[str, Tensor] = {}
        for name in self._priors:
            path = self._path(name)
            found |= checkpoints.load_verified(
                path, self._identity([name]), f"priorhole evaluate {self.stored.recipe.name}"
            )[0]
        return found

    def measure(self, part: tuple[int, int]) -> None:
        """One of the :meth:`stretches` of what is missing, to a file of its own."""
        for names in [] if self._joint.exists() else self._missing():
            path, identity, rows = self._part(names, part)
            self._in_blocks(path, identity, rows, names)

    def _missing(self) -> list[list[str]]:
        """The priors whose numbers are not there, by what is measured in one go.

        A run that was stopped has begun some of them together, and goes on with those; what was added since is another go.
        """
        names = self._priors
        left = [name for name in names if checkpoints.load_current(self._path(name), self._identity([name])) is None]
        found = []
        for path in (partial_path(self._joint), *self._parts()):
            begun = self._measured_in(path)
            if begun and set(begun) <= set(left):
                found.append(begun)
                left = [name for name in left if name not in begun]
        return [*found, left] if left else found

    def _parts(self) -> list[Path]:
        """Files of some examples, finished and unfinished, of whatever settings."""
        return sorted(self._joint.parent.glob(f"{glob.escape(self._stem())}.*rows-*.safetensors"))

    def _measured_in(self, path: Path) -> list[str]:
        """The priors whose numbers, of today's settings and code, a file has of some examples."""
        with suppress(UserError):  # it is absent, or broken
            document = checkpoints.load_document(path, "")
            names = [name for name in self._priors if name in document["config"].get("prior digests", {})]
            identity = self._identity(names)
            config = {key: value for key, value in document["config"].items() if key != "rows"}
            if document["source"] == identity.source and identity.difference(config) is None:
                return names
        return []

    def _in_blocks(self, path: Path, identity: Identity, examples: range, names: Sequence[str]) -> None:
        """The numbers of some priors on some examples, to a file that is kept block by block."""
        recipe, priors = self.stored.recipe, {name: self._priors[name] for name in names}
        pools = {name: self.pool(name) for name in names if not priors[name].exact}

        def compute(rows: range) -> dict[str, Tensor]:
            rows = examples[rows.start : rows.stop]
            x = self._examples(slice(rows.start, rows.stop)).to(hardware.device())
            found = log_likelihoods(self._model, priors, pools, x, rows, recipe.seed, self._likelihood)
            for prior in pools:
                losses = contrastive_losses(self._model, priors[prior], x, rows, recipe.seed)
                found |= {f"{prior}/nce-loss/k{k:02d}": loss for k, loss in enumerate(losses)}
            if BASELINE in priors:
                terms = divergences(self._model, x, rows, recipe.seed)
                found |= {f"{BASELINE}/kl/k{k:02d}": term for k, term in enumerate(terms)}
            return found

        in_blocks(path, identity, len(examples), self._batch, compute, self.report)

    def _deal_out(self) -> None:
        """Where numbers of several priors lie in one file, give each prior its own.

        A run that is killed while it does so finds that file again, whatever of its own files a prior has by then.
        """
        if not self._joint.exists():
            return
        with suppress(UserError):  # of a file that is broken, and measured anew
            made = checkpoints.load(self._joint, f"priorhole evaluate {self.stored.recipe.name}")[1]
            names = [name for name in self._priors if name in made["config"].get("prior digests", {})]
            found = checkpoints.load_current(self._joint, self._identity(names))
            values = {} if found is None else found[0]
            for name in names if values else ():
                own = {key: value for key, value in values.items() if key.startswith(f"{name}/")}
                checkpoints.save(self._path(name), own, self._identity([name]), rows=self._limit)
        self._joint.unlink()

    @property
    def _joint(self) -> Path:
        """What is measured in one go, before each prior has its own."""
        return self.stored.recipe.workspace.evaluation(self.stored.recipe.name) / f"{self._stem()}.safetensors"

    def _stem(self, prior: str = "") -> str:
        return f"likelihood-{self._limit}{f'-{prior}' * bool(prior)}-seed-{self.stored.recipe.seed}"

    def _path(self, prior: str) -> Path:
        return self._joint.with_name(f"{self._stem(prior)}.safetensors")

    def _part(self, names: Sequence[str], part: tuple[int, int]) -> tuple[Path, Identity, range]:
        """Where the numbers of some priors on some examples are kept, and from what they are made."""
        start, stop = part
        identity = self._identity(names)
        identity = replace(identity, config=identity.config | {"rows": [start, stop]})
        name = f"{self._stem()}.{names[0]}.rows-{start:08d}-{stop:08d}.safetensors"  # no prior is in two goes
        return self._joint.with_name(name), identity, range(start, stop)

    def _identity(self, names: Sequence[str]) -> Identity:
        """From what the numbers of some priors are made."""
        stored, recipe = self.stored, self.stored.recipe
        config = {
            "vae digest": stored.vae_document["digest"],
            "dataset digest": stored.dataset.digest,
            "prior digests": {name: stored.identities.chain_digests(name, stored.groups) for name in names},
            "likelihood": plain(self._likelihood),
            "examples": self._limit,
        } | choice(recipe.experiment.dataset)
        modules = {module for name in names for module in chain_modules(recipe.experiment, name)}
        return Identity(recipe.name, recipe.seed, config, source_digest("metrics.likelihood", *sorted(modules)))

    @property
    def _batch(self) -> int:
        return self.stored.recipe.experiment.evaluate.batch

    def stretches(self) -> list[tuple[int, int]]:
        """The examples in PARTS parts, at most, of whole batches: what is measured side by side."""
        blocks = -(-self._limit // self._batch)
        return row_parts(self._limit, -(-blocks // PARTS) * self._batch)

    @property
    def _likelihood(self) -> LikelihoodOptions:
        options = self.stored.recipe.experiment.evaluate.likelihood
        assert options is not None
        return options

    def _likelihood_rows(
        self, key: str, values: Tensor, found: dict[str, Tensor], pools: dict[str, Pool], density: Tensor | None
    ) -> Iterator[Row]:
        """The rows of one of the measured numbers; ``density`` is the truth's log density of the same examples.

        Curves over S are of the largest N and M, those over N and M of the largest S.
        """
        options = self._likelihood
        prior, _, what = key.partition("/")
        kind, *details = what.split("/")
        value, stderr, n = mean_and_error(values)
        if kind in ("nce-loss", "kl", "elbo-gain"):
            shared = pools[prior].error(max(options.proposals)) if what == "elbo-gain/k00" else 0.0
            counts = {"proposals": max(options.proposals)} if kind == "elbo-gain" else {}
            yield self._row(prior, what, value, math.hypot(stderr, shared), n, **counts)
        elif kind == "log-z":
            shared = pools[prior].error(int(details[1])) if details[0] == "k00" else 0.0
            yield self._row(prior, f"log-z/{details[0]}", value, math.hypot(stderr, shared), n, normaliser=int(details[1]))
        else:
            count, size = (int(details[0]), int(details[1])) if details else (0, int(kind))
            suffix = "" if kind.isdigit() else f"-{kind}"
            counts = {{"plugin": "normaliser", "sampler": "proposals"}[kind]: count} if suffix else {}
            most = {"plugin": max(options.normaliser), "sampler": max(options.proposals)}.get(kind, count)
            if count != most and size != max(options.samples):
                return
            # The pool of base samples is shared by all examples, so its error does not average out over them.
            shared = self._pool_error(pools[prior], count, size) if count else 0.0
            how: dict[str, Any] = {"samples": size, "features": self._normalised_on(kind, size)} | counts
            yield self._row(prior, f"loglik{suffix}", value, math.hypot(stderr, shared), n, **how)
            if prior != BASELINE:
                gain, error, _ = mean_and_error(values.double() - found[f"{BASELINE}/{size}"].double())
                yield self._row(prior, f"loglik-gain{suffix}", gain, math.hypot(error, shared), n, **how)
            if density is not None and kind != "plugin":
                gap, error, _ = mean_and_error(density - values.double())
                yield self._row(prior, f"truth-gap{suffix}", gap, math.hypot(error, shared), n, **how)

    def _pool_error(self, pool: Pool, count: int, samples: int) -> float:
        """Standard error, nats, of a first group's normalisers, by the blocks of ``count`` read of its pool.

        Where all samples share their context, the s-th of example i reads block i·S + s, round the pool, with S the
        most samples an example has. So the first few of each example may read few blocks.
        """
        blocks = read = len(pool.log_r) // count
        if self.stored.vae.groups == 1 and samples < blocks:
            first = torch.arange(self._limit)[:, None] * max(self._likelihood.samples)
            read = len(((first + torch.arange(samples)) % blocks).unique())
        return pool.error(count) * math.sqrt(blocks / read)

    def _normalised_on(self, kind: str, size: int) -> str:
        """For how many of S samples a corrected prior's normalisers were estimated, where it is not all of them."""
        resamples = self._likelihood.resamples
        few = kind in ("plugin", "sampler") and self.stored.vae.groups > 1 and size > resamples
        return f"normalisers of {resamples} resampled" if few else ""

    def _samples(self, prior: str, sampler: str) -> Iterator[Row]:
        stored = self.stored
        drawn, groups = stored.samples(prior, sampler), range(stored.vae.groups)
        options = stored.recipe.experiment.samplers[sampler]
        n, seconds = drawn.total, drawn.diagnostic("seconds")
        method = SAMPLERS[options.method]
        common = {
            "sampler": sampler,
            # M names the distribution that SIR draws from, which steps after it leave.
            "proposals": getattr(options, "proposals", 0) if method.weighs else 0,
            "seconds": seconds.sum().item(),
            **_made_on(*(file.document for file in drawn.files)),
        }

        def row(metric: str, value: float, stderr: float, **more: Any) -> Row:
            return self._row(prior, metric, value, stderr, n, **common, **more)

        yield row("seconds-per-image", *mean_and_error_over_blocks(seconds, drawn.diagnostic("block"))[:2])
        proposals = torch.stack([drawn.diagnostic(f"proposals/k{k:02d}") for k in groups]).sum(0)
        yield row("proposals-per-image", *mean_and_error(proposals)[:2])
        for group, share in drawn.under_floor(stored.vae.groups, chain_states(options)).items():
            yield row(f"ess-floor-share/{group}", share, (share * (1 - share) / n) ** 0.5)
        for k in groups:
            yield row(f"ess-fraction/k{k:02d}", *mean_and_error(drawn.diagnostic(f"ess/k{k:02d}"))[:2])
            if method(options).accepts:
                yield row(f"acceptance/k{k:02d}", *mean_and_error(drawn.diagnostic(f"acceptance/k{k:02d}"))[:2])
            latents = drawn.latents(k)
            distance = mmd.mmd(self._aggregate.latents(k), latents)
            about = {"features": _bandwidths(distance.bandwidths)}
            rows = min(len(latents), len(self._aggregate.latents(k)), mmd.ROWS)
            yield self._row(prior, f"mmd2/k{k:02d}", distance.value, distance.stderr, rows, **common, **about)
        yield from self._quality_of(prior, drawn, f"{prior}+{sampler}", **common)

    @cached_property
    def _aggregate(self) -> Samples:
        """The aggregate posterior: z_k ~ q(z_k) for test examples, and what they decode to, as samples are decoded."""
        return aggregate_posterior(self.stored, self.report)

    def _quality_of(self, prior: str, drawn: Samples, name: str, **common: Any) -> Iterator[Row]:
        """Of samples, of which images are seen through their features, and points as they are."""
        if spec(self.stored.recipe.experiment.dataset).truth:
            yield from self._off_modes(prior, torch.cat(list(drawn.parts())), **common)
        for network in self._features:
            yield from self._distances(prior, network, network.of_samples(drawn, name), **common)

    def _off_modes(self, prior: str, points: Tensor, **common: Any) -> Iterator[Row]:
        """How many of a prior's points (n, d) lie off the modes, where these are known; ``common``: columns of the rows."""
        truth = spec(self.stored.recipe.experiment.dataset).truth
        assert truth is not None
        share, stderr = modes.off_mode_share(points, truth.means, truth.sigma)
        yield self._row(prior, "off-mode-share", share, stderr, len(points), **common)
        yield self._row(prior, "modes-hit", modes.modes_hit(points, truth.means, truth.sigma), 0.0, len(points), **common)

    def _distances(self, prior: str, features: Features, seen: Tensor, **common: Any) -> Iterator[Row]:
        """FID and KID of a prior's samples by their features (n, d) in one network; ``common``: columns of the rows."""
        network, experiment, n = features.network, self.stored.recipe.experiment, len(seen)
        settings, options, source = experiment.sample, experiment.evaluate, self.stored.dataset.provenance.get("source")
        default = options.reference == "train" and options.reference_images is None
        said = [
            f"{network.name}@{network.digest[:8]}",
            f"{settings.decoding} decoding",
            f"temperature {settings.temperature:g}" if settings.temperature != 1 else "",
            "8-bit pixels" if settings.pixels == "uint8" else "",
            "" if default else f"against {len(features.reference)} {options.reference} images",
            f"from {source}" if source else "",
        ]
        for metric, measure in (("fid", frechet.fid), ("kid", kid.kid)):
            value, stderr = measure(seen, features.reference, self.stored.recipe.seed)
            how = "; ".join(filter(None, said))
            yield self._row(prior, f"{metric}-{network.name}-{n}", value, stderr, n, features=how, **common)

    def _yardsticks(self) -> Iterator[Row]:
        """What the numbers are to be read against: the data's own, and the aggregate posterior's."""
        stored = self.stored
        yield from self._quality_of(AGGREGATE, self._aggregate, AGGREGATE)
        if truth := spec(stored.recipe.experiment.dataset).truth:
            yield self._row(DATA, "loglik", *mean_and_error(truth.log_density(self._examples().double())))
            yield from self._off_modes(DATA, stored.dataset.examples("test"))
        for network in self._features:
            yield from self._distances(DATA, network, network.of_data(_other_images(stored.recipe)))

    @cached_property
    def _features(self) -> list[Features]:
        return _networks(self.stored, self.report)


def _thinned(curve: Sequence[Sequence[float]], checks: int) -> Sequence[Sequence[float]]:
    """At most CURVE_POINTS of a curve of up to ``checks`` points, at the same steps however early a training ended."""
    every = -(-checks // CURVE_POINTS)
    return curve[every - 1 :: every] or curve[-1:]


def _made_on(*documents: dict[str, Any]) -> dict[str, str]:
    """The precision and the devices that stored files were made in and on; a device is unknown of what does not say."""
    found = {key: {document.get(key, "") for document in documents} - {""} for key in ("precision", "device")}
    return {key: "+".join(sorted(values)) for key, values in found.items()}


def _bandwidths(values: list[float]) -> str:
    return "rbf " + " ".join(f"{value:.4g}" for value in values)


def _other_images(recipe: Recipe) -> str:
    """The split that is held against the reference as samples are: what real images reach."""
    return "validation" if recipe.experiment.evaluate.reference == "test" else "test"


def _networks(stored: Stored, report: Report) -> list[Features]:
    return [Features(stored, name, report) for name in stored.recipe.experiment.evaluate.networks]


def features_task(report: Report, recipe: Recipe) -> None:
    """Make the feature networks, and features of the data set's own images, once, before the seeds share them."""
    for found in _networks(Stored(recipe), report):
        _ = found.reference
        found.of_data(_other_images(recipe))


def pool_task(report: Report, recipe: Recipe, prior: str) -> None:
    """The base samples of a prior's first group, which all examples share."""
    with exclusive(recipe.workspace.locks, f"{recipe.name}/evaluation/pool-{prior}/seed-{recipe.seed}", wait=True):
        Evaluation(opened(recipe), report).pool(prior)


def likelihood_task(report: Report, recipe: Recipe, examples: int | None, part: tuple[int, int]) -> None:
    """The likelihoods of some examples; see :meth:`Evaluation.stretches`."""
    with exclusive(recipe.workspace.locks, f"{recipe.name}/evaluation/seed-{recipe.seed}/rows-{part[0]}"):
        Evaluation(opened(recipe), report, examples).measure(part)


def seen_task(report: Report, recipe: Recipe, prior: str, sampler: str, part: int) -> None:
    """The features of one file of samples, the ``part``-th."""
    stored = opened(recipe)
    drawn = stored.samples(prior, sampler)
    for network in _networks(stored, report):
        network.of_file(drawn, drawn.files[part], f"{prior}+{sampler}")


def aggregate_task(report: Report, recipe: Recipe) -> None:
    """The aggregate posterior's images, and their features."""
    with exclusive(recipe.workspace.locks, f"{recipe.name}/evaluation/aggregate/seed-{recipe.seed}"):
        stored = opened(recipe)
        drawn = aggregate_posterior(stored, report)
        for network in _networks(stored, report):
            network.of_samples(drawn, AGGREGATE)


def tasks(recipes: Sequence[Recipe], examples: int | None, shared: bool) -> list[Task]:
    """All of an evaluation: the seeds' own tasks come last, in the order of the seeds.

    Args:
        recipes: the seeds.
        examples: as :class:`Evaluation` has it.
        shared: whether several workers share a seed's work; if not, its own task does all of it.
    """
    made: list[Task] = []

    def add(title: str, function: Callable[..., Any], after: Sequence[int], **arguments: Any) -> int:
        made.append(Task(title, function, arguments, after))
        return len(made) - 1

    settings, before = recipes[0].experiment.evaluate, dict[int, list[int]]()
    network = [add("feature networks", features_task, (), recipe=recipes[0])] if settings.networks else []
    for recipe in recipes:
        seed, needed = f"seed {recipe.seed}", list(network)
        if shared and settings.likelihood is not None:
            methods = {
                name: {recipe.method(name, k) for k in range(Stored(recipe).groups)} for name in recipe.experiment.priors
            }
            corrected = [name for name, found in methods.items() if not all(method.exact for method in found)]
            pools = [add(f"proposals of {name}, {seed}", pool_task, (), recipe=recipe, prior=name) for name in corrected]
            needed += [
                add(f"likelihoods, {seed}, examples {part[0]} to {part[1] - 1}", likelihood_task, pools,
                    recipe=recipe, examples=examples, part=part)
                for part in Evaluation(Stored(recipe), silent, examples).stretches()
            ]  # fmt: skip
        if shared:
            needed.append(add(f"aggregate posterior, {seed}", aggregate_task, network, recipe=recipe))
        for prior, sampler in recipe.draws() if shared else ():
            files = len(Stored(recipe).samples(prior, sampler).files)  # better to miss some now than after the likelihoods
            for part in range(files if settings.networks else 0):
                title = f"features of {prior} by {sampler}, {seed}, file {part}"
                needed.append(add(title, seen_task, network, recipe=recipe, prior=prior, sampler=sampler, part=part))
        before[recipe.seed] = needed
    for recipe in recipes:
        add(f"evaluation, seed {recipe.seed}", evaluation_task, before[recipe.seed], recipe=recipe, examples=examples)
    return made


def evaluation_task(report: Report, recipe: Recipe, examples: int | None) -> list[Row]:
    """All measurements of one seed; see :class:`Evaluation`."""
    with exclusive(recipe.workspace.locks, f"{recipe.name}/evaluation/seed-{recipe.seed}"):
        return list(Evaluation(opened(recipe), report, examples).rows())

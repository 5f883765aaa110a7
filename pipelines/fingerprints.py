"""What a row of the results table comes from: the digest of its configuration and of the code that made it.

A row carries both, down its whole chain: VAE, prior and what it is put on, sampler, measurement. Held against what
params.yaml and the code say now, they tell whether the row is still theirs.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from datasets.registry import spec
from metrics import features
from pipelines.config import Config, Experiment, plain
from pipelines.identities import chain_modules, choice, group_source, samples_source, vae_source
from pipelines.results import AGGREGATE, DATA
from priors.registry import PRIORS
from runtime.identity import source_digest

LIKELIHOODS = "loglik|truth-gap|kl/|elbo-gain/|nce-loss/|log-z/"

MEASURED_BY = {
    LIKELIHOODS: ("metrics.likelihood",),
    "mmd2/": ("metrics.mmd",),
    "fid-": ("metrics.frechet", "metrics.features"),
    "kid-": ("metrics.kid", "metrics.features"),
    "off-mode-share|modes-hit": ("metrics.modes",),
}
"""Metrics, by the beginnings of their names, and the modules that measure them; the others are read off files."""


def fingerprint(
    experiment: Experiment, prior: str, sampler: str, metric: str, stored: Mapping[str, str] | None = None
) -> str | None:
    """Two digests, ``configuration+code``, of a row of this experiment; None if it has no such prior or sampler.

    Args:
        experiment: as params.yaml says it is.
        prior, sampler, metric: as in the row.
        stored: digests of the code that made stored files, where it need not be today's: of ``vae``, ``prior NAME`` and
            ``samples``.
    """
    pseudo = prior in (AGGREGATE, DATA)
    if (not pseudo and prior not in experiment.priors) or (sampler and sampler not in experiment.samplers):
        return None
    chain = [] if pseudo else experiment.chain(prior)
    config: dict[str, Any] = {"dataset": experiment.dataset}
    sources: dict[str, str] = {}
    if prior != DATA:
        config |= {"model": plain(experiment.model), "train": plain(experiment.train), "vae_seed": experiment.vae_seed}
        if experiment.shown is not None:
            config["images"] = plain(experiment.shown)
        sources["vae"] = vae_source(experiment)
    for name in chain:
        config[f"prior {name}"] = plain(experiment.priors[name], "samplers")
        sources[f"prior {name}"] = group_source(experiment, PRIORS[experiment.priors[name].method])
    if sampler:
        config["sampler"] = plain(experiment.samplers[sampler])
        sources["samples"] = samples_source(experiment, prior, sampler)
    if sampler or prior == AGGREGATE:
        config["sample"] = drawing(experiment)
    measuring = next((found for names, found in MEASURED_BY.items() if re.match(names, metric)), ())
    if "metrics.likelihood" in measuring and experiment.evaluate.likelihood is not None:
        config |= {"likelihood": plain(experiment.evaluate.likelihood), "examples": experiment.evaluate.examples}
    if {"metrics.likelihood", "metrics.mmd"} & set(measuring) or prior == AGGREGATE:
        config |= choice(experiment.dataset)
    if features.__name__ in measuring:
        networks, own = experiment.evaluate.networks, experiment.dataset  # a classifier of its own is called after the data
        config["features"] = next((name for name in networks if f"-{own if name == 'own' else name}-" in metric), None)
        config |= plain(
            experiment.evaluate, "likelihood", "examples", "batch", "features"
        )  # what else says of the reference
    if measuring:
        modules = [] if pseudo else chain_modules(experiment, prior)
        sources["metric"] = source_digest(*measuring, *modules)
    sources |= {key: digest for key, digest in (stored or {}).items() if key in sources}
    return f"{_short(config)}+{_short(sources)}"


def drawing(experiment: Experiment) -> dict[str, Any]:
    """The settings of ``sample`` that a number or a picture can depend on.

    Floats are the numbers of the draw themselves: that they are kept says nothing, and the files' size neither.
    """
    floats = spec(experiment.dataset).kind == "points" or experiment.sample.pixels == "float32"
    return plain(experiment.sample, "rows_per_file", *(("pixels",) if floats else ()))


def expected(config: Config) -> Callable[[str, str, str, str], str | None]:
    """The fingerprint that a row of (experiment, prior, sampler, metric) would get today; None if there is no such thing."""

    def now(experiment: str, prior: str, sampler: str, metric: str) -> str | None:
        found = config.experiments.get(experiment)
        return None if found is None else fingerprint(found, prior, sampler, metric)

    return now


def _short(document: Any) -> str:
    return hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=6).hexdigest()

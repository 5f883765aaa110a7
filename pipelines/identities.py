"""What every file of one seed is made from: settings, the digests of what lies below it, code and precision."""

from collections.abc import Mapping
from typing import Any, Protocol

from datasets.registry import source_for, spec
from models.registry import MODELS
from pipelines.config import Experiment, plain
from pipelines.recipe import Recipe
from priors.protocol import GroupPrior
from priors.registry import PRIORS, SAMPLERS
from runtime import hardware
from runtime.identity import Identity, source_digest


class Documents(Protocol):
    """The metadata of what is stored. Each raises UserError where it is missing or of another configuration."""

    def dataset_digest(self) -> str:
        """Of the data set."""
        ...

    @property
    def vae_document(self) -> dict[str, Any]:
        """Of the trained VAE."""
        ...

    def prior_document(self, prior: str, k: int) -> dict[str, Any]:
        """Of one learned group."""
        ...


class Identities:
    """The identities of one seed's files.

    Args:
        recipe: the seed.
        documents: of the files that others are made from.
    """

    def __init__(self, recipe: Recipe, documents: Documents):
        self._recipe, self._documents = recipe, documents

    def vae(self) -> Identity:
        """Of the VAE."""
        recipe, experiment = self._recipe, self._recipe.experiment
        config = {
            "dataset": {"name": experiment.dataset, "digest": self._documents.dataset_digest()},
            "model": plain(experiment.model),
            "train": plain(experiment.train),
            "seed": recipe.vae_seed,
            **({} if experiment.shown is None else {"images": plain(experiment.shown)}),
        }
        return Identity(recipe.name, recipe.vae_seed, config, vae_source(experiment), _precision(experiment.train))

    def group(self, prior: str, k: int, stored: Mapping[str, Any] | None = None) -> Identity:
        """Of group k of a prior, made here or by whoever published it.

        Args:
            prior: the prior.
            k: the group.
            stored: of a file that was made elsewhere, its ``config``. It may have been learned on what lies here or on the
                originals of which small copies lie here: whichever of the two digests it names is the one expected.
        """
        recipe, options, method = self._recipe, self._recipe.experiment.priors[prior], self._recipe.method(prior, k)
        named = {stored.get("vae digest"), *stored.get("digests below", [])} if stored else set()

        def digest(document: dict[str, Any]) -> str:
            return document["original"] if document.get("original") in named else document["digest"]

        # All that lies below, since a prior without parameters of its own has the same digest whatever it follows.
        below = [digest(self._documents.prior_document(name, k)) for name in recipe.experiment.chain(prior)[1:]]
        config = {
            "vae digest": digest(self._documents.vae_document),
            "prior": {} if method is GroupPrior else plain(options, "groups", "samplers"),
            "group": k,
            "seed": recipe.seed,
            **({"digests below": below} if below else {}),
        }
        return Identity(recipe.name, recipe.seed, config, group_source(recipe.experiment, method), _precision(options))

    def chain_digests(self, prior: str, groups: int) -> list[str]:
        """Of everything trained that a prior's numbers come from, group by group, down its chain."""
        chain = self._recipe.experiment.chain(prior)
        return [self._documents.prior_document(name, k)["digest"] for name in chain for k in range(groups)]

    def samples(self, prior: str, sampler: str, groups: int) -> Identity:
        """Of a file of samples."""
        recipe, experiment = self._recipe, self._recipe.experiment
        options = experiment.samplers[sampler]
        config = {
            "vae digest": self._documents.vae_document["digest"],
            "prior digests": self.chain_digests(prior, groups),
            "sampler": plain(options),
            # Row i is the same however many there are, and in whatever files.
            "sample": plain(
                experiment.sample, "images", "rows_per_file", *(() if experiment.sample.readjust else ("batch",))
            ),
            "seed": recipe.seed,
        }
        source = samples_source(experiment, prior, sampler)
        return Identity(recipe.name, recipe.seed, config, source, _precision(options))


def choice(dataset: str) -> dict[str, str]:
    """How test examples are chosen where not all are taken, for the identity of what is measured on them; see
    :func:`pipelines.aggregate.chosen_examples`. Nothing where they are read at even distances.
    """
    return {"chosen": "at random"} if spec(dataset).kind == "images" else {}


def chain_modules(experiment: Experiment, prior: str) -> list[str]:
    """The modules that define the methods of a prior, of the prior that it is put on, and so on."""
    return [PRIORS[experiment.priors[name].method].__module__ for name in experiment.chain(prior)]


def vae_source(experiment: Experiment) -> str:
    """Digest of the code that trains a VAE."""
    return source_for(experiment.dataset, "models.trainer", MODELS[experiment.model.name].__module__)


def group_source(experiment: Experiment, method: type[GroupPrior]) -> str:
    """Digest of the code that learns a group of a prior."""
    return source_for(experiment.dataset, "priors.trainer", method.__module__)


def samples_source(experiment: Experiment, prior: str, sampler: str) -> str:
    """Digest of the code that draws samples."""
    drawing = SAMPLERS[experiment.samplers[sampler].method].__module__
    return source_digest("priors.sampling", *chain_modules(experiment, prior), drawing)


def _precision(options: Any) -> str:
    """What the settings' ``precision`` comes to on this machine; fp32 for what has no such setting."""
    return hardware.used(getattr(options, "precision", "fp32"), hardware.device().type)

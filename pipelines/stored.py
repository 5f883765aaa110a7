"""What is stored of one seed of one experiment, loaded when it is asked for and kept."""

import sys
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets import dataset as data
from datasets.registry import spec
from models import registry as models
from models.folding import folded
from models.protocol import HierarchicalVAE
from pipelines.identities import Identities
from pipelines.recipe import Recipe
from priors.protocol import GroupPrior, Prior
from runtime import checkpoints, hardware
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.randomness import initialising

Document = dict[str, Any]


class Stored:
    """The files of one seed; see :class:`Recipe`.

    Raises:
        UserError: from whatever loads a file that is missing, corrupt or of another configuration.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.identities = recipe, Identities(recipe, self)
        self._groups: dict[tuple[str, int], tuple[GroupPrior, Document]] = {}
        self._samples_documents: dict[tuple[str, str], Document] = {}

    @cached_property
    def dataset(self) -> data.Dataset:
        """The prepared data set."""
        return data.load(self.recipe.experiment.dataset, self.recipe.workspace.data(self.recipe.name))

    def dataset_digest(self) -> str:
        """Of the data set here; a published VAE can do without it, and is then taken at its word."""
        path = self._vae_path
        if self.recipe.workspace.data(self.recipe.name).exists() or self.recipe.is_own(path):
            return self.dataset.digest
        dataset = checkpoints.load(path, f"priorhole train-vae {self.recipe.name}")[1]["config"].get("dataset", {})
        return dataset.get("digest", "")

    def new_vae(self) -> HierarchicalVAE:
        """The VAE before training."""
        experiment = self.recipe.experiment
        with initialising(self.recipe.vae_seed, "vae"):
            return models.build(experiment.model.name, experiment.model, spec(experiment.dataset).shape)

    @property
    def _vae_path(self) -> Path:
        return self.recipe.trained_file(self.recipe.workspace.vae(self.recipe.name, self.recipe.vae_seed))

    @cached_property
    def _vae(self) -> tuple[HierarchicalVAE, Document]:
        path = self._vae_path
        tensors, document = self._verified(path, self.identities.vae(), "the VAE", "train-vae")
        model = self.new_vae()
        checkpoints.restore(model, tensors, path)
        return model.to(hardware.device()).eval().requires_grad_(False), document

    @property
    def vae(self) -> HierarchicalVAE:
        """The trained VAE, frozen, in eval mode."""
        return self._vae[0]

    @property
    def vae_document(self) -> Document:
        """The trained VAE's metadata."""
        return self._vae[1]

    def new_group(self, prior: str, k: int) -> GroupPrior:
        """One group of a prior before training, on the model's device."""
        options = self.recipe.experiment.priors[prior]
        with initialising(self.recipe.seed, f"prior {prior}", k):
            return self.recipe.method(prior, k)(options, self.vae.layout()[k]).to(hardware.device())

    def _group(self, prior: str, k: int) -> tuple[GroupPrior, Document]:
        if (prior, k) not in self._groups:
            recipe = self.recipe
            path = recipe.trained_file(recipe.workspace.prior(recipe.name, prior, recipe.seed, k))
            identity = self.identities.group(prior, k, published=not recipe.is_own(path))
            tensors, document = self._verified(path, identity, f"the prior {prior}", "train-prior")
            group = self.new_group(prior, k)
            checkpoints.restore(group, tensors, path)
            self._groups[prior, k] = folded(group.eval().requires_grad_(False)), document
        return self._groups[prior, k]

    def prior_document(self, prior: str, k: int) -> Document:
        """The metadata of one learned group."""
        return self._group(prior, k)[1]

    def base_of(self, prior: str) -> Prior:
        """The prior that a prior corrects."""
        base = self.recipe.experiment.priors[prior].base
        if base is not None:
            return self.prior(base)
        return Prior(self.vae, [GroupPrior(GroupPrior.Options(), group) for group in self.vae.layout()])

    def prior(self, prior: str, model: HierarchicalVAE | None = None) -> Prior:
        """A learned prior, all groups, over the VAE or a variant of it."""
        model = model or self.vae
        groups = [self._group(prior, k)[0] for k in range(model.groups)]
        base = self.recipe.experiment.priors[prior].base
        return Prior(model, groups, None if base is None else self.prior(base, model))

    def samples_identity(self, prior: str, sampler: str) -> Identity:
        """What a file of samples is made from."""
        return self.identities.samples(prior, sampler, self.vae.groups)

    def samples(self, prior: str, sampler: str) -> dict[str, Tensor]:
        """What was drawn: as ``priors.sampling.draw`` returns it, for all images."""
        recipe = self.recipe
        path = recipe.workspace.samples(recipe.name, prior, sampler, recipe.seed)
        identity = self.samples_identity(prior, sampler)
        tensors, document = self._verified(path, identity, f"what {sampler} drew from {prior}", "sample")
        if document.get("rows") != recipe.experiment.sample.images:
            raise UserError(f"{path} is unfinished; make it with: priorhole sample {recipe.name}")
        self._samples_documents[prior, sampler] = document
        return tensors

    def samples_document(self, prior: str, sampler: str) -> Document:
        """The metadata of what was drawn."""
        if (prior, sampler) not in self._samples_documents:
            self.samples(prior, sampler)
        return self._samples_documents[prior, sampler]

    def sources(self, prior: str, sampler: str) -> dict[str, str]:
        """Digests of the code that made the files behind a row, as ``fingerprints.fingerprint`` takes them."""
        experiment = self.recipe.experiment
        sources = {"vae": self.vae_document["source"]}
        if prior in experiment.priors:
            for name in experiment.chain(prior):
                # A group that the prior leaves alone is not made by its method, and says nothing of that one's code.
                learned = experiment.priors[name].groups or range(self.vae.groups)
                made_by = {self.prior_document(name, k)["source"] for k in learned}
                sources[f"prior {name}"] = "+".join(sorted(made_by))
        if sampler:
            sources["samples"] = self.samples_document(prior, sampler)["source"]
        return sources

    def _verified(self, path: Path, identity: Identity, what: str, stage: str) -> tuple[dict[str, Tensor], Document]:
        """A file of this identity; a line on stderr says if earlier code made it."""
        name = self.recipe.name
        tensors, document = checkpoints.load_verified(path, identity, f"priorhole {stage} {name}")
        if document["source"] != identity.source:
            owner = self.recipe.owner(path)
            _say_once(f"note: {owner}: {what} was made by earlier code; 'priorhole {stage} {owner}' makes it anew")
        return tensors, document


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)

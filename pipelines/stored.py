"""What is stored of one seed of one experiment, loaded when it is asked for and kept."""

import sys
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from datasets import dataset as data
from datasets.registry import spec
from models import registry as models
from models.folding import folded
from models.protocol import HierarchicalVAE
from pipelines.identities import Identities
from pipelines.recipe import Recipe
from pipelines.samples import Samples
from priors.protocol import GroupPrior, Prior
from runtime import checkpoints, hardware, rowfiles
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
        self._groups: dict[tuple[str, int], GroupPrior] = {}
        self._documents: dict[tuple[str, int], Document] = {}
        self._samples: dict[tuple[str, str], Samples] = {}

    @cached_property
    def dataset(self) -> data.Dataset:
        """The prepared data set."""
        self.require_dataset()
        name = self.recipe.experiment.dataset
        return data.load(name, self.recipe.workspace.prepared(name), self.recipe.experiment.shown)

    def require_dataset(self) -> None:
        """Raises UserError if the data set is not prepared here."""
        folder = self.recipe.workspace.prepared(self.recipe.experiment.dataset)
        if not folder.exists():
            raise UserError(f"{folder} is missing; make it with: priorhole fetch {self.recipe.name}")

    def dataset_digest(self) -> str:
        """Of the data set here; a published VAE can do without it, and is then taken at its word."""
        path = self._vae_path
        if self.recipe.workspace.prepared(self.recipe.experiment.dataset).exists() or self.recipe.is_own(path):
            return self.dataset.digest
        dataset = checkpoints.load(path, f"priorhole train-vae {self.recipe.name}")[1]["config"].get("dataset", {})
        return dataset.get("digest", "")

    def require_vae(self) -> None:
        """Raises UserError if there is no trained VAE, or none that can be used."""
        path = self._vae_path
        checkpoints.load_document(path, self._had_again_by(path, self._made_by("train-vae", path)))

    def new_vae(self) -> HierarchicalVAE:
        """The VAE before training."""
        experiment = self.recipe.experiment
        with initialising(self.recipe.vae_seed, "vae"):
            return models.build(experiment.model.name, experiment.model, spec(experiment.dataset).shape)

    @property
    def _vae_path(self) -> Path:
        return self.recipe.trained_file(self.recipe.workspace.vae(self.recipe.name, self.recipe.vae_seed))

    @cached_property
    def groups(self) -> int:
        """How many groups of latent variables the VAE has; nothing is loaded for that."""
        with initialising(self.recipe.vae_seed, "vae"), torch.device("meta"):
            experiment = self.recipe.experiment
            return models.build(experiment.model.name, experiment.model, spec(experiment.dataset).shape).groups

    @cached_property
    def vae(self) -> HierarchicalVAE:
        """The trained VAE, frozen, in eval mode."""
        path = self._vae_path
        _ = self.vae_document  # refused unless it is of this configuration
        tensors = checkpoints.load(path, self._had_again_by(path, self._made_by("train-vae", path)))[0]
        model = self.new_vae()
        checkpoints.restore(model, tensors, path)
        return model.to(hardware.device()).eval().requires_grad_(False)

    @cached_property
    def vae_document(self) -> Document:
        """The trained VAE's metadata, of which the contents are not read."""
        path = self._vae_path
        return self._described(path, self.identities.vae(), "the VAE", "train-vae", self._made_by("train-vae", path))

    def shares_vae(self) -> bool:
        """Whether the VAE of the experiment that this one is trained in serves it, and none of its own is there."""
        path = self._vae_path
        return (
            self._is_shared(path) and self.identities.vae().difference(checkpoints.load_document(path, "")["config"]) is None
        )

    def shares_group(self, prior: str, k: int) -> bool:
        """The same of a learned group."""
        path, identity = self._prior_file(prior, k)
        return self._is_shared(path) and identity.difference(checkpoints.load_document(path, "")["config"]) is None

    def _is_shared(self, path: Path) -> bool:
        return path.exists() and self.recipe.owner(path) != self.recipe.name

    def new_group(self, prior: str, k: int) -> GroupPrior:
        """One group of a prior before training, on the model's device."""
        options = self.recipe.experiment.priors[prior]
        with initialising(self.recipe.seed, f"prior {prior}", k):
            return self.recipe.method(prior, k)(options, self.vae.layout()[k]).to(hardware.device())

    def _group(self, prior: str, k: int) -> GroupPrior:
        if (prior, k) not in self._groups:
            path = self._prior_file(prior, k)[0]
            self.prior_document(prior, k)  # refused unless it is of this configuration
            tensors = checkpoints.load(path, self._had_again_by(path, self._made_by("train-prior", path, prior)))[0]
            group = self.new_group(prior, k)
            checkpoints.restore(group, tensors, path)
            self._groups[prior, k] = folded(group.eval().requires_grad_(False))
        return self._groups[prior, k]

    def _prior_file(self, prior: str, k: int) -> tuple[Path, Identity]:
        path = self.recipe.trained_file(self.recipe.workspace.prior(self.recipe.name, prior, self.recipe.seed, k))
        own = self.recipe.is_own(path)
        made_by = self._had_again_by(path, self._made_by("train-prior", path, prior))
        stored = None if own else checkpoints.load_document(path, made_by)["config"]
        return path, self.identities.group(prior, k, stored)

    def prior_document(self, prior: str, k: int) -> Document:
        """The metadata of one learned group, of which the contents are not read."""
        if (prior, k) not in self._documents:
            path, identity = self._prior_file(prior, k)
            made_by = self._made_by("train-prior", path, prior)
            self._documents[prior, k] = self._described(path, identity, f"the prior {prior}", "train-prior", made_by)
        return self._documents[prior, k]

    def base_of(self, prior: str) -> Prior:
        """The prior that a prior corrects."""
        base = self.recipe.experiment.priors[prior].base
        if base is not None:
            return self.prior(base)
        return Prior(self.vae, [GroupPrior(GroupPrior.Options(), group) for group in self.vae.layout()])

    def prior(self, prior: str, model: HierarchicalVAE | None = None) -> Prior:
        """A learned prior, all groups, over the VAE or a variant of it."""
        model = model or self.vae
        groups = [self._group(prior, k) for k in range(model.groups)]
        base = self.recipe.experiment.priors[prior].base
        return Prior(model, groups, None if base is None else self.prior(base, model))

    def samples_identity(self, prior: str, sampler: str) -> Identity:
        """What a file of samples is made from."""
        return self.identities.samples(prior, sampler, self.groups)

    def samples(self, prior: str, sampler: str) -> Samples:
        """What was drawn, all images of it; its files are read when something of them is asked for."""
        if (prior, sampler) not in self._samples:
            recipe, identity = self.recipe, self.samples_identity(prior, sampler)
            made_by = f"priorhole sample {recipe.name}"
            folder = recipe.workspace.samples(recipe.name, prior, sampler, recipe.seed)
            files = [file for file in rowfiles.stored(folder, made_by) if file.rows.start < recipe.experiment.sample.images]
            for file in files:
                checkpoints.require_configuration(file.path, file.document, identity, made_by)
                self._note_earlier_code(file.path, file.document, identity, f"what {sampler} drew from {prior}", "sample")
            if not files or rowfiles.gaps(files, recipe.experiment.sample.images):
                raise UserError(f"{folder} is missing or unfinished; make it with: {made_by}")
            self._samples[prior, sampler] = Samples(files, recipe.experiment.sample.images, made_by)
        return self._samples[prior, sampler]

    def sources(self, prior: str, sampler: str) -> dict[str, str]:
        """Digests of the code that made the files behind a row, as ``fingerprints.fingerprint`` takes them."""
        experiment = self.recipe.experiment
        sources = {"vae": self.vae_document["source"]}
        if prior in experiment.priors:
            for name in experiment.chain(prior):
                # A group that the prior leaves alone is not made by its method, and says nothing of that one's code.
                learned = experiment.priors[name].groups or range(self.groups)
                made_by = {self.prior_document(name, k)["source"] for k in learned}
                sources[f"prior {name}"] = "+".join(sorted(made_by))
        if sampler:
            sources["samples"] = "+".join(sorted({file.document["source"] for file in self.samples(prior, sampler).files}))
        return sources

    def _made_by(self, stage: str, path: Path, prior: str | None = None) -> str:
        """The command that makes a trained file; what is missing is made where the experiment says that it is trained."""
        other = self.recipe.experiment.trained_in
        elsewhere = other is not None and (prior is None or prior in self.recipe.config.experiment(other).priors)
        return f"priorhole {stage} {other if elsewhere and not path.exists() else self.recipe.name}"

    def _had_again_by(self, path: Path, made_by: str) -> str:
        """The command that brings back a broken file: a published one is under version control."""
        workspace = self.recipe.workspace
        published = path.is_relative_to(workspace.published(workspace.artifacts(self.recipe.name)).parent)
        return f"git checkout {path}" if published else made_by

    def _described(self, path: Path, identity: Identity, what: str, stage: str, made_by: str) -> Document:
        """The metadata of a file of this identity; a line on stderr says if earlier code made it."""
        document = checkpoints.load_document(path, self._had_again_by(path, made_by))
        checkpoints.require_configuration(path, document, identity, made_by)
        self._note_earlier_code(path, document, identity, what, stage)
        return document

    def _note_earlier_code(self, path: Path, document: Document, identity: Identity, what: str, stage: str) -> None:
        if document["source"] != identity.source:
            owner, stage = self.recipe.owner(path), "import-nvae" if "imported" in document else stage
            _say_once(f"note: {owner}: {what} was made by earlier code; 'priorhole {stage} {owner}' makes it anew")


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)

"""The tasks that stages fan out: one seed's VAE, a shard of one prior's groups, one draw of samples, one evaluation.

Each is a plain function of values that can be pickled, and runs in whatever process it is given to.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets import dataset as data
from datasets.registry import spec
from models import registry as models
from models.folding import folded
from models.protocol import HierarchicalVAE, Tempered
from models.trainer import train_vae
from pipelines.config import Config, Experiment, plain, validate
from pipelines.workspace import Workspace
from priors.protocol import GroupPrior, Prior
from priors.registry import PRIORS, SAMPLERS
from priors.samplers import ESS_FLOOR
from priors.sampling import draw, readjusted
from priors.trainer import Slot, learn
from runtime import checkpoints, hardware
from runtime.blocks import in_blocks
from runtime.errors import UserError
from runtime.files import exclusive
from runtime.identity import Identity, source_digest
from runtime.progress import Report
from runtime.randomness import initialising


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class Seeded:
    """One seed of one experiment: it knows what every file of it is made from, and loads what exists.

    Attributes:
        raw: params.yaml as plain values (they travel between processes better than validated ones).
        name: the experiment.
        seed: one of its seeds.
        root: the workspace's folder.
    """

    raw: dict[str, Any]
    name: str
    seed: int
    root: Path
    _groups: dict[tuple[str, int], tuple[GroupPrior, dict[str, Any]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _samples_documents: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def fresh(self) -> "Seeded":
        """The same with nothing loaded, to be sent to another process."""
        return Seeded(self.raw, self.name, self.seed, self.root)

    @cached_property
    def config(self) -> Config:
        """The validated configuration."""
        return validate(self.raw)

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment."""
        return self.config.experiment(self.name)

    @property
    def workspace(self) -> Workspace:
        """Where the files are."""
        return Workspace(self.root)

    @cached_property
    def dataset(self) -> data.Dataset:
        """The prepared data set. Raises UserError if it is missing, corrupt or another one."""
        return data.load(self.experiment.dataset, self.workspace.data(self.name))

    @property
    def vae_seed(self) -> int:
        """The seed of the VAE that this seed's priors are learned for."""
        shared = self.experiment.vae_seed
        return self.seed if shared is None else shared

    def _here(self, path: Path) -> Path:
        """A trained file under artifacts, or its published copy, or those of the experiment that it is shared with."""
        owners = [self.name] if self.experiment.trained_in is None else [self.name, self.experiment.trained_in]
        inside = path.relative_to(self.workspace.artifacts(self.name))
        originals = [self.workspace.artifacts(owner) / inside for owner in owners]
        places = [place for original in originals for place in (original, self.workspace.published(original))]
        return next((place for place in places if place.exists()), path)

    def vae_identity(self) -> Identity:
        """What the VAE is made from."""
        options = self.experiment.model
        config = {
            "dataset": {"name": self.experiment.dataset, "digest": self._dataset_digest()},
            "model": plain(options),
            "train": plain(self.experiment.train),
            "seed": self.vae_seed,
        }
        source = source_digest("models.trainer", models.MODELS[options.name].__module__)
        return Identity(self.name, self.vae_seed, config, source, self._precision(self.experiment.train))

    @staticmethod
    def _precision(options: Any) -> str:
        """What the settings' ``precision`` comes to on this machine; fp32 for what has no such setting."""
        return hardware.used(getattr(options, "precision", "fp32"), hardware.device().type)

    def _dataset_digest(self) -> str:
        """Of the data set here; a published VAE can do without it, and is then taken at its word."""
        path = self._here(self.workspace.vae(self.name, self.vae_seed))
        if self.workspace.data(self.name).exists() or path.is_relative_to(self.workspace.artifacts(self.name)):
            return self.dataset.digest
        return checkpoints.load(path, "")[1]["config"]["dataset"]["digest"]

    def _verified(self, path: Path, identity: Identity, what: str, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A stored file of this identity; a line on stderr says if earlier code made it. Raises UserError as its loading."""
        tensors, document = checkpoints.load_verified(path, identity, f"priorhole {stage} {self.name}")
        if document["source"] != identity.source:
            _say_once(f"note: {self.name}: {what} was made by earlier code; 'priorhole {stage} {self.name}' makes it anew")
        return tensors, document

    def new_vae(self) -> HierarchicalVAE:
        """The VAE before training."""
        with initialising(self.vae_seed, "vae"):
            return models.build(self.experiment.model.name, self.experiment.model, spec(self.experiment.dataset).shape)

    @cached_property
    def _stored_vae(self) -> tuple[HierarchicalVAE, dict[str, Any]]:
        path = self._here(self.workspace.vae(self.name, self.vae_seed))
        tensors, document = self._verified(path, self.vae_identity(), "the VAE", "train-vae")
        model = self.new_vae()
        checkpoints.restore(model, tensors, path)
        return model.to(hardware.device()).eval().requires_grad_(False), document

    @property
    def vae(self) -> HierarchicalVAE:
        """The trained VAE, frozen, in eval mode. Raises UserError if it is missing or of another configuration."""
        return self._stored_vae[0]

    @property
    def vae_document(self) -> dict[str, Any]:
        """The trained VAE's metadata."""
        return self._stored_vae[1]

    def prior_identity(self, prior: str, k: int, published: bool = False) -> Identity:
        """What group k of a prior is made from; if ``published``, from originals of which small copies are here."""
        options, method = self.experiment.priors[prior], self._method(prior, k)

        def digest(document: dict[str, Any]) -> str:
            return document.get("original", document["digest"]) if published else document["digest"]

        # All that lies below, since a prior without parameters of its own has the same digest whatever it follows.
        below = [digest(self.prior_document(prior_below, k)) for prior_below in self.chain(prior)[1:]]
        base = {"digests below": below} if below else {}
        config = {
            "vae digest": digest(self.vae_document),
            "prior": {} if method is GroupPrior else plain(options, "groups", "samplers"),
            "group": k,
            "seed": self.seed,
            **base,
        }
        source = source_digest("priors.trainer", method.__module__)
        return Identity(self.name, self.seed, config, source, self._precision(options))

    def chain(self, prior: str) -> list[str]:
        """A prior, the prior that it is put on, and so on down to the model's own."""
        return self.experiment.chain(prior)

    def chain_digests(self, prior: str) -> list[str]:
        """Of everything trained that a prior's numbers come from, group by group, down its chain."""
        return [self.prior_document(name, k)["digest"] for name in self.chain(prior) for k in range(self.vae.groups)]

    def chain_modules(self, prior: str) -> list[str]:
        """The modules that define the methods of a prior's chain."""
        return [PRIORS[self.experiment.priors[name].method].__module__ for name in self.chain(prior)]

    def _method(self, prior: str, k: int) -> type[GroupPrior]:
        """What makes group k of a prior; the bare GroupPrior, which is the base, where the prior leaves that group alone."""
        options = self.experiment.priors[prior]
        return PRIORS[options.method] if options.groups is None or k in options.groups else GroupPrior

    def new_group(self, prior: str, k: int) -> GroupPrior:
        """One group of a prior before training, on the model's device."""
        options = self.experiment.priors[prior]
        with initialising(self.seed, f"prior {prior}", k):
            return self._method(prior, k)(options, self.vae.layout()[k]).to(hardware.device())

    def _stored_group(self, prior: str, k: int) -> tuple[GroupPrior, dict[str, Any]]:
        if (prior, k) not in self._groups:
            path = self._here(self.workspace.prior(self.name, prior, self.seed, k))
            identity = self.prior_identity(prior, k, published=not path.is_relative_to(self.workspace.artifacts(self.name)))
            tensors, document = self._verified(path, identity, f"the prior {prior}", "train-prior")
            group = self.new_group(prior, k)
            checkpoints.restore(group, tensors, path)
            self._groups[prior, k] = folded(group.eval().requires_grad_(False)), document
        return self._groups[prior, k]

    def prior_document(self, prior: str, k: int) -> dict[str, Any]:
        """The metadata of one learned group. Raises UserError as :meth:`prior` does."""
        return self._stored_group(prior, k)[1]

    def below(self, prior: str) -> Prior:
        """The base that a prior corrects."""
        base = self.experiment.priors[prior].base
        if base is not None:
            return self.prior(base)
        return Prior(self.vae, [GroupPrior(GroupPrior.Options(), group) for group in self.vae.layout()])

    def prior(self, prior: str, model: HierarchicalVAE | None = None) -> Prior:
        """A learned prior, all groups, over the VAE or a variant of it.

        Raises UserError if a group is missing or of another configuration.
        """
        model = model or self.vae
        groups = [self._stored_group(prior, k)[0] for k in range(model.groups)]
        base = self.experiment.priors[prior].base
        return Prior(model, groups, None if base is None else self.prior(base, model))

    def draws(self) -> list[tuple[str, str]]:
        """Every (prior, sampler) that the experiment draws samples with."""
        return [(prior, sampler) for prior, options in self.experiment.priors.items() for sampler in options.samplers]

    def samples_identity(self, prior: str, sampler: str) -> Identity:
        """What a file of samples is made from."""
        options = self.experiment.samplers[sampler]
        config = {
            "vae digest": self.vae_document["digest"],
            "prior digests": self.chain_digests(prior),
            "sampler": plain(options),
            "sample": plain(self.experiment.sample, *(() if self.experiment.sample.readjust else ("batch",))),
            "seed": self.seed,
        }
        source = source_digest("priors.sampling", *self.chain_modules(prior), SAMPLERS[options.method].__module__)
        return Identity(self.name, self.seed, config, source, self._precision(options))

    def samples(self, prior: str, sampler: str) -> dict[str, Tensor]:
        """What was drawn. Raises UserError if it is missing or of another configuration."""
        path = self.workspace.samples(self.name, prior, sampler, self.seed)
        identity = self.samples_identity(prior, sampler)
        tensors, document = self._verified(path, identity, f"what {sampler} drew from {prior}", "sample")
        if document.get("rows") != self.experiment.sample.images:
            raise UserError(f"{path} is unfinished; make it with: priorhole sample {self.name}")
        self._samples_documents[prior, sampler] = document
        return tensors

    def samples_document(self, prior: str, sampler: str) -> dict[str, Any]:
        """The metadata of what was drawn. Raises UserError as :meth:`samples` does."""
        if (prior, sampler) not in self._samples_documents:
            self.samples(prior, sampler)
        return self._samples_documents[prior, sampler]

    def stored_sources(self, prior: str, sampler: str) -> dict[str, str]:
        """Digests of the code that made the files behind a row, as ``fingerprints.fingerprint`` takes them."""
        sources = {"vae": self.vae_document["source"]}
        if prior in self.experiment.priors:
            sources |= {f"prior {name}": self.prior_document(name, 0)["source"] for name in self.chain(prior)}
        if sampler:
            sources["samples"] = self.samples_document(prior, sampler)["source"]
        return sources


def vae_task(report: Report, at: Seeded) -> dict[str, Any]:
    """Stage 1 for one seed: train the VAE, or find it trained. Returns the checkpoint's metadata."""
    with exclusive(at.workspace.locks, f"{at.name}/vae/seed-{at.vae_seed}"):
        model = at.new_vae().to(hardware.device())
        path = at.workspace.vae(at.name, at.vae_seed)
        return train_vae(model, at.dataset, at.experiment.train, path, at.vae_identity(), report)


def prior_task(report: Report, at: Seeded, prior: str, groups: Sequence[int]) -> None:
    """Stage 2 for one seed and a shard of the groups of one prior."""
    with ExitStack() as locks:
        for k in groups:
            locks.enter_context(exclusive(at.workspace.locks, f"{at.name}/{prior}/seed-{at.seed}/k{k:02d}"))
        slots = [
            Slot(k, at.new_group(prior, k), at.workspace.prior(at.name, prior, at.seed, k), at.prior_identity(prior, k))
            for k in groups
        ]
        learn(at.below(prior), slots, at.dataset, report)


def sample_task(report: Report, at: Seeded, prior: str, sampler: str) -> dict[str, float]:
    """Draw one seed's samples of one prior by one sampler.

    Returns:
        For each group ``k00`` …, the share of images whose effective sample size is under the floor.
    """
    path, options = at.workspace.samples(at.name, prior, sampler, at.seed), at.experiment.samplers[sampler]
    with exclusive(at.workspace.locks, f"{at.name}/samples/{prior}+{sampler}/seed-{at.seed}"):
        settings, by = at.experiment.sample, SAMPLERS[options.method](options)
        model = at.vae if settings.temperature == 1 else Tempered(at.vae, settings.temperature)
        if settings.readjust:
            model = readjusted(model, lambda one: at.prior(prior, one), by, settings.readjust, settings.batch, at.seed)
        learned = at.prior(prior, model)

        def compute(rows: range) -> dict[str, Tensor]:
            return draw(model, learned, by, rows, at.seed, settings.decoding)

        identity = at.samples_identity(prior, sampler)
        drawn = in_blocks(path, identity, settings.images, settings.batch, compute, report)
    return under_floor(drawn)


def under_floor(drawn: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of images with an effective sample size under ESS_FLOOR, by group; none where r was not evaluated at all."""
    shares = {}
    for k in (key.removeprefix("ess/") for key in drawn if key.startswith("ess/")):
        proposals = drawn[f"proposals/{k}"]
        few = (proposals > 0) & (drawn[f"ess/{k}"] * proposals < ESS_FLOOR)
        shares[k] = few.double().mean().item()
    return shares

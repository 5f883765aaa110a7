"""One seed of one experiment as params.yaml says it: its settings, and where its files are. Nothing here is loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.config import Config, Experiment, validate
from pipelines.workspace import Workspace
from priors.protocol import GroupPrior
from priors.registry import PRIORS


@dataclass(frozen=True)
class Recipe:
    """One seed of one experiment; it travels between processes.

    Attributes:
        raw: params.yaml as plain values.
        name: the experiment.
        seed: one of its seeds.
        root: the workspace's folder.
    """

    raw: dict[str, Any]
    name: str
    seed: int
    root: Path

    def __reduce__(self) -> tuple[Any, ...]:
        # Validated options are of classes made at run time, which cannot be pickled: each process validates for itself.
        return Recipe, (self.raw, self.name, self.seed, self.root)

    @cached_property
    def config(self) -> Config:
        """The validated configuration. Raises UserError if it is not valid."""
        return validate(self.raw)

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment. Raises UserError if there is none of that name."""
        return self.config.experiment(self.name)

    @property
    def workspace(self) -> Workspace:
        """Where the files are."""
        return Workspace(self.root)

    @property
    def vae_seed(self) -> int:
        """The seed of the VAE that this seed's priors are learned for."""
        shared = self.experiment.vae_seed
        return self.seed if shared is None else shared

    def draws(self) -> list[tuple[str, str]]:
        """Every (prior, sampler) that the experiment draws samples with."""
        return [(prior, sampler) for prior, options in self.experiment.priors.items() for sampler in options.samplers]

    def method(self, prior: str, k: int) -> type[GroupPrior]:
        """What makes group k of a prior; the bare GroupPrior, which is the base, where the prior leaves that group alone."""
        options = self.experiment.priors[prior]
        return PRIORS[options.method] if options.groups is None or k in options.groups else GroupPrior

    def trained_file(self, path: Path) -> Path:
        """A trained file under artifacts, or its published copy, or those of the experiment that it is shared with."""
        owners = [self.name] if self.experiment.trained_in is None else [self.name, self.experiment.trained_in]
        inside = path.relative_to(self.workspace.artifacts(self.name))
        originals = [self.workspace.artifacts(owner) / inside for owner in owners]
        places = [place for original in originals for place in (original, self.workspace.published(original))]
        return next((place for place in places if place.exists()), path)

    def owner(self, path: Path) -> str:
        """The experiment that made a trained file, or a file of which a copy was published."""
        artifacts = self.workspace.artifacts(self.name).parent
        kept_in = next(folder for folder in (artifacts, self.workspace.published(artifacts)) if path.is_relative_to(folder))
        return path.relative_to(kept_in).parts[0]

    def is_own(self, path: Path) -> bool:
        """Whether a trained file is this experiment's, not a published copy or another experiment's."""
        return path.is_relative_to(self.workspace.artifacts(self.name))

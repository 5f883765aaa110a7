"""Where everything is kept, under the folder that holds params.yaml."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Paths of one checkout. Files that a stage makes for one experiment lie in ``artifacts/EXPERIMENT``."""

    root: Path

    @property
    def params(self) -> Path:
        """The configuration."""
        return self.root / "params.yaml"

    @property
    def raw(self) -> Path:
        """Downloads, shared by the experiments."""
        return self.root / "data" / "raw"

    @property
    def reports(self) -> Path:
        """What is written for people."""
        return self.root / "reports"

    @property
    def results(self) -> Path:
        """The table that every figure and every other table is drawn from."""
        return self.reports / "results.csv"

    @property
    def targets(self) -> Path:
        """The papers' claims."""
        return self.reports / "targets.yaml"

    @property
    def tables(self) -> Path:
        """The papers' tables, and the report's first words."""
        return self.reports / "tables.yaml"

    @property
    def locks(self) -> Path:
        """Locks of the outputs being written."""
        return self.root / "artifacts" / ".locks"

    @property
    def progress(self) -> Path:
        """Progress of running tasks."""
        return self.root / "artifacts" / ".progress"

    def plan(self, experiment: str) -> Path:
        """What ``priorhole plan`` last said of an experiment, and of which settings."""
        return self.root / "artifacts" / ".plans" / f"{experiment}.json"

    def prepared(self, dataset: str) -> Path:
        """A prepared data set, shared by the experiments on it."""
        return self.root / "data" / "prepared" / dataset

    def data(self, experiment: str) -> Path:
        """Which data an experiment is on, by digest: what DVC sees of the data set."""
        return self.root / "data" / f"{experiment}.json"

    def features(self, dataset: str) -> Path:
        """What features of a data set's own images are, and the network that is trained on it."""
        return self.root / "data" / "features" / dataset

    def artifacts(self, experiment: str) -> Path:
        """All that is made for an experiment."""
        return self.root / "artifacts" / experiment

    def published(self, path: Path) -> Path:
        """The small copy, kept under version control, of a file under artifacts."""
        return self.root / "pretrained" / path.relative_to(self.root / "artifacts")

    def removed(self, path: Path) -> Path:
        """Where a file or folder under artifacts is kept once params.yaml no longer names it: out of the stages' outputs."""
        return self.root / "artifacts" / ".removed" / path.relative_to(self.root / "artifacts")

    def vae(self, experiment: str, seed: int) -> Path:
        """The trained VAE."""
        return self.artifacts(experiment) / "vae" / f"seed-{seed}.safetensors"

    def prior(self, experiment: str, prior: str, seed: int, k: int) -> Path:
        """One group of a learned prior."""
        return self.artifacts(experiment) / "priors" / prior / f"seed-{seed}" / f"k{k:02d}.safetensors"

    def samples(self, experiment: str, prior: str, sampler: str, seed: int) -> Path:
        """The folder of what a sampler drew from a prior."""
        return self.artifacts(experiment) / "samples" / f"{prior}+{sampler}" / f"seed-{seed}"

    def measured(self, experiment: str) -> Path:
        """What measuring keeps for itself, since it is dear: the features of samples, the aggregate posterior's images."""
        return self.artifacts(experiment) / "measured"

    def evaluation(self, experiment: str) -> Path:
        """The measured numbers of an experiment."""
        return self.artifacts(experiment) / "evaluation"

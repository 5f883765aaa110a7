"""params.yaml as one validated tree. Everything behind it sees typed, frozen objects."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator

from datasets.registry import DATASETS
from metrics.features import NETWORKS
from metrics.likelihood import LikelihoodOptions
from models.registry import MODELS
from models.trainer import TrainOptions
from pipelines.results import BASELINE
from priors.protocol import GroupPrior
from priors.registry import PRIORS, SAMPLERS
from priors.sampling import Decoding
from runtime.errors import UserError
from runtime.options import Options

Count = Annotated[int, Field(ge=1)]


def _choice(key: str, registry: Mapping[str, Any], **common: Any) -> Any:
    """A union over a registry's entries: ``key`` names the entry, the other keys are that entry's own Options."""
    members = [
        create_model(f"{name} options", __base__=entry.Options, **({key: (Literal[name], ...)} | common))
        for name, entry in registry.items()
    ]
    return Annotated[Union[tuple(members)], Field(discriminator=key)]  # noqa: UP007 (built at run time)


if TYPE_CHECKING:
    ModelChoice: TypeAlias = Any
    PriorChoice: TypeAlias = Any
    SamplerChoice: TypeAlias = Any
else:
    ModelChoice = _choice("name", MODELS)
    PriorChoice = _choice(
        "method",
        PRIORS,
        base=(str | None, None),
        groups=(Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None, None),
        samplers=(list[str], ...),
    )
    SamplerChoice = _choice("method", SAMPLERS)


class SampleOptions(Options):
    """How samples are drawn.

    ``images``: how many with every prior and sampler; ``batch``: at a time; ``decoding``: mean or sample. ``temperature``:
    scales the standard deviations of the base priors; numbers are to be compared at 1. ``readjust``: passes of sampling from
    which the batch norms' statistics are gathered anew.
    """

    images: Annotated[int, Field(ge=2)]
    batch: Count
    decoding: Decoding
    temperature: Annotated[float, Field(gt=0)] = 1.0
    readjust: Annotated[int, Field(ge=0)] = 0


class EvaluateOptions(Options):
    """``examples``: test examples for the likelihood, all if absent; ``batch``: at a time; ``features``: network for FID."""

    likelihood: LikelihoodOptions
    examples: Count | None = None
    batch: Count
    features: Literal[tuple(NETWORKS)] | None = None  # type: ignore[valid-type]


class Experiment(Options):
    """One experiment: what is trained, with which priors, sampled and measured how.

    ``seeds`` repeat all of it; with ``vae_seed``, one VAE of that seed serves them all, and they repeat what follows. A
    prior's ``base`` is the prior that it is put on, the model's own if absent; its ``groups`` are those that it corrects,
    all if absent: the others keep the base. ``trained_in`` names an experiment whose VAE and priors serve this one, as far
    as it has none of its own and they are of the same configuration.
    """

    dataset: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    vae_seed: Annotated[int, Field(ge=0)] | None = None
    model: ModelChoice
    train: TrainOptions
    priors: dict[str, PriorChoice]
    samplers: dict[str, SamplerChoice]
    sample: SampleOptions
    evaluate: EvaluateOptions
    trained_in: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset {self.dataset!r} does not exist; there are {', '.join(DATASETS)}")
        points = DATASETS[self.dataset].kind == "points"
        if points and self.model.likelihood == "bernoulli":
            raise ValueError(f"model.likelihood: {self.dataset} is not binary, so bernoulli does not fit; use normal")
        if points and self.evaluate.features is not None:
            raise ValueError(f"evaluate.features: {self.dataset} has no images to take features of; leave it out")
        if self.train.spectral and not MODELS[self.model.name].convolutional:
            raise ValueError(f"train.spectral: {self.model.name} has no convolutions to keep smooth; leave it out")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ from each other")
        if BASELINE not in self.priors or self.priors[BASELINE].method != "normal":
            raise ValueError(f"priors must include {BASELINE!r} with method normal: gains are measured over it")
        for name, prior in self.priors.items():
            self._check_prior(name, prior)
        return self

    def chain(self, prior: str) -> list[str]:
        """A prior, the prior that it is put on, and so on down to the model's own."""
        base = self.priors[prior].base
        return [prior, *([] if base is None else self.chain(base))]

    def _check_base(self, name: str, prior: Any) -> None:
        method = PRIORS[prior.method]
        if method.on_proposal and prior.groups is not None:
            raise ValueError(f"priors.{name}.groups: {prior.method} follows its base in every group; leave it out")
        if prior.base is None:
            if method.on_proposal:
                raise ValueError(f"priors.{name}: {prior.method} is the sampler of another prior; name that one as its base")
            return
        base = self.priors.get(prior.base)
        if base is None or list(self.priors).index(prior.base) >= list(self.priors).index(name):
            raise ValueError(f"priors.{name}.base: {prior.base!r} must be a prior listed before it")
        if method.on_proposal:
            if not PRIORS[base.method].proposes:
                raise ValueError(f"priors.{name}.base: {prior.base!r} has no sampler of its own; name an evalp prior")
        elif not PRIORS[base.method].exact:
            raise ValueError(f"priors.{name}.base: {prior.base!r} has no exact density, so it cannot be a base")

    def _check_prior(self, name: str, prior: Any) -> None:
        self._check_base(name, prior)
        for sampler in prior.samplers:
            if sampler not in self.samplers:
                raise ValueError(f"priors.{name}.samplers: {sampler!r} is not among the experiment's samplers")
            exact, by = PRIORS[prior.method].exact, SAMPLERS[self.samplers[sampler].method](self.samplers[sampler])
            why = by.refuses(exact, all(PRIORS[self.priors[below].method].smooth for below in self.chain(name)))
            if exact and by.corrects:
                why = f"{prior.method} has no ratio to correct its base by; draw it by ancestral"
            if why is not None:
                raise ValueError(f"priors.{name}.samplers: {sampler!r} does not fit: {why}")
        if self.sample.temperature != 1 and PRIORS[prior.method].base is not GroupPrior.base:
            raise ValueError(f"sample.temperature: {name!r} brings a density of its own, which has no temperature")


class Config(Options):
    """params.yaml: ``run`` lists what a plain ``dvc repro`` runs; ``experiments`` says what each experiment is."""

    run: list[str]
    experiments: dict[str, Experiment]

    @model_validator(mode="after")
    def _known(self) -> "Config":
        for name in self.run:
            if name not in self.experiments:
                raise ValueError(f"run: {name!r} is not among the experiments: {', '.join(self.experiments)}")
        for name, experiment in self.experiments.items():
            if experiment.trained_in is not None and experiment.trained_in not in self.experiments:
                raise ValueError(f"experiments.{name}.trained_in: experiment {experiment.trained_in!r} does not exist")
        return self

    def experiment(self, name: str) -> Experiment:
        """The experiment of that name. Raises UserError if there is none."""
        if name not in self.experiments:
            raise UserError(f"experiment {name!r} does not exist; there are {', '.join(self.experiments)}")
        return self.experiments[name]


def read(path: Path) -> dict[str, Any]:
    """params.yaml as plain values. Raises UserError if it is missing or not YAML."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run priorhole in the folder that holds it") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a mapping with the keys run and experiments")
    return raw


def validate(raw: Mapping[str, Any]) -> Config:
    """The validated tree. Raises UserError with the path of the first wrong key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"params.yaml: {_key_path(raw, first['loc'])}: {message}") from None


def _key_path(raw: Any, location: tuple[int | str, ...]) -> str:
    """The dotted path of an error, without the union tags that pydantic puts into it."""
    parts = []
    for item in location[:-1]:
        found = raw.get(item) if isinstance(raw, dict) else raw[int(item)] if isinstance(raw, list) else None
        if found is not None:
            raw = found
            parts.append(str(item))
    if location and not (isinstance(raw, dict) and location[-1] in (raw.get("method"), raw.get("name"))):
        parts.append(str(location[-1]))
    return ".".join(parts) or "top level"


def plain(options: BaseModel, *without: str) -> dict[str, Any]:
    """An options record as plain JSON values, without the keys that do not change what it makes."""
    return options.model_dump(mode="json", exclude=set(without))

"""params.yaml as one validated tree. Everything behind it sees typed, frozen objects."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model, model_validator

from datasets.dataset import ImageOptions
from datasets.registry import DATASETS
from metrics.features import NETWORKS
from metrics.likelihood import LikelihoodOptions
from models.registry import MODELS
from models.trainer import TrainOptions
from pipelines import strict_yaml
from pipelines.results import AGGREGATE, BASELINE, DATA
from pipelines.samples import Pixels
from priors.protocol import GroupPrior
from priors.registry import PRIORS, SAMPLERS
from priors.samplers import Sampler
from priors.sampling import Decoding
from runtime.errors import UserError
from runtime.options import Options, unless

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what scikit-learn takes

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
"""What an experiment, a prior or a sampler can be called: names become folders, keys, options of a shell and DVC's stages.

Two of them and a seed fit into a file's name; the characters that join them (``+``, ``/``, ``.``) are not among theirs.
"""

RESERVED = (DATA, AGGREGATE)
"""What no prior can be called, since rows of the results table that belong to no prior are."""

LARGEST = {
    "batch": 2**17,
    "cells": 100,
    "checks": 100_000,
    "codes": 10**7,
    "components": 10_000,
    "decoder_cells": 100,
    "decoder_outer_cells": 100,
    "decoder_width": 2**16,
    "depth": 100,
    "expansion": 100,
    "flows": 100,
    "groups_per_scale": 100,  # a group's number has two digits in the names of files and metrics
    "halvings": 10,
    "images": 10**7,
    "latent_channels": 2**16,
    "latents": 2**16,
    "outer_cells": 100,
    "patch": 64,
    "pool": 2**28,
    "steps": 10**9,
    "transforms": 100,
    "width": 2**16,
}
"""The largest whole number that an option can be, by its name: far above what is of use, and below what no memory holds.

It is ANY of those that are not here, seeds apart.
"""

ANY = 2**31 - 1


def _name(text: str) -> str:
    """``text``, a name. Raises ValueError if it cannot be one."""
    if not NAME.fullmatch(text):
        raise ValueError("a name has up to 60 letters, digits, - and _, and begins with a letter or a digit; rename it")
    return text


Name = Annotated[str, AfterValidator(_name)]


def _check_set(key: str, values: Sequence[Any]) -> None:
    """Raises ValueError if a list whose order says nothing names something twice."""
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise ValueError(f"{key} must differ from each other, and {twice!r} is listed twice; leave one out")


def _check_case(key: str, names: Sequence[str]) -> None:
    """Raises ValueError if two names differ in case alone: on some file systems they would share their files."""
    for index, name in enumerate(names):
        same = [other for other in names[:index] if other.lower() == name.lower()]
        if same:
            raise ValueError(f"{key}: {same[0]!r} and {name!r} differ in capitals alone; rename one of them")


def _choice(key: str, registry: Mapping[str, Any], **common: Any) -> Any:
    """A union over a registry's entries: ``key`` names the entry, the other keys are that entry's own Options."""
    members = [
        create_model(f"{name} options", __base__=entry.Options, **({key: (Literal[name], ...)} | common))
        for name, entry in registry.items()
    ]
    return Annotated[Union[tuple(members)], Field(discriminator=key)]  # noqa: UP007 (built at run time)


if TYPE_CHECKING:
    Network: TypeAlias = str
    ModelChoice: TypeAlias = Any
    PriorChoice: TypeAlias = Any
    SamplerChoice: TypeAlias = Any
else:
    Network = Literal[tuple(NETWORKS)]
    ModelChoice = _choice("name", MODELS)
    PriorChoice = _choice(
        "method",
        PRIORS,
        base=(str | None, None),
        groups=(Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None, None),
        samplers=(list[Name], ...),
    )
    SamplerChoice = _choice("method", SAMPLERS)


class SampleOptions(Options):
    """How samples are drawn.

    ``images``: how many with every prior and sampler; ``batch``: at a time; ``decoding``: mean or sample. ``temperature``:
    scales the standard deviations of the base priors, and the decoder's spread unless ``tempered`` says ``priors`` alone, as
    NVAE's published samples have it; numbers are to be compared at 1. ``readjust``: passes of sampling from
    which the batch norms' statistics are gathered anew. ``pixels``: how images are kept, and so how FID sees them: rounded
    to 8 bits, as FIDs of image files are, or as floats. ``rows_per_file``: rows that one file holds, rounded up to whole
    batches (of these and of the feature network's 100): the work that a kill can cost.
    """

    images: Annotated[int, Field(ge=2)]
    batch: Count
    decoding: Decoding
    temperature: Annotated[float, Field(gt=0)] = 1.0
    tempered: Annotated[Literal["priors", "priors+decoder"], unless("priors+decoder")] = "priors+decoder"
    readjust: Annotated[int, Field(ge=0)] = 0
    pixels: Pixels = "uint8"
    rows_per_file: Count = 2000


class EvaluateOptions(Options):
    """``examples``: test examples for the likelihood, all if absent; ``batch``: at a time; ``features``: networks for FID.

    ``likelihood`` is for models that have one, and absent for the others. ``reference``: the images that FID and KID hold
    samples against, and ``reference_images``, how many of them (the first; all if absent): NVAE's FIDs are against what was
    trained on, RAE's against 10 000 that were held out.
    """

    likelihood: LikelihoodOptions | None = None
    examples: Annotated[int, Field(ge=2)] | None = None  # a mean of one has no standard error
    batch: Count
    features: Network | Annotated[list[Network], Field(min_length=1)] | None = None
    reference: Annotated[Literal["train", "train+validation", "test"], Field(exclude_if=lambda value: value == "train")] = (
        "train"
    )
    reference_images: Annotated[int | None, Field(ge=4, exclude_if=lambda value: value is None)] = None

    @property
    def networks(self) -> list[str]:
        """The feature networks, none where no FID is measured."""
        return self.features if isinstance(self.features, list) else [self.features] if self.features else []


class Experiment(Options):
    """One experiment: what is trained, with which priors, sampled and measured how.

    ``seeds`` repeat all of it; with ``vae_seed``, one VAE of that seed serves them all, and they repeat what follows. A
    prior's ``base`` is the prior that it is put on, the model's own if absent; its ``groups`` are those that it corrects,
    all if absent: the others keep the base. ``trained_in`` names an experiment whose VAE and priors serve this one, as far
    as it has none of its own and they are of the same configuration. ``images``: how a model is shown a data set of the
    kind ``images``.
    """

    dataset: str
    images: Annotated[ImageOptions | None, Field(exclude_if=lambda value: value is None)] = None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    vae_seed: Seed | None = None
    model: ModelChoice
    train: TrainOptions
    priors: dict[Name, PriorChoice]
    samplers: dict[Name, SamplerChoice]
    sample: SampleOptions
    evaluate: EvaluateOptions
    trained_in: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset {self.dataset!r} does not exist; there are {', '.join(DATASETS)}")
        points = DATASETS[self.dataset].kind == "points"
        if self.images is not None and self.shown is None:
            raise ValueError(f"images: {self.dataset} holds {DATASETS[self.dataset].kind}, which have no bits or flips")
        if DATASETS[self.dataset].kind != "binary-images" and self.model.likelihood == "bernoulli":
            raise ValueError(f"model.likelihood: {self.dataset} is not binary, so bernoulli does not fit; use normal")
        if points and self.evaluate.networks:
            raise ValueError(f"evaluate.features: {self.dataset} has no images to take features of; leave it out")
        if "own" in self.evaluate.networks and not DATASETS[self.dataset].labelled:
            raise ValueError(
                f"evaluate.features: own is a classifier, and {self.dataset} has no classes; name another network"
            )
        _check_set("evaluate.features", self.evaluate.networks)
        shown_bits, bits = (8 if self.shown is None else self.shown.bits), getattr(self.model, "bits", 8)
        if self.model.likelihood == "logistic-mixture" and bits != shown_bits:
            raise ValueError(
                f"model.likelihood: a mixture of {bits} bits does not fit images of {shown_bits}; change either"
            )
        if self.train.spectral and not MODELS[self.model.name].convolutional:
            raise ValueError(f"train.spectral: {self.model.name} has no convolutions to keep smooth; leave it out")
        if self.evaluate.networks and self.sample.images < 4:
            raise ValueError(f"sample.images: FID needs 4 images, not {self.sample.images}; draw more, or drop features")
        _check_set("seeds", self.seeds)
        _check_case("priors", list(self.priors))
        _check_case("samplers", list(self.samplers))
        for name in self.priors:
            if name.lower() in RESERVED:
                raise ValueError(f"priors: {name!r} is what rows that belong to no prior are called; rename it")
        self._check_baseline()
        for name, prior in self.priors.items():
            self._check_prior(name, prior)
        return self

    def _check_baseline(self) -> None:
        base, model = self.priors.get(BASELINE), self.model.name
        if MODELS[model].stochastic:
            if base is None or base.method != "normal" or base.base is not None:
                raise ValueError(
                    f"priors must include {BASELINE!r} with method normal and no base: gains are measured over it"
                )
            if self.evaluate.likelihood is None:
                raise ValueError(f"evaluate.likelihood is missing: {model} has one")
            return
        if base is None or base.method != "gmm" or base.components != 1:
            raise ValueError(
                f"priors must include {BASELINE!r} with method gmm and components 1: {model} has no prior of its own"
            )
        if self.evaluate.likelihood is not None:
            raise ValueError(f"evaluate.likelihood: {model} is deterministic and has none; leave it out")

    @property
    def shown(self) -> ImageOptions | None:
        """How the model is shown its images, spelt out; None if the data are not of the kind ``images``."""
        return (self.images or ImageOptions()) if DATASETS[self.dataset].kind == "images" else None

    def chain(self, prior: str) -> list[str]:
        """A prior, the prior that it is put on, and so on down to the model's own."""
        found = [prior]
        while (base := self.priors[found[-1]].base) is not None:
            found.append(base)
        return found

    def _check_base(self, name: str, prior: Any) -> None:
        method = PRIORS[prior.method]
        if method.on_proposal and prior.groups is not None:
            raise ValueError(f"priors.{name}.groups: {prior.method} follows its base in every group; leave it out")
        if prior.base is None:
            if not MODELS[self.model.name].stochastic and method.base is GroupPrior.base:
                raise ValueError(
                    f"priors.{name}: {self.model.name} has no prior to put it on; name a gmm or a flow as its base"
                )
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
        _check_set(f"priors.{name}.samplers", prior.samplers)
        _check_set(f"priors.{name}.groups", prior.groups or [])
        for sampler in prior.samplers:
            if sampler not in self.samplers:
                raise ValueError(f"priors.{name}.samplers: {sampler!r} is not among the experiment's samplers")
            exact, by = PRIORS[prior.method].exact, SAMPLERS[self.samplers[sampler].method](self.samplers[sampler])
            why = by.refuses(exact, all(PRIORS[self.priors[below].method].smooth for below in self.chain(name)))
            if exact and by.corrects:
                why = f"{prior.method} has no ratio to correct its base by; draw it by ancestral"
            if why is not None:
                raise ValueError(f"priors.{name}.samplers: {sampler!r} does not fit: {why}")
            if self.sample.readjust and type(by).top_down is not Sampler.top_down:
                raise ValueError(
                    f"sample.readjust: {sampler!r} goes down the model at every step, so that statistics would be of its "
                    "chains' ways, not of samples; leave readjust out, or use sir or langevin"
                )
        own = PRIORS[prior.method].base is not GroupPrior.base or PRIORS[prior.method].on_proposal
        if self.sample.temperature != 1 and own:
            raise ValueError(f"sample.temperature: {name!r} brings a density of its own, which has no temperature")


class Config(Options):
    """params.yaml: ``run`` lists what a plain ``dvc repro`` runs; ``experiments`` says what each experiment is."""

    run: list[Name]
    experiments: dict[Name, Experiment]

    @model_validator(mode="after")
    def _known(self) -> "Config":
        _check_set("run", self.run)
        _check_case("experiments", list(self.experiments))
        for key, value, largest in _whole_numbers(self, "", ANY):
            if value > largest:
                raise ValueError(f"{key} should be at most {largest}, not {value}")
        for name in self.run:
            if name not in self.experiments:
                raise ValueError(f"run: {name!r} is not among the experiments: {', '.join(self.experiments)}")
        for name, experiment in self.experiments.items():
            other = experiment.trained_in
            if other is not None and other not in self.experiments:
                raise ValueError(f"experiments.{name}.trained_in: experiment {other!r} does not exist")
            if other == name:
                raise ValueError(f"experiments.{name}.trained_in: it is the experiment itself; leave it out")
            if other is not None and (further := self.experiments[other].trained_in) is not None:
                raise ValueError(f"experiments.{name}.trained_in: {other} is itself trained in {further}; name that one")
        return self

    def experiment(self, name: str) -> Experiment:
        """The experiment of that name. Raises UserError if there is none."""
        if name not in self.experiments:
            raise UserError(f"experiment {name!r} does not exist; there are {', '.join(self.experiments)}")
        return self.experiments[name]


def _whole_numbers(found: Any, key: str, largest: int) -> Iterator[tuple[str, int, int]]:
    """Every whole number among validated settings, seeds apart: its dotted key, itself, and the largest that it can be."""
    if isinstance(found, BaseModel):
        for name in type(found).model_fields:
            if name not in ("seeds", "vae_seed"):
                inside = f"{key}.{name}" if key else name
                yield from _whole_numbers(getattr(found, name), inside, LARGEST.get(name, ANY))
                if name == "groups_per_scale":
                    yield f"the sum of {inside}", sum(getattr(found, name)), LARGEST[name]
    elif isinstance(found, dict):
        for name, value in found.items():
            yield from _whole_numbers(value, f"{key}.{name}", largest)
    elif isinstance(found, list):
        for index, value in enumerate(found):
            yield from _whole_numbers(value, f"{key}.{index}", largest)
    elif isinstance(found, int) and not isinstance(found, bool):
        yield key, found, largest


def read(path: Path) -> dict[str, Any]:
    """params.yaml as plain values. Raises UserError if it is missing or not YAML (``strict_yaml.read``)."""
    raw = strict_yaml.read(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a mapping with the keys run and experiments")
    return raw


def validate(raw: Mapping[str, Any]) -> Config:
    """The validated tree. Raises UserError with the path, and the value, of the first wrong key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        message = " ".join(first["msg"].removeprefix("Value error, ").split())[:1000]  # which may hold what was given
        wrong = first["input"]
        known = first["type"] != "missing" and not isinstance(wrong, dict | BaseModel)
        value = f" (it is {_brief(wrong)})" if known else ""
        raise UserError(f"params.yaml: {_key_path(first['loc'])}: {message}{value}") from None


_KEY = "[key]"  # what pydantic puts behind a key that is itself wrong


def _key_path(location: tuple[int | str, ...]) -> str:
    """The dotted path of an error, without the union tags that pydantic puts behind a model, a prior and a sampler."""
    parts, kind = [item for item in location if item != _KEY], location[2:3]
    tag = 3 if kind == ("model",) else 4 if kind in (("priors",), ("samplers",)) else len(parts)
    return ".".join(_brief(part, plain=True) for part in (*parts[:tag], *parts[tag + 1 :])) or "top level"


def _brief(value: Any, plain: bool = False) -> str:
    """A value on one line, and a part of it if that is long; if ``plain``, without quotes where it needs none."""
    text = str(value) if plain and str(value).isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(options: BaseModel, *without: str) -> dict[str, Any]:
    """An options record as plain JSON values, without the keys that do not change what it makes."""
    return options.model_dump(mode="json", exclude=set(without))

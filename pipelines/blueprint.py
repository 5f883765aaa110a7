"""An experiment's networks built and run once without numbers, before any work: what cannot be built is said at once.

On torch's meta device tensors have shapes and no contents, so the largest model takes a second and no memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from datasets.dataset import Dataset
from datasets.registry import spec
from models import registry as models
from models.distributions import DiagonalNormal
from models.protocol import Group, HierarchicalVAE, descend
from models.spectral import SpectralNorms
from models.trainer import evidence
from pipelines.config import Experiment
from priors.protocol import GroupPrior, Pair, TrainedPrior
from priors.registry import PRIORS
from runtime.errors import UserError, first_line
from runtime.randomness import Noise

MOST_PARAMETERS = 2**32
"""Of a network: more do not fit any machine that this is for, together with their gradients and moments."""

STAND_IN = 4
"""Latent and context variables of the small group on which is tried what cannot be built without numbers."""


class Shapes(Noise):
    """A source of noise that has shapes alone."""

    def __init__(self) -> None:
        self.device = "meta"

    def normal(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """Nothing, of shape (*lead, *batch)."""
        return torch.empty(*lead, *batch, device=self.device)


def check(name: str, experiment: Experiment) -> None:
    """Refuse an experiment whose VAE or priors cannot be built, or cannot take a step of training.

    Args:
        name: what params.yaml calls it.
        experiment: its settings.

    Raises:
        UserError: naming the key of params.yaml.
    """
    with torch.random.fork_rng(devices=[]):
        model = _vae(f"experiments.{name}", experiment)
        with torch.device("meta"), torch.no_grad():
            layout = model.layout()
        for prior, options in experiment.priors.items():
            last = max(options.groups or [0])
            if last >= model.groups:
                key = f"params.yaml: experiments.{name}.priors.{prior}.groups"
                raise UserError(f"{key}: {last} is too many; the model has groups 0 to {model.groups - 1}")
            tried = set()
            for group in layout:
                method = PRIORS[options.method] if group.k in (options.groups or [group.k]) else GroupPrior
                # A group is built by its shapes, the first by itself.
                kind = (method, group.k == 0, group.latent, group.context)
                if kind not in tried:
                    with _named(f"experiments.{name}.priors.{prior}"):
                        _try(method, options, group)
                tried.add(kind)


def check_batches(name: str, experiment: Experiment, dataset: Dataset) -> None:
    """Refuse batches that the training examples do not fill. Raises UserError, naming the key of params.yaml."""
    if spec(experiment.dataset).fresh is not None:
        return
    fits = dataset.size("train")
    batches = {"train.batch": experiment.train.batch} | {
        f"priors.{prior}.batch": options.batch for prior, options in experiment.priors.items() if hasattr(options, "batch")
    }
    for key, batch in batches.items():
        if batch > fits:
            raise UserError(
                f"params.yaml: experiments.{name}.{key}: a batch of {batch} does not fit the {fits} training examples of "
                f"{experiment.dataset}; lower it"
            )


@contextmanager
def _named(key: str) -> Iterator[None]:
    """What goes wrong in the block becomes one line with the key that it comes from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"params.yaml: {key}: {error}") from error
    except Exception as error:  # whatever a network's parts say of impossible shapes: there are many, and all mean the same
        raise UserError(f"params.yaml: {key}: it cannot be built like this ({first_line(error)}); change it") from error


def _vae(key: str, experiment: Experiment) -> HierarchicalVAE:
    """The VAE, in eval mode, on the meta device, after a step of training without the optimiser's."""
    shape = spec(experiment.dataset).shape
    with _named(f"{key}.model"), torch.device("meta"):
        model = models.build(experiment.model.name, experiment.model, shape)
        _refuse_too_many(model)
        if experiment.train.spectral:
            SpectralNorms(model)
        decoded = model.eval().decode(descend(model, 2, lambda k, context: model.prior(k, context).mean))
        if decoded.mean.shape != (2, *shape):
            raise ValueError(f"it decodes to {tuple(decoded.mean.shape[1:])}, the data are {shape}")
    with _named(f"{key}.train.batch"), torch.device("meta"):
        evidence(model.train(), torch.empty(experiment.train.batch, *shape), [Shapes()] * model.groups)
    if experiment.sample.readjust:
        with _named(f"{key}.sample.batch"), torch.device("meta"):
            model.decode(descend(model, experiment.sample.batch, lambda k, context: model.prior(k, context).mean))
    return model.eval()


def _try(method: type[GroupPrior], options: GroupPrior.Options, group: Group) -> None:
    """Build one group of a prior, and let it take a step of training without the optimiser's."""
    try:
        with torch.device("meta"):
            _step(method(options, group), options, group, "meta")
    except NotImplementedError:  # splines look at numbers when they are made: a small one tells the same of their settings
        sizes = {name: min(getattr(options, name), STAND_IN) for name in ("batch",) if hasattr(options, name)}
        small = Group(
            group.k, (min(STAND_IN, torch.Size(group.latent).numel()),), (min(STAND_IN, *group.context, STAND_IN),)
        )
        _step(method(options.model_copy(update=sizes), small), options.model_copy(update=sizes), small, "cpu")


def _step(prior: GroupPrior, options: GroupPrior.Options, group: Group, device: str) -> None:
    _refuse_too_many(prior)
    if not prior.exact:
        _require_one_number_each(prior, group, device)
    if isinstance(prior, TrainedPrior) and isinstance(options, TrainedPrior.Options):
        z, context = (torch.zeros(options.batch, *shape, device=device) for shape in (group.latent, group.context))
        below = DiagonalNormal(torch.zeros_like(z), torch.ones_like(z))
        pair = Pair(z, z, context, below, torch.zeros_like(z), torch.zeros(options.batch, device=device))
        prior.train().loss(pair, 0)


def _require_one_number_each(prior: GroupPrior, group: Group, device: str) -> None:
    """Raises UserError unless log r has the shape that samplers and likelihoods ask for: (*lead, batch)."""
    z, context = torch.zeros(2, 3, *group.latent, device=device), torch.zeros(3, *group.context, device=device)
    prior.eval()
    for name, found in (
        ("log_ratio", prior.log_ratio(z, context)),
        ("prepared_log_ratio", prior.prepared_log_ratio(z, prior.prepare(context))),
    ):
        if found.shape != (2, 3):
            raise UserError(
                f"{name} of {type(prior).__name__}, given z of the shape {tuple(z.shape)}, returns {tuple(found.shape)}: "
                "it has to be one number for each z, (2, 3)"
            )


def _refuse_too_many(network: torch.nn.Module) -> None:
    """Raises UserError for a network of more than MOST_PARAMETERS."""
    count = sum(parameter.numel() for parameter in (*network.parameters(), *network.buffers()))
    if count > MOST_PARAMETERS:
        raise UserError(f"it has {count:.1e} parameters, and at most {MOST_PARAMETERS:.1e} can be trained; make it smaller")

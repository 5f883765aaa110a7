"""The tasks that stages fan out: one seed's VAE, a shard of one prior's groups, one draw of samples.

Each is a plain function of values that can be pickled, and runs in whatever process it is given to.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from models.protocol import Tempered
from models.trainer import train_vae
from pipelines.recipe import Recipe
from pipelines.stored import Stored
from priors.registry import SAMPLERS
from priors.samplers import ESS_FLOOR
from priors.sampling import draw, readjusted
from priors.trainer import Slot, learn
from runtime import hardware
from runtime.blocks import in_blocks
from runtime.errors import UserError
from runtime.files import exclusive
from runtime.progress import Report


def vae_task(report: Report, recipe: Recipe) -> dict[str, Any]:
    """Stage 1 for one seed: train the VAE, or find it trained. Returns the checkpoint's metadata."""
    workspace, name, seed, stored = recipe.workspace, recipe.name, recipe.vae_seed, Stored(recipe)
    with exclusive(workspace.locks, f"{name}/vae/seed-{seed}"):
        model = stored.new_vae().to(hardware.device())
        path, options = workspace.vae(name, seed), recipe.experiment.train
        return train_vae(model, stored.dataset, options, path, stored.identities.vae(), report)


def prior_task(report: Report, recipe: Recipe, prior: str, groups: Sequence[int]) -> None:
    """Stage 2 for one seed and a shard of the groups of one prior."""
    workspace, name, seed, stored = recipe.workspace, recipe.name, recipe.seed, Stored(recipe)
    with ExitStack() as locks:
        for k in groups:
            locks.enter_context(exclusive(workspace.locks, f"{name}/{prior}/seed-{seed}/k{k:02d}"))
        slots = [
            Slot(k, stored.new_group(prior, k), workspace.prior(name, prior, seed, k), stored.identities.group(prior, k))
            for k in groups
        ]
        learn(stored.base_of(prior), slots, stored.dataset, report)


def sample_task(report: Report, recipe: Recipe, prior: str, sampler: str) -> dict[str, float]:
    """Draw one seed's samples of one prior by one sampler.

    Returns:
        For each group ``k00`` …, the share of images whose effective sample size is under the floor.
    """
    workspace, name, seed, stored = recipe.workspace, recipe.name, recipe.seed, Stored(recipe)
    path, options = workspace.samples(name, prior, sampler, seed), recipe.experiment.samplers[sampler]
    with exclusive(workspace.locks, f"{name}/samples/{prior}+{sampler}/seed-{seed}"):
        settings, drawing = recipe.experiment.sample, SAMPLERS[options.method](options)
        model = stored.vae if settings.temperature == 1 else Tempered(stored.vae, settings.temperature)
        if settings.readjust:
            passes, batch = settings.readjust, settings.batch
            model = readjusted(model, lambda variant: stored.prior(prior, variant), drawing, passes, batch, seed)
        learned = stored.prior(prior, model)

        def compute(rows: range) -> dict[str, Tensor]:
            found = draw(model, learned, drawing, rows, seed, settings.decoding)
            require_finite(found, f"{name}: {prior} by {sampler}, seed {seed}, images {rows.start} to {rows.stop - 1}")
            return found

        identity = stored.samples_identity(prior, sampler)
        drawn = in_blocks(path, identity, settings.images, settings.batch, compute, report)
        require_finite(drawn, f"{name}: {prior} by {sampler}, seed {seed}")  # it may have been there, from other code
    return under_floor(drawn)


def require_finite(drawn: Mapping[str, Tensor], what: str) -> None:
    """Refuse latents and images that are not finite; a diagnostic may well be.

    Args:
        drawn: as ``priors.sampling.draw`` returns it.
        what: names the draw in the message.

    Raises:
        UserError: naming the first group that broke, or the image, and in how many rows.
    """
    for key in (*sorted(key for key in drawn if key.startswith("z/")), "x"):
        broken = int((~drawn[key].isfinite()).flatten(1).any(1).sum())
        if broken:
            raise UserError(
                f"{what}: {key} is not finite in {broken} of {len(drawn[key])}; the sampler or the prior diverged: lower "
                "the sampler's step_size, or the prior's learning rate, in params.yaml"
            )


def under_floor(drawn: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of images with an effective sample size under ESS_FLOOR, by group; none where r was not evaluated at all."""
    shares = {}
    for k in (key.removeprefix("ess/") for key in drawn if key.startswith("ess/")):
        proposals = drawn[f"proposals/{k}"]
        few = (proposals > 0) & (drawn[f"ess/{k}"] * proposals < ESS_FLOOR)
        shares[k] = few.double().mean().item()
    return shares

"""A VAE that was trained elsewhere takes the place of an experiment's own."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from datasets.registry import spec
from models import nvae_released
from models.nvae import NVAE
from pipelines.recipe import Recipe
from pipelines.stored import Stored
from runtime import checkpoints
from runtime.errors import UserError
from runtime.files import exclusive


def import_nvae(recipe: Recipe, checkpoint: Path) -> Path:
    """Write the weights in a checkpoint of NVAE's released training code as the trained VAE of one seed.

    What follows stage 1 takes it for the experiment's own. Its metadata say, under ``imported``, which file it is from.

    Args:
        recipe: the seed.
        checkpoint: the file.

    Returns:
        What was written.

    Raises:
        UserError: the file is no such checkpoint, or of another network; or there is a VAE already.
    """
    experiment, workspace, name, seed = recipe.experiment, recipe.workspace, recipe.name, recipe.vae_seed
    if experiment.model.name != "nvae":
        raise UserError(f"{name} has a model of the kind {experiment.model.name}; weights of an nvae do not fit it")
    stored, path = Stored(recipe), workspace.vae(name, seed)
    stored.require_dataset()  # a checkpoint can take minutes to read
    released, shown = nvae_released.read(checkpoint), experiment.shown
    shape, bits = spec(experiment.dataset).shape, 8 if shown is None else shown.bits
    nvae_released.require_flags(released, experiment.model, shape, bits)
    with exclusive(workspace.locks, f"{name}/vae/seed-{seed}"):
        if path.exists() and imported(path).get("sha256") != released.sha256:
            raise UserError(f"{path} is there already and not from {checkpoint}; move it away to import this one")
        with torch.device("meta"):
            model = NVAE(experiment.model, shape)
        known: dict[str, Any] = {"sha256": released.sha256, "flags": released.flags, **released.progress}
        tensors = nvae_released.translate(released, model)
        step = released.progress.get("global_step", 0)
        checkpoints.save(path, tensors, stored.identities.vae(), step=step, seconds=0.0, history=[], imported=known)
    return path


def imported(path: Path) -> dict[str, Any]:
    """Where a trained VAE was imported from; nothing if it was trained here, is absent, or is no file that can be used."""
    with suppress(UserError):
        return checkpoints.load_document(path, "").get("imported", {})
    return {}

"""The tasks that stages fan out: one seed's VAE, a shard of one prior's groups, one draw of samples.

Each is a plain function of values that can be pickled, and runs in whatever process it is given to.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from datasets import dataset as data
from datasets.registry import spec
from models.protocol import Tempered
from models.trainer import train_vae
from pipelines.importing import imported
from pipelines.recipe import Recipe
from pipelines.removed import keep_outdated
from pipelines.samples import chain_states, latent_rows, require_finite, rows_per_file, to_store
from pipelines.stored import Stored
from pipelines.workspace import Workspace
from priors.registry import SAMPLERS
from priors.sampling import draw, readjusted
from priors.trainer import Slot, learn
from runtime import hardware, parallel, processes, rowfiles
from runtime.blocks import Rows, partial_path
from runtime.files import exclusive
from runtime.progress import Report


def fetch_task(report: Report, name: str, workspace: Workspace, workers: int) -> None:
    """Fetch and prepare a data set, by some processes side by side."""
    with exclusive(workspace.locks, f"data/{name}", wait=True):
        data.fetch(name, workspace.prepared(name), workspace.raw, report, workers)


def has_given_vae(recipe: Recipe) -> bool:
    """Whether stage 1 takes this VAE as it is: imported, or of the experiment that this one is trained in."""
    return bool(imported(recipe.workspace.vae(recipe.name, recipe.vae_seed))) or Stored(recipe).shares_vae()


def vae_task(report: Report, recipe: Recipe) -> dict[str, Any]:
    """Stage 1 for one seed: train the VAE, or find it trained or imported. Returns the checkpoint's metadata.

    Several processes may do it together (:mod:`runtime.parallel`).
    """
    workspace, name, seed, stored = recipe.workspace, recipe.name, recipe.vae_seed, Stored(recipe)
    writes = parallel.rank() == 0
    with exclusive(workspace.locks, f"{name}/vae/seed-{seed}") if writes else nullcontext():
        path, options = workspace.vae(name, seed), recipe.experiment.train
        if has_given_vae(recipe):  # by whatever code: nothing here could make it anew, or is asked to
            return stored.vae_document
        if writes:
            keep_outdated(workspace, dict.fromkeys((path, partial_path(path)), stored.identities.vae()))
        parallel.wait_for_all()  # whoever reads first would delete what is outdated
        model = stored.new_vae().to(hardware.device())
        return train_vae(model, stored.dataset, options, path, stored.identities.vae(), report)


def prior_task(report: Report, recipe: Recipe, prior: str, groups: Sequence[int]) -> None:
    """Stage 2 for one seed and a shard of the groups of one prior, but for those that another experiment shares."""
    workspace, name, seed, stored = recipe.workspace, recipe.name, recipe.seed, Stored(recipe)
    groups = [k for k in groups if not stored.shares_group(prior, k)]
    if not groups:
        return
    with ExitStack() as locks:
        for k in groups:
            locks.enter_context(exclusive(workspace.locks, f"{name}/{prior}/seed-{seed}/k{k:02d}"))
        slots = [
            Slot(k, stored.new_group(prior, k), workspace.prior(name, prior, seed, k), stored.identities.group(prior, k))
            for k in groups
        ]
        keep_outdated(workspace, {path: slot.identity for slot in slots for path in (slot.path, partial_path(slot.path))})
        learn(stored.base_of(prior), slots, stored.dataset, report)


_kept: dict[tuple[str, int], Stored] = {}


def opened(recipe: Recipe) -> Stored:
    """What is stored of a seed; in a process of one run it is loaded for the first of the tasks that need it."""
    if not processes.OF_ONE_RUN:
        return Stored(recipe)
    key = (recipe.name, recipe.seed)
    if key not in _kept:
        _kept.clear()  # one seed's networks at a time
        _kept[key] = Stored(recipe)
    return _kept[key]


def sample_task(
    report: Report, recipe: Recipe, prior: str, sampler: str, part: tuple[int, int] | None = None
) -> dict[str, float]:
    """Draw one seed's samples of one prior by one sampler, or those of one file.

    Args:
        report: told of the progress.
        recipe, prior, sampler: whose.
        part: the first row of the file and the one behind its last; all rows if absent.

    Returns:
        For each group ``k00`` …, the share of images whose effective sample size is under the floor; nothing for a part.
    """
    workspace, name, seed, stored = recipe.workspace, recipe.name, recipe.seed, opened(recipe)
    options, rows = recipe.experiment.samplers[sampler], None if part is None else range(*part)
    own = "" if part is None else f"/rows-{part[0]}"
    with exclusive(workspace.locks, f"{name}/samples/{prior}+{sampler}/seed-{seed}{own}"):
        settings, drawing = recipe.experiment.sample, SAMPLERS[options.method](options)
        cold = settings.temperature != 1
        model = Tempered(stored.vae, settings.temperature, settings.tempered != "priors") if cold else stored.vae
        if settings.readjust:
            passes, batch = settings.readjust, settings.batch
            model = readjusted(model, lambda variant: stored.prior(prior, variant), drawing, passes, batch, seed)
        learned = stored.prior(prior, model)
        pixels = None if spec(recipe.experiment.dataset).kind == "points" else settings.pixels
        latents = latent_rows(stored.vae.layout())

        def compute(rows: range) -> Rows:
            found = draw(model, learned, drawing, rows, seed, settings.decoding)
            require_finite(found, f"{name}: {prior} by {sampler}, seed {seed}, images {rows.start} to {rows.stop - 1}")
            return to_store(found, rows, pixels, latents)

        folder, identity = workspace.samples(name, prior, sampler, seed), stored.samples_identity(prior, sampler)
        per_file = rows_per_file(settings.rows_per_file, settings.batch)
        keep_outdated(workspace, dict.fromkeys(rowfiles.within(folder, rows), identity))
        rowfiles.fill(folder, identity, settings.images, per_file, settings.batch, compute, report, rows)
    return drawn_task(report, recipe, prior, sampler) if part is None else {}


def drawn_task(report: Report, recipe: Recipe, prior: str, sampler: str) -> dict[str, float]:  # noqa: ARG001
    """Look at all that was drawn. Returns and raises what :func:`sample_task` does."""
    stored = opened(recipe)
    drawn = stored.samples(prior, sampler)
    # Some of it may have been there, from other code.
    drawn.require_finite(f"{recipe.name}: {prior} by {sampler}, seed {recipe.seed}")
    return drawn.under_floor(stored.groups, chain_states(recipe.experiment.samplers[sampler]))

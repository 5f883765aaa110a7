"""The aggregate posterior of one seed's VAE: what test examples are encoded to, and what that decodes to."""

import torch
from torch import Tensor

from datasets.dataset import Dataset
from datasets.registry import spec
from models.protocol import posterior_pass
from pipelines.identities import choice
from pipelines.results import AGGREGATE
from pipelines.samples import Samples, latent_rows, rows_per_file, to_store
from pipelines.stored import Stored
from priors.sampling import decoded
from runtime import hardware, rowfiles
from runtime.blocks import Rows
from runtime.identity import Identity, source_digest
from runtime.progress import Report
from runtime.randomness import Noise, generator

ELEMENTS_AT_ONCE = 2**21
"""Of examples that are encoded together."""


def spread(size: int, count: int) -> Tensor:
    """Indices of ``count`` examples of a set of ``size``, or of all if there are fewer, evenly spread over it (n,).

    Not the first ones: a set need not be in random order (the second half of MNIST's test set is of other writers).
    """
    count = min(count, size)
    return torch.arange(count) * size // count


def leading(size: int, count: int, first: int) -> Tensor:
    """:func:`spread`, in an order in which the ``first`` of them are spread over the set too (n,)."""
    chosen = spread(size, count)
    if len(chosen) <= first:
        return chosen
    front = spread(len(chosen), first)
    rest = torch.ones(len(chosen), dtype=torch.bool).index_fill(0, front, False)
    return torch.cat([chosen[front], chosen[rest]])


def chosen_examples(dataset: Dataset, count: int, first: int) -> Tensor:
    """Indices of ``count`` test examples, or of all if there are fewer, whose ``first`` stand for the whole set too (n,).

    Of colour images they are chosen at random, alike for all seeds: where classes take turns, as in the JPEG copy of
    CIFAR-10, every fiftieth image is an aeroplane. The other sets have no such order, and are read at even distances.
    """
    size = dataset.size("test")
    if choice(dataset.name):
        return torch.randperm(size, generator=generator(0, "test-examples"))[:count]
    return leading(size, count, first)


@torch.no_grad()
def aggregate_posterior(stored: Stored, report: Report) -> Samples:
    """As many test examples, at most, as samples are drawn, through the encoder and the decoder, kept in files of rows."""
    recipe, dataset, settings = stored.recipe, stored.dataset, stored.recipe.experiment.sample
    device, latents = hardware.device(), latent_rows(stored.vae.layout())
    pixels = None if spec(dataset.name).kind == "points" else settings.pixels
    examples = chosen_examples(dataset, settings.images, latents)

    def compute(rows: range) -> Rows:
        x, codes = dataset.examples("test", examples[rows.start : rows.stop]).to(device), dict[str, Tensor]()
        context = posterior_pass(
            stored.vae,
            x,
            lambda k: Noise(recipe.seed, "aggregate", k, rows=rows, device=device),
            lambda k, context, posterior, z: codes.update({f"z/k{k:02d}": z}),  # noqa: ARG005
        )
        noise = Noise(recipe.seed, "aggregate-decoder", rows=rows, device=device)
        return to_store({"x": decoded(stored.vae, context, noise, settings.decoding)} | codes, rows, pixels, latents)

    config = {
        "vae digest": stored.vae_document["digest"],
        "dataset digest": dataset.digest,
        "decoding": settings.decoding,
        "pixels": pixels,
        "examples": len(examples),
        "seed": recipe.seed,
    } | choice(dataset.name)
    identity = Identity(recipe.name, recipe.seed, config, source_digest("priors.sampling"))
    folder = recipe.workspace.measured(recipe.name) / AGGREGATE / f"seed-{recipe.seed}"
    at_once = max(1, ELEMENTS_AT_ONCE // torch.Size(dataset.spec.shape).numel())
    per_file = rows_per_file(settings.rows_per_file, at_once)
    rowfiles.fill(folder, identity, len(examples), per_file, at_once, compute, report)
    made_by = f"priorhole evaluate {recipe.name}"
    return Samples(rowfiles.stored(folder, made_by), len(examples), made_by)

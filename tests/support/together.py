"""A tiny VAE trained by one process, or by several in a process group, in processes of their own."""

from contextlib import nullcontext, suppress
from unittest.mock import patch

import torch
from pretend import accelerator
from tiny import tiny
from torch import distributed, multiprocessing

from datasets import dataset as data
from models.registry import MODELS
from models.trainer import TrainOptions, train_vae
from runtime import randomness, training
from runtime.identity import Identity
from runtime.randomness import initialising

MODEL = {"groups_per_scale": [2, 1], "latent_channels": 2, "width": 8, "halvings": 0}
CELLS = {"groups_per_scale": [1, 1], "cells": 1, "expansion": 2}
KINDS = {"residual-hvae": (MODEL | {"halvings": 1}, {}), "nvae": (MODEL | CELLS, {"spectral": 0.01})}
"""Models without and with batch norms, and what their losses have besides."""


def train(folder, kind, processes, steps=40, at=None, pretend=False, **options):
    """The losses of all steps of a training in ``folder``.

    ``at``: a step at whose end it is broken off, unfinished; ``pretend``: whether it is done on the pretend accelerator.
    """
    digits = folder.parent / "digits"
    data.fetch("digits", digits, folder.parent / "raw")
    settings = tiny()["experiments"]["deep"]["train"] | KINDS[kind][1] | options
    folder.mkdir(exist_ok=True)
    for gone in folder.glob("group*"):
        gone.unlink()
    arguments = (processes, folder, digits, kind, settings | {"steps": steps}, at, pretend)
    if processes == 1:
        _member(0, *arguments)
    else:
        multiprocessing.spawn(_member, arguments, nprocs=processes)
    return torch.load(folder / "losses.pt")


class _BrokenOffError(Exception):
    pass


def _member(rank, processes, folder, digits, kind, settings, at, pretend):
    torch.set_num_threads(1)
    if processes > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes)
    dataset, losses = data.load("digits", digits), []

    def report(done, total, note, curves):
        losses.append(curves()["vae"]["loss"])
        if done == at:
            raise _BrokenOffError

    with initialising(0, "model"):
        model = MODELS[kind](MODELS[kind].Options(**KINDS[kind][0]), dataset.spec.shape)
    if pretend:  # whose generators are the CPU's
        own = randomness.generator
        randomness.generator = lambda *names: own(*names[:4])
    path, options = folder / "vae.safetensors", TrainOptions(**settings)
    saving = patch.object(training, "SAVE_SECONDS", training.SAVE_SECONDS if at is None else 0.0)
    on = accelerator() if pretend else nullcontext(torch.device("cpu"))
    with suppress(_BrokenOffError), saving, on as device:
        train_vae(model.to(device), dataset, options, path, Identity("vae", 0, {}), report)
    if rank == 0:
        torch.save(losses, folder / "losses.pt")
    if processes > 1:
        distributed.destroy_process_group()

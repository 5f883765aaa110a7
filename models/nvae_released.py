"""Checkpoints of NVAE's released training code: what is in the file, what its flags mean here, and whose weights are whose.

The file is ``torch.save`` of a dict with, among others, ``state_dict`` and ``args``, an ``argparse.Namespace`` of all flags.
"""

import argparse
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.likelihoods import COMPONENTS
from models.nvae import NVAE, DecoderCell, EncoderCell
from models.nvae_flow import Shift
from runtime.errors import UserError, first_line

DEFAULTS: dict[str, Any] = {
    "ada_groups": False,
    "arch_instance": "res_mbconv",
    "min_groups_per_scale": 1,
    "num_cell_per_cond_dec": 1,
    "num_cell_per_cond_enc": 1,
    "num_mixture_dec": 10,
    "num_nf": 0,
    "num_postprocess_blocks": 2,
    "num_postprocess_cells": 3,
    "num_preprocess_blocks": 2,
    "num_preprocess_cells": 3,
    "num_x_bits": 8,
    "res_dist": False,
    "use_se": False,
}
"""Flags that a file may lack, since they came later or were not named, and what the released code then takes."""

REQUIRED = (
    "dataset",
    "num_channels_dec",
    "num_channels_enc",
    "num_groups_per_scale",
    "num_latent_per_group",
    "num_latent_scales",
)

SIDES = {"mnist": 28, "omniglot": 28, "cifar10": 32, "ffhq": 256}
ONE_CHANNEL = ("mnist", "omniglot")
SIDE_IN_NAME = re.compile(r"(?:celeba|imagenet|lsun_\w+)_(\d+)")

TWICE = ".weight_normalized"
"""How the second name of a plain convolution's weights ends, in all but early files."""


@dataclass(frozen=True)
class Released:
    """A checkpoint.

    Attributes:
        path: the file.
        sha256: of the file.
        state: the weights, by their names there, each with memory of its own.
        flags: those that shape the network, with their defaults where the file lacks them.
        progress: ``epoch`` and ``global_step``, as far as they are there.
    """

    path: Path
    sha256: str
    state: dict[str, Tensor]
    flags: dict[str, Any]
    progress: dict[str, int]


def read(path: Path) -> Released:
    """Read a checkpoint; nothing in it is run, and of pickled classes the flags' own is all that is allowed.

    Raises:
        UserError: it is missing, no such file, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; name the checkpoint.pt that NVAE's training script wrote")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's reader stumbles over, in a file that is cut short most of all
        raise UserError(
            f"{path} cannot be read as a checkpoint of tensors and flags ({type(error).__name__}: {first_line(error)}); if "
            "it was downloaded, compare its size with the original's"
        ) from error
    state, arguments = (found.get(key) if isinstance(found, dict) else None for key in ("state_dict", "args"))
    if not isinstance(state, Mapping) or not isinstance(arguments, argparse.Namespace):
        raise UserError(f"{path} has no state_dict and args, so NVAE's training script did not write it")
    given = vars(arguments)
    absent = [flag for flag in REQUIRED if flag not in given]
    if absent:
        raise UserError(f"{path}: args lack {', '.join(absent)}, so NVAE's training script did not write it")
    counts = [key for key in (*REQUIRED, *DEFAULTS) if key.startswith("num_") and key in given]
    odd = next((key for key in counts if not isinstance(given[key], int) or isinstance(given[key], bool)), None)
    if odd is not None:
        raise UserError(f"{path}: {odd} in args is {given[odd]!r}, not a whole number")
    wrong = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} in its state_dict is no tensor")
    flags = DEFAULTS | {key: value for key, value in given.items() if key in DEFAULTS or key in REQUIRED}
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # Copies: a fused optimiser leaves parameters of one shape as slices of one tensor.
    copies = {name: tensor.detach().clone() for name, tensor in state.items()}
    progress = {key: found[key] for key in ("epoch", "global_step") if isinstance(found.get(key), int)}
    return Released(path, sha256, copies, flags, progress)


def require_flags(released: Released, options: NVAE.Options, shape: tuple[int, ...], bits: int) -> None:
    """Refuse a checkpoint of another network.

    Args:
        released: the checkpoint.
        options: the network here.
        shape: of the data here.
        bits: of the data's levels here.

    Raises:
        UserError: naming the flag, and what it says there and here.
    """
    flags, here = released.flags, options
    side = _side(released)
    one_channel = flags["dataset"] in ONE_CHANNEL
    decoder = "bernoulli" if one_channel else "pixel-normal" if flags["num_mixture_dec"] == 1 else "logistic-mixture"
    narrow = here.decoder_width or here.width
    compared = [
        ("dataset", (1 if one_channel else 3, side, side), tuple(shape), "its images' shape"),
        ("num_groups_per_scale", groups_per_scale(flags), list(here.groups_per_scale), "groups_per_scale"),
        ("num_latent_per_group", flags["num_latent_per_group"], here.latent_channels, "latent_channels"),
        ("num_channels_enc", flags["num_channels_enc"], here.width, "width"),
        ("num_channels_dec", flags["num_channels_dec"], narrow, "decoder_width"),
        ("num_preprocess_blocks", flags["num_preprocess_blocks"], here.halvings, "halvings"),
        ("num_postprocess_blocks", flags["num_postprocess_blocks"], here.halvings, "halvings"),
        ("num_preprocess_cells", flags["num_preprocess_cells"], here.outer_cells, "outer_cells"),
        (
            "num_postprocess_cells",
            flags["num_postprocess_cells"],
            here.decoder_outer_cells or here.outer_cells,
            "decoder_outer_cells",
        ),
        ("num_cell_per_cond_enc", flags["num_cell_per_cond_enc"], here.cells, "cells"),
        ("num_cell_per_cond_dec", flags["num_cell_per_cond_dec"], here.decoder_cells or here.cells, "decoder_cells"),
        ("use_se", flags["use_se"], here.squeeze_excitation, "squeeze_excitation"),
        ("res_dist", flags["res_dist"], here.residual_posterior, "residual_posterior"),
        ("num_nf", flags["num_nf"], here.flows, "flows"),
        ("num_mixture_dec", decoder, here.likelihood, "likelihood"),
        ("num_x_bits", 8 if one_channel else flags["num_x_bits"], bits, "images.bits"),
        ("arch_instance", flags["arch_instance"], "res_mbconv", "cells' kind"),
        ("patch", 1, here.patch, "patch"),
        ("expansion", 6, here.expansion, "expansion"),
        ("base_prior", "learned", here.base_prior, "base_prior"),
    ]
    if decoder == "logistic-mixture":
        compared.append(("num_mixture_dec", flags["num_mixture_dec"], COMPONENTS, "number of components"))
    for flag, there, ours, key in compared:
        if there != ours:
            raise UserError(f"{released.path}: {flag} is {there} there, and the experiment's {key} is {ours}")


def groups_per_scale(flags: Mapping[str, Any]) -> list[int]:
    """Numbers of groups, coarsest scale first."""
    found = [flags["num_groups_per_scale"]]
    for _ in range(flags["num_latent_scales"] - 1):
        found.append(max(flags["min_groups_per_scale"], found[-1] // 2) if flags["ada_groups"] else found[-1])
    return found[::-1]


def translate(released: Released, model: NVAE) -> dict[str, Tensor]:
    """The checkpoint's weights under the names, and in the shapes, of a model here.

    Raises:
        UserError: naming the first weight that is missing, left over, of another shape or not finite.
    """
    named, known, path = names(model), model.state_dict(), released.path
    there = {name: tensor for name, tensor in released.state.items() if not _is_second(name, named)}
    for name in named:
        if name not in there:
            raise UserError(f"{path} lacks {name}, which the experiment's model has; they are of different networks")
    found = {}
    for name, tensor in there.items():
        if name not in named:
            raise UserError(f"{path} has {name}, which the experiment's model has not; they are of different networks")
        here = known[named[name]]
        if [size for size in tensor.shape if size > 1] != [size for size in here.shape if size > 1]:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)} there and {tuple(here.shape)} here")
        found[named[name]] = tensor.reshape(here.shape).to(here.dtype)
    return found


def names(model: NVAE) -> dict[str, str]:
    """Every name in a released state dict of a network, and the name of the same weights in a model here."""
    pairs = [("prior_ftr0", "initial")]
    for there, here, module in _modules(model):
        if isinstance(module, nn.Conv2d) and hasattr(module, "log_norm"):
            pairs.append((f"{there}.log_weight_norm", f"{here}.log_norm"))
        own = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
        pairs += [(f"{there}.{name}", f"{here}.{name}") for name in own if name not in ("log_norm", "mask")]
    return dict(pairs)


def _side(released: Released) -> int:
    name = str(released.flags["dataset"])
    match = SIDE_IN_NAME.fullmatch(name)
    if match is None and name not in SIDES:
        raise UserError(f"{released.path}: its data set is {name}, of which no image size is known")
    return int(match[1]) if match else SIDES[name]


def _is_second(name: str, named: Mapping[str, str]) -> bool:
    return name.endswith(TWICE) and f"{name.removesuffix(TWICE)}.weight" in named


Match = tuple[str, str, nn.Module]
"""A layer with weights: its name there, its name here, and itself."""


def _modules(model: Any) -> Iterator[Match]:
    """Every layer with weights, in the order of the released code's modules."""
    yield "stem", "stem.0", model.stem[0]
    yield from _cells("pre_process", "stem", list(model.stem)[1:], 1)
    at = 0
    for k in reversed(range(model.groups)):
        for i, cell in enumerate(model.bottom_up[k]):
            yield from _cell(f"enc_tower.{at}", f"bottom_up.{k}.{i}", cell)
            at += 1
        if k > 0:
            yield f"enc_tower.{at}.conv", f"merge.{k - 1}", model.merge[k - 1]
            at += 1
    yield "enc0.1", "top.1", model.top[1]
    for k, head in enumerate(model.posterior_heads):
        yield f"enc_sampler.{k}", f"posterior_heads.{k}", head
    for k, prior in enumerate(model.prior_heads):
        yield f"dec_sampler.{k}.1", f"prior_heads.{k}.1", prior[1]
    yield from _flows(model)
    if model.groups == 1:
        yield "stem_decoder", "combine.0", model.combine[0]
    else:
        at = 0
        for k in range(model.groups):
            yield f"dec_tower.{at}.conv", f"combine.{k}", model.combine[k]
            at += 1
            for i, cell in enumerate(model.top_down[k] if k + 1 < model.groups else []):
                yield from _cell(f"dec_tower.{at}", f"top_down.{k}.{i}", cell)
                at += 1
    last = len(model.output) - 1
    yield from _cells("post_process", "output", list(model.output)[: last - 1], 0)
    yield "image_conditional.1", f"output.{last}", model.output[last]


def _cells(there: str, here: str, cells: list[nn.Module], first: int) -> Iterator[Match]:
    for i, cell in enumerate(cells):
        yield from _cell(f"{there}.{i}", f"{here}.{first + i}", cell)


def _cell(there: str, here: str, cell: Any) -> Iterator[Match]:
    """A cell's layers, the skip's first."""
    skip: Any = cell.skip
    body = list(cell.body)
    if isinstance(cell, EncoderCell):
        parts = list(getattr(skip, "parts", []))
        yield from ((f"{there}.skip.conv_{i + 1}", f"{here}.skip.parts.{i}", part) for i, part in enumerate(parts))
        layers = {"_ops.0.bn_act": 0, "_ops.0.conv_0": 2, "_ops.1.bn_act": 3, "_ops.1.conv_0": 5}
    else:
        assert isinstance(cell, DecoderCell)
        up = hasattr(skip, "mix")
        if up:
            yield f"{there}.skip.1", f"{here}.skip.mix", skip.mix
        inside = {"{0}.bn": 1, "{1}.conv.0": 2, "{1}.conv.1": 3, "{2}.conv.0": 5, "{2}.conv.1": 6, "{3}": 8, "{4}.bn": 9}
        numbers = range(up, 5 + up)  # an up cell's first is the upsampling
        layers = {"_ops.0.conv." + name.format(*numbers): i for name, i in inside.items()}
    yield from ((f"{there}.{name}", f"{here}.body.{i}", body[i]) for name, i in layers.items())
    gate, at = getattr(body[-1], "gate", None), len(body) - 1
    if gate is not None:
        yield from ((f"{there}.se.se.{i}", f"{here}.body.{at}.gate.{i}", gate[i]) for i in (0, 2))


def _flows(model: Any) -> Iterator[Match]:
    at = 0
    for k, shifts in enumerate(model.flows):
        for i, shift in enumerate(shifts):
            assert isinstance(shift, Shift)
            there, here = f"nf_cells.{at // 2}.cell{1 + at % 2}", f"flows.{k}.{i}.body"
            layers = {"conv.convz.0": 0, "conv.convz.2": 2, "mu.conv_0": 5}
            yield from ((f"{there}.{name}", f"{here}.{i}", shift.body[i]) for name, i in layers.items())
            at += 1

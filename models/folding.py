"""A trained model, made faster to evaluate."""

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.layers import NormalisedConv2d

Model = TypeVar("Model", bound=nn.Module)


def folded(model: Model) -> Model:
    """A copy to be evaluated alone: batch norms folded into plain convolutions right before them, swish computed in place.

    ``model`` is in eval mode. The copy computes the same, rounding apart; on CPUs, where a batch norm costs a pass over
    memory, it is the faster the more it is made of such pairs.
    """
    model = copy.deepcopy(model)
    for cells in (module for module in model.modules() if isinstance(module, nn.Sequential)):
        for i in range(len(cells) - 1):
            if isinstance(cells[i], nn.Conv2d | nn.BatchNorm2d | nn.Linear) and isinstance(cells[i + 1], nn.SiLU):
                cells[i + 1] = nn.SiLU(inplace=True)  # what those layers put out is used by nothing else
        for i in range(len(cells) - 1):
            layer, norm = cells[i], cells[i + 1]
            if isinstance(layer, NormalisedConv2d):  # its filters are not its weights
                continue
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                cells[i], cells[i + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
    return model

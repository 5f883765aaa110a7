"""A trained model, made faster to evaluate."""

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.layers import NormalisedConv2d

Model = TypeVar("Model", bound=nn.Module)


def folded(model: Model) -> Model:
    """A copy to be evaluated alone, with batch norms folded into plain convolutions right before them.

    ``model`` is in eval mode. The copy computes the same, rounding apart; on CPUs, where a batch norm costs a pass over
    memory, it is the faster the more it is made of such pairs.
    """
    model = copy.deepcopy(model)
    for cells in (module for module in model.modules() if isinstance(module, nn.Sequential)):
        for i in range(len(cells) - 1):
            layer, norm = cells[i], cells[i + 1]
            if isinstance(layer, nn.Conv2d) and not isinstance(layer, NormalisedConv2d) and isinstance(norm, nn.BatchNorm2d):
                cells[i], cells[i + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
    return model

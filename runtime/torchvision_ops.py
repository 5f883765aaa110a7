"""Importing torchvision beside a CPU build of torch.

torchvision's wheels on PyPI are linked against CUDA. Beside a CPU torch their compiled operators do not load, and
``import torchvision`` stops at the Python-side registrations of ``nms`` and ``qnms``. Nothing here uses either
operator, so declaring their schemas is enough. A torchvision that loads is left alone.
"""

import sys
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library withdraws its operators when it is collected


def import_torchvision() -> ModuleType:
    """Return the torchvision module, declaring the missing operators first if the plain import fails on them."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        _declared.append(library)
        import torchvision
    return torchvision

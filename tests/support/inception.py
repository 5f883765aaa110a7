"""Weights for pytorch-fid's Inception network where its own cannot be had."""

from runtime.torchvision_ops import import_torchvision


def random_inception():
    """A state dict of the published file's names and shapes."""
    torchvision = import_torchvision()
    from pytorch_fid import inception

    model = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    model.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
    model.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
    model.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
    model.Mixed_6b = inception.FIDInceptionC(768, channels_7x7=128)
    model.Mixed_6c = inception.FIDInceptionC(768, channels_7x7=160)
    model.Mixed_6d = inception.FIDInceptionC(768, channels_7x7=160)
    model.Mixed_6e = inception.FIDInceptionC(768, channels_7x7=192)
    model.Mixed_7b = inception.FIDInceptionE_1(1280)
    model.Mixed_7c = inception.FIDInceptionE_2(2048)
    return model.state_dict()

"""VGG13-like nets under L2, L1, variance-inverse, layer-normalised and topographic weight decay."""

from trainables.vgg_decay.family import FAMILY

__all__ = ["FAMILY"]

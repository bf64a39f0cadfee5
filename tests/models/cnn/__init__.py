"""Convolutional networks written from their papers, small enough to test in milliseconds."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from models.cnn.branches import densenet, googlenet, inception_v3
from models.cnn.cifar import resnet20, resnet56
from models.cnn.dense import convnext, fcn, unet
from models.cnn.mobile import efficientnet_b0, mobilenet_v2, mobilenet_v3, shufflenet_v2
from models.cnn.resnet import regnet, resnet18, resnet50
from models.cnn.sequential import norm_first, plain_stack, squeezenet, vgg
from models.entry import Entry, Inputs, generator, images, perturb, seeded, settle

FACTORIES: tuple[Callable[[], nn.Module], ...] = (
    plain_stack,
    norm_first,
    resnet18,
    resnet50,
    resnet20,
    resnet56,
    regnet,
    vgg,
    squeezenet,
    mobilenet_v2,
    mobilenet_v3,
    efficientnet_b0,
    shufflenet_v2,
    densenet,
    googlenet,
    inception_v3,
    convnext,
    unet,
    fcn,
)

# nn.Sequential names its argument differently from the classes here.
SEQUENTIAL = {
    "plain_stack",
    "mobilenet_v2",
    "mobilenet_v3",
    "efficientnet_b0",
    "shufflenet_v2",
    "inception_v3",
    "convnext",
}


def _build(factory: Callable[[], nn.Module]) -> nn.Module:
    with seeded("weights", factory.__name__) as source:
        model = perturb(factory(), source)
        return settle(model, _images(_argument(factory), 8, 32), source)


def _images(argument: str, batch: int, side: int) -> Inputs:
    return {argument: images(batch, side, generator("images", batch, side))}


def _argument(factory: Callable[[], nn.Module]) -> str:
    return "input" if factory.__name__ in SEQUENTIAL else "x"


def _entry(factory: Callable[[], nn.Module]) -> Entry:
    name = factory.__name__.replace("_", "-")
    argument = _argument(factory)
    return Entry(
        name=name,
        family="cnn",
        build=functools.partial(_build, factory),
        example=functools.partial(_images, argument),
        dynamic_axes={argument: {0: "batch"}},
        seq=32,
        unseen_seq=32,
    )


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in map(_entry, FACTORIES)}

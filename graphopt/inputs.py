"""Example inputs for a model: from a specification, from a file, or from a Hugging Face config.

A specification names each input with dtype and shape; a name in the shape is a dynamic axis::

    input_ids:int64[batch,seq=128];attention_mask:int64[batch,seq=128]
    image:float32[n=4,3,224,224]
    tokens:int64[batch,64]<1000          (integers below 1000)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError

SEED = 11
DEFAULT_EXTENT = 2

_ITEM = re.compile(
    r"^\s*(?P<name>[A-Za-z_]\w*)\s*:\s*(?P<dtype>\w+)\s*\[(?P<dims>[^\]]*)\]\s*(<\s*(?P<below>\d+))?\s*$"
)
_DIM = re.compile(r"^(?:(?P<size>\d+)|(?P<name>[A-Za-z_]\w*)(?:=(?P<value>\d+))?)$")

_DTYPE_NAMES = (
    *("float32", "float64", "float16", "bfloat16", "complex64"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)  # fmt: skip

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES}


@dataclass(frozen=True)
class Inputs:
    """What a model is captured with.

    ``dynamic`` maps an input's name to ``{axis: name of the axis}``; axes that share a name are
    one size.
    """

    kwargs: dict[str, Any]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSpec:
    """One input of a specification; ``axes`` holds the names of dynamic axes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: dict[int, str]
    below: int | None = None


def parse_spec(text: str) -> list[TensorSpec]:
    """Read a specification; inputs are separated by ``;`` or by ``,`` after a ``]``.

    Raises:
        GraphoptError: names the item that cannot be read, and shows how one is written.
    """
    items = [
        i for i in re.split(r";|(?<=\])\s*,|(?<=\d)\s*,(?=\s*[A-Za-z_]\w*\s*:)", text) if i.strip()
    ]
    sizes: dict[str, int] = {}
    return [_item(item, sizes) for item in items]


def _item(item: str, sizes: dict[str, int]) -> TensorSpec:
    found = _ITEM.match(item)
    if found is None:
        raise GraphoptError(
            f"cannot read the input {item.strip()!r}",
            where="--inputs",
            fix="write NAME:DTYPE[DIM,...], such as input_ids:int64[batch,seq=128]",
        )
    if found["dtype"] not in DTYPES:
        raise GraphoptError(
            f"unknown dtype {found['dtype']!r} of input {found['name']!r}",
            where="--inputs",
            fix=f"use one of {', '.join(DTYPES)}",
        )
    shape, axes = [], {}
    for axis, text in enumerate(filter(None, (d.strip() for d in found["dims"].split(",")))):
        extent, name = _extent(text, sizes, item)
        shape.append(extent)
        if name:
            axes[axis] = name
    below = int(found["below"]) if found["below"] else None
    return TensorSpec(found["name"], DTYPES[found["dtype"]], tuple(shape), axes, below)


def _extent(text: str, sizes: dict[str, int], item: str) -> tuple[int, str | None]:
    found = _DIM.match(text)
    if found is None:
        raise GraphoptError(
            f"cannot read the dimension {text!r}",
            where=f"--inputs {item.strip()}",
            fix="write a size, a name, or name=size",
        )
    if found["size"]:
        return int(found["size"]), None
    name = found["name"]
    if found["value"]:
        value = int(found["value"])
        if sizes.setdefault(name, value) != value:
            raise GraphoptError(
                f"dimension {name!r} is {sizes[name]} in one place and {value} in another",
                where="--inputs",
                fix="give it one size",
            )
    return sizes.setdefault(name, DEFAULT_EXTENT), name


def from_spec(text: str, model: nn.Module | None = None) -> Inputs:
    """Random inputs that fit a specification; integers stay below the model's vocabulary."""
    return draw_inputs(parse_spec(text), _vocabulary(model))


def draw_inputs(specs: Sequence[TensorSpec], vocabulary: int = 2, seed: int = SEED) -> Inputs:
    """Random tensors as described; integers stay below ``vocabulary``, the same on every call.

    Raises:
        GraphoptError: they would take more memory than this machine has.
    """
    _check_memory(specs)
    generator = torch.Generator().manual_seed(seed)
    kwargs = {s.name: _draw(s, generator, vocabulary) for s in specs}
    return Inputs(kwargs, {s.name: s.axes for s in specs if s.axes})


def _check_memory(specs: Sequence[TensorSpec]) -> None:
    """Refuse what cannot be allocated; numbers are drawn with 4 or 8 bytes each."""
    if not hasattr(os, "sysconf"):
        return  # Windows does not say; the allocation itself then fails
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for spec in specs:
        needed = math.prod(spec.shape) * max(4, spec.dtype.itemsize)
        if needed > held:
            raise GraphoptError(
                f"the input {spec.name!r} of shape {list(spec.shape)} takes "
                f"{needed / 2**30:.3g} GiB, and this machine has {held / 2**30:.3g} GiB of memory",
                where="--inputs",
                fix="give smaller dimensions",
            )


def _vocabulary(model: nn.Module | None) -> int:
    """Rows of the embedding that integer inputs most likely index."""
    if model is None:
        return 2
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    getter = getattr(model, "get_input_embeddings", None)
    if getter is not None and isinstance(chosen := getter(), nn.Embedding):
        embeddings = [chosen]
    return min((e.num_embeddings for e in embeddings), default=2)


def _draw(spec: TensorSpec, generator: torch.Generator, vocabulary: int) -> Tensor:
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        real = torch.randn(spec.shape, generator=generator)
        return real.to(spec.dtype)
    if spec.dtype is torch.bool or "mask" in spec.name:
        return torch.ones(spec.shape, dtype=spec.dtype)
    if spec.below is None and "type" in spec.name:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    below = spec.below or vocabulary
    top = min(below, torch.iinfo(spec.dtype).max)
    return torch.randint(top, spec.shape, generator=generator).to(spec.dtype)


def given_inputs(text: str, model: nn.Module | None = None) -> Inputs:
    """Inputs from what a person gave: a file of tensors, or a specification.

    Raises:
        GraphoptError: the file is missing, or what it or the specification says cannot be read.
    """
    try:
        if Path(text).is_file():
            return from_file(text)
    except OSError:  # a specification longer than a file's name may be
        return from_spec(text, model)
    if Path(text).suffix.lower() in _READERS and "[" not in text:
        raise GraphoptError(
            "there is no such file", where=f"--inputs {text}", fix="check the path of the inputs"
        )
    return from_spec(text, model)


def from_file(path: str | Path) -> Inputs:
    """Named tensors from a ``.pt``, ``.safetensors`` or ``.npz`` file; every axis is static.

    Raises:
        GraphoptError: the file is damaged, of another kind, or does not hold a dictionary of
            tensors.
    """
    source = Path(path)
    reader = _READERS.get(source.suffix.lower())
    if reader is None:
        raise GraphoptError(
            f"cannot read inputs from a {source.suffix or 'nameless'} file",
            where=str(source),
            fix="use .pt, .safetensors or .npz with one named tensor per input",
        )
    found = reader(source)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise GraphoptError(
            "expected a dictionary of tensors, one per input",
            where=str(source),
            fix="write it with torch.save({'NAME': tensor}, PATH)",
        )
    return Inputs(found)


def _read_torch(path: Path) -> Any:
    from graphopt.loading.checkpoint import load_checkpoint
    from graphopt.loading.findings import Limits

    return load_checkpoint(path, trust_pickle=False, limits=Limits.from_env())


def _read_safetensors(path: Path) -> Any:
    from graphopt.loading.findings import Limits
    from graphopt.loading.safetensors_files import load_safetensors

    return load_safetensors(path, Limits.from_env())


def _read_numpy(path: Path) -> Any:
    import numpy as np

    from graphopt.loading.findings import reading

    with reading(path, fix="write it with numpy.savez and arrays of numbers"):
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("one array without a name")
        with found as data:
            return {name: torch.from_numpy(data[name]) for name in data.files}


_READERS: Mapping[str, Callable[[Path], Any]] = {
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
    ".npz": _read_numpy,
}

"""ResNet-20 on CIFAR-10 test images: predictions before and after BatchNorm folding, and speed."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

import graphopt
from graphopt.benchmark import _interleave
from graphopt.loading import load_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 250


def run(data: Path | None) -> dict[str, object]:
    if data is None:
        return {"skipped": "needs --data with weights/ and images/"}
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    loaded = load_model(data / "weights" / "resnet20-12fca82f.th", arch="models.cnn:resnet20")
    model = loaded.module
    images, labels = _images(data / "images" / "cifar10-test.npz")
    batch = images[:BATCH]
    fast = graphopt.compile(model, example_inputs=(batch,), dynamic_shapes=({0: "batch"},))
    before, after = _predict(model, images), _predict(fast, images)
    with torch.no_grad():
        calls = {"eager": lambda: model(batch), "graphopt": lambda: fast(batch)}
        times = {k: float(np.median(v)) for k, v in _interleave(calls, 9).items()}
    return {
        "images": len(labels),
        "accuracy": [float((p == labels).float().mean()) for p in (before, after)],
        "predictions_that_differ": int((before != after).sum()),
        "batch_norms_folded": sum("Norm" in a.rule for a in fast.report.applied),
        "seconds": times,
        "ratio": times["graphopt"] / times["eager"],
    }


def _images(path: Path, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    from PIL import Image

    with np.load(path) as file:
        jpeg, offset, labels = (file[k] for k in ("jpeg", "offset", "label"))
    if count is not None:
        offset, labels = offset[: count + 1], labels[:count]
    pictures = [
        np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB"))
        for a, b in itertools.pairwise(offset)
    ]
    scaled = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (scaled - mean) / std, torch.from_numpy(labels).long()


def _predict(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(chunk).argmax(-1) for chunk in images.split(BATCH)])

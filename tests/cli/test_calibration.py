"""``--calibration``: tensors in batches, texts, and what cannot calibrate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.cli.calibration import calibration_of
from graphopt.errors import GraphoptError
from graphopt.inputs import Inputs


class Words:
    """A tokenizer of the shape of Hugging Face's: a token per word between two marks."""

    def __call__(self, text: str, *, max_length: int, **_options: Any) -> dict[str, Any]:
        words, inner = [len(w) for w in text.split()], max_length - 2
        rows = [[1, *words[i : i + inner], 2] for i in range(0, len(words), inner)]
        return {"input_ids": rows}


def subject(tokenizer: Any = None, **example: Any) -> Any:
    loaded = SimpleNamespace(tokenizer=lambda: tokenizer)
    module = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))
    return SimpleNamespace(loaded=loaded, module=module, inputs=Inputs(example))


def test_tensors_come_in_batches_of_the_example(tmp_path: Path) -> None:
    x, y = torch.randn(7, 3), torch.arange(7)
    torch.save({"x": x, "y": y}, tmp_path / "data.pt")
    found = calibration_of(str(tmp_path / "data.pt"), subject(x=x[:2], y=y[:2]))
    assert found is not None
    assert [len(batch["x"]) for batch in found] == [2, 2, 2]
    assert torch.equal(found[2]["x"], x[4:6])
    assert torch.equal(found[2]["y"], y[4:6])


def test_tensors_that_do_not_come_apart_are_one_batch(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(7, 3), "scale": torch.tensor(2.0)}, tmp_path / "data.pt")
    example = {"x": torch.randn(2, 3), "scale": torch.tensor(1.0)}
    found = calibration_of(str(tmp_path / "data.pt"), subject(**example))
    assert found is not None
    assert [len(batch["x"]) for batch in found] == [7]


def test_text_becomes_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(["word"] * 12 + ["words"] * 12))
    ids = torch.zeros(2, 5, dtype=torch.int64)
    example: dict[str, Tensor | bool] = {
        "input_ids": ids,
        "attention_mask": ids,
        "token_type_ids": ids,
        "use_cache": False,
    }
    found = calibration_of(str(tmp_path / "a.txt"), subject(Words(), **example))
    assert found is not None
    assert [batch["input_ids"].tolist() for batch in found] == [
        [[1, 4, 4, 4, 4, 4, 4, 2]] * 2,
        [[1, 5, 5, 5, 5, 5, 5, 2]] * 2,
    ]
    assert all(bool(b["attention_mask"].all()) and not b["token_type_ids"].any() for b in found)
    assert found[0]["use_cache"] is False


def test_a_text_for_another_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    path, ids = str(tmp_path / "a.txt"), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(GraphoptError, match="that has a tokenizer"):
        calibration_of(path, subject(x=torch.randn(2)))
    with pytest.raises(GraphoptError, match="has 0 sequences of 8 tokens, and a batch 2"):
        calibration_of(path, subject(Words(), input_ids=ids))
    (tmp_path / "a.txt").write_text("word " * 40)
    with pytest.raises(GraphoptError, match="nothing about the input 'pixels'"):
        calibration_of(path, subject(Words(), input_ids=ids, pixels=torch.randn(2)))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(GraphoptError, match="cannot read the text"):
        calibration_of(path, subject(Words(), input_ids=ids))
    assert calibration_of(None, subject()) is None

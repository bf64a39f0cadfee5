"""Outputs and caches of transformers in ``.pt2`` files: known when the file is loaded, and held."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import edit_json, rewritten

import graphopt
from graphopt.errors import LoadError
from graphopt.loading import load_model
from graphopt.loading.pt2_classes import part_reason

transformers = pytest.importorskip("transformers")
CACHE = "transformers.cache_utils:DynamicCache"


@pytest.fixture(scope="module")
def with_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that returns the keys and values of a language model."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    module = graphopt.compile(model, example_kwargs={"input_ids": ids}, measure=False)
    return graphopt.save(module, tmp_path_factory.mktemp("saved") / "cache.pt2")


@pytest.fixture(scope="module")
def with_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that returns a class of a model's own module."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 1, "vocab_size": 99, "eos_token_id": 98}  # fmt: skip
    image = {**text, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    inputs = {"input_ids": torch.arange(12).view(2, 6), "pixel_values": torch.rand(2, 3, 8, 8)}
    model = transformers.CLIPModel(config).eval()
    module = graphopt.compile(model, example_kwargs=inputs, measure=False)
    return graphopt.save(module, tmp_path_factory.mktemp("saved") / "outputs.pt2")


@pytest.mark.parametrize("saved", ["with_cache", "with_outputs"])
def test_a_process_that_has_not_seen_the_model_loads_it(
    saved: str, request: pytest.FixtureRequest
) -> None:
    code = "import sys, graphopt; graphopt.load(sys.argv[1])"
    path = str(request.getfixturevalue(saved))
    found = subprocess.run(
        [sys.executable, "-c", code, path], check=False, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]


def test_the_cache_comes_back(with_cache: Path) -> None:
    found = graphopt.load(with_cache)(input_ids=torch.arange(12).view(2, 6))
    assert type(found.past_key_values).__name__ == "DynamicCache"
    assert found.past_key_values.get_seq_length() == 6


def edited(source: Path, target: Path, edit: Callable[[str], str]) -> Path:
    """A copy whose structure of results was edited."""

    def change(program: Any) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = edit(signature["out_spec"])

    return rewritten(source, target, lambda c: edit_json(c, "models/model.json", change))


def described(spec: str, **changes: Any) -> str:
    """The structure with the description of its cache changed."""
    protocol, tree = json.loads(spec)
    cache = tree["children_spec"][-1]
    cache["context"] = json.dumps({**json.loads(cache["context"]), **changes})
    return json.dumps([protocol, tree])


@pytest.mark.parametrize(
    "changes",
    [
        {"_t": "seq", "p": "subprocess:Popen", "v": ["id"]},
        {"_t": "map", "p": "os:system", "v": {}},
        {"_t": "seq", "p": CACHE, "v": []},
        {"_t": "obj", "p": "transformers.commands.serving:ServeCommand", "s": {}},
        {"_t": "obj", "p": 7, "s": {}},
        {"layer_class_to_replicate": {"_t": "type", "p": "subprocess:Popen"}},
    ],
    ids=lambda c: str(c.get("p", "inner")),
)
def test_a_cache_may_not_name_other_classes(
    with_cache: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    bad = edited(with_cache, tmp_path / "bad.pt2", lambda s: described(s, **changes))
    with pytest.raises(LoadError, match="a cache's description imports"):
        load_model(bad)


def test_plain_containers_may_be_named() -> None:
    assert part_reason({"_t": "seq", "p": "collections:deque", "v": []}) is None
    assert part_reason({"_t": "tensor", "i": 0}) is None
    assert part_reason({"_t": "obj", "p": CACHE, "s": {}}) is None


def test_a_class_that_is_not_there_is_named(with_cache: Path, tmp_path: Path) -> None:
    newer = edited(
        with_cache, tmp_path / "newer.pt2", lambda s: s.replace("DynamicCache", "NewCache")
    )
    with pytest.raises(LoadError, match="NewCache, which the installed transformers lacks"):
        load_model(newer)

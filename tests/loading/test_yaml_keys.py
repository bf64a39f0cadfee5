from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.errors import RecipeError
from graphopt.loading import check_keys, safe_yaml


def test_plain_data_from_text_and_path(tmp_path: Path) -> None:
    text = "passes:\n  - FoldBatchNorm\n  - QuantizeMatmul: {bits: 4}\n"
    expected = {"passes": ["FoldBatchNorm", {"QuantizeMatmul": {"bits": 4}}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert safe_yaml(text) == safe_yaml(path) == safe_yaml(str(path)) == expected


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [[{marker}]]",
        "!!python/object/new:pathlib.Path [{marker}]",
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!local {{}}",
    ],
)
def test_tags_build_nothing(tag: str, tmp_path: Path, marker: Path) -> None:
    text = f"a: 1\nb: {tag.format(marker=marker)}\n"
    with pytest.raises(RecipeError, match="could not determine a constructor") as refusal:
        safe_yaml(text)
    assert (refusal.value.where or "").endswith(":2")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "the YAML is wrong"),
        ("a: 1\na: 2", "the key 'a' is there twice"),
        ("a: 2026-99-99", "cannot be read"),
        ("x: &x [1]\ny: [" + "*x, " * 2000 + "1]", "more than 1000 aliases"),
        ("{[1]: 2}", "the YAML is wrong"),
        ("\x00", "cannot be read"),
        ("[" * 5000, "cannot be read|the YAML is wrong"),
    ],
)
def test_wrong_yaml(text: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        safe_yaml(text)


def test_merge_keys_are_not_repeats() -> None:
    text = "base: &b {bits: 8, skip: []}\nmine:\n  <<: *b\n  bits: 4\n"
    assert safe_yaml(text)["mine"] == {"bits": 4, "skip": []}


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        safe_yaml(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        safe_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        safe_yaml(tmp_path / "latin.yaml")


def test_unknown_key_names_the_nearest() -> None:
    check_keys({"bits": 4}, ("bits", "group_size"), "recipe.yaml")
    with pytest.raises(RecipeError, match="unknown name 'groupsize'") as refusal:
        check_keys({"bits": 4, "groupsize": 32}, ("bits", "group_size"), "recipe.yaml")
    assert refusal.value.fix == "did you mean 'group_size'?"
    assert refusal.value.where == "recipe.yaml"


def test_unknown_key_without_a_neighbour_lists_all() -> None:
    with pytest.raises(RecipeError) as refusal:
        check_keys({7: 1}, ["bits", "method"], "recipe.yaml")
    assert refusal.value.fix == "valid names: bits, method"


def test_no_mapping() -> None:
    with pytest.raises(RecipeError, match="a mapping was expected"):
        check_keys(["bits"], ["bits"], "recipe.yaml")

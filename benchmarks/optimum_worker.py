"""optimum's export of a folder of transformers: ``FOLDER TASK OUT LEVEL``; prints the file as JSON.

Runs with an older transformers too, and imports nothing of graphopt.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path


def main() -> None:
    warnings.simplefilter("ignore")
    folder, task, out, level = sys.argv[1:]
    _for_older(Path(folder) / "config.json")
    try:
        from optimum.exporters.onnx import main_export

        options = {} if level == "none" else {"optimize": level}
        main_export(folder, out, task=task, device="cpu", do_validation=False, **options)
        found = {"file": str(Path(out) / "model.onnx")}
    except Exception as error:  # whatever stands in its way is the row
        said = [t.strip() for t in str(error).splitlines() if t.strip()] or [""]
        found = {"error": f"{type(error).__name__}: {said[-1]}"[:300]}
    print(json.dumps(found))


def _for_older(path: Path) -> None:
    """Bases of rotary embeddings where transformers before version 5 reads them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        path.write_text(json.dumps({**config, "rope_theta": theta}), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Runs the tutorials that take a `MODEL` on a real model and stores their results.

    PYTHONPATH=benchmarks python benchmarks/tutorial_answers.py          # all of them
    PYTHONPATH=benchmarks python benchmarks/tutorial_answers.py 09_chats

Writes tutorials/answers, which the tutorials read where they are given no model. Then
``jupyter execute --inplace`` them, and read what has moved. `--model` may name a folder with a
checkpoint.
"""

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

from real_causes.checkpoints import folder
from real_results import MODEL, ROOT

TUTORIALS = ROOT / "tutorials"
# Per tutorial which of its variables is kept under which name.
KEPT = {
    "08_your_own_model": {"result": "lakes"},
    "09_chats": {"result": "chat"},
    "11_refusals": {"refused": "refusal", "complied": "compliance"},
}


def code(name: str) -> list[str]:
    """The code cells of a tutorial."""
    notebook = json.loads((TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(KEPT))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=TUTORIALS / "answers")
    arguments = parser.parse_args()
    os.environ["MODEL"] = folder(arguments.model)
    warnings.simplefilter("ignore")
    for name in arguments.names or list(KEPT):
        found: dict[str, Any] = {}
        for cell in code(name):
            if not all(kept in found for kept in KEPT[name]):  # what follows only reads them
                exec(cell, found)
        for variable, kept in KEPT[name].items():
            result = found[variable]
            # What the folder is called says less, and a path is no one else's.
            result.provenance |= {"model": MODEL, "command": f"tutorials/{name}.ipynb"}
            result.save(arguments.out / f"{kept}.safetensors")
            print(result, flush=True)


if __name__ == "__main__":
    main()

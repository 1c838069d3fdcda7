"""Writes `golden.json`: the losses of microsoft/mup on every case of `problems.py`.

    python tests/parity/make_golden.py

in an environment with the extra `parity`. The numbers are written with all their digits.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from typing import Final

import reference
from problems import CASES

GOLDEN: Final = pathlib.Path(__file__).parent / "golden.json"


def main() -> None:
    """Trains every case and writes the file."""
    golden = {
        "made_by": {name: importlib.metadata.version(name) for name in ("mup", "torch", "numpy")},
        "losses": {str(case): reference.losses(case) for case in CASES},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Runs figures of the paper, or writes the README from the reports that are there.

    python -m benchmarks.paper F1 F9 [--scale tiny|laptop|gpu] [--out DIR]
        [--text FILE] [--pairs FILE] [--images DIR]
    python -m benchmarks.paper report [--out DIR]

An interrupted run is resumed by the same command.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Final

from benchmarks.common import OUT
from benchmarks.paper import FIGURES, figure
from benchmarks.paper._figure import SCALES, Inputs, Row, make, shown
from benchmarks.paper._report import RESULTS, write_readme
from mujax.errors import MujaxError

_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 2 for bad arguments or missing data, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description="Figures of the µTransfer paper."
    )
    parser.add_argument("figures", nargs="+", choices=(*FIGURES, "all", "report"), metavar="FIGURE")
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder of the results: benchmarks/out/paper; of `report`: results/"
    )
    parser.add_argument("--so-far", action="store_true", help="run nothing: report on what is finished")
    parser.add_argument("--text", type=pathlib.Path, help="text file in place of the packaged text")
    parser.add_argument("--pairs", type=pathlib.Path, help="file of tab-separated pairs of sentences")
    parser.add_argument("--images", type=pathlib.Path, help="folder of four IDX files")
    options = parser.parse_args(argv)
    inputs = Inputs(options.text, options.pairs, options.images)
    names = FIGURES if "all" in options.figures else options.figures
    try:
        for name in names:
            if name == "report":
                print(f"Wrote {write_readme(options.out or RESULTS)}.")
                continue
            one = figure(name)
            report = make(one, options.scale, inputs, options.out or OUT / "paper", so_far=options.so_far)
            print(f"{name}: {one.title}\n\n{shown([Row(**row) for row in report['rows']])}\n")
    except MujaxError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted: the same command resumes.", file=sys.stderr)
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())

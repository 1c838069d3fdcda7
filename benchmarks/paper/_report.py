"""The README of this folder: pictures and tables, written from the reports alone."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.paper import FIGURES, figure
from benchmarks.paper._figure import SCALES, Figure, Scale, verdict

FOLDER: Final = pathlib.Path(__file__).parent
RESULTS: Final = FOLDER / "results"
README: Final = FOLDER / "README.md"
_START, _END = (
    "<!-- figures: written by `python -m benchmarks.paper report` -->\n",
    "<!-- end of figures -->\n",
)


def write_readme(out: pathlib.Path, readme: pathlib.Path = README) -> pathlib.Path:
    """Replaces the part between the two marks by what the reports in `out` say."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(_START)
    _, after = rest.split(_END)
    readme.write_text(f"{before}{_START}\n{sections(out, readme.parent)}{_END}{after}", encoding="utf-8")
    return readme


def sections(out: pathlib.Path, relative_to: pathlib.Path = FOLDER) -> str:
    """A section for each figure: its claim, its picture and its table at each scale that was run."""
    parts = []
    for name in FIGURES:
        one = figure(name)
        parts.append(f"## {name}: {one.title}\n\n{one.claim} ({one.source})\n\n")
        found = False
        for scale in SCALES:
            path = out / f"{name}-{scale}.json"
            if scale != "tiny" and path.exists():
                found = True
                parts.append(_at_scale(one, scale, json.loads(path.read_text()), path, relative_to))
        if not found:
            parts.append(f"Not run yet: `{one.command('laptop')}`.\n\n")
    return "".join(parts)


def _at_scale(
    one: Figure, scale: Scale, report: Mapping[str, Any], path: pathlib.Path, relative_to: pathlib.Path
) -> str:
    pictures = [path.with_suffix(end) for end in (".gif", ".png")]
    shown = [
        f"![{one.title}, {scale}]({picture.relative_to(relative_to)})\n\n"
        for picture in pictures
        if picture.exists()
    ]
    rows = "".join(
        f"| {row['claim']} | {row['measured']} | {row['interval']} | {verdict(row['holds'])} |\n"
        for row in report["rows"]
    )
    remark = one.remarks.get(scale, "")
    flops, device = report["flops"], report.get("device", f"{report['cores']} cores")
    return (
        f"{''.join(shown)}| claim | measured | interval | holds |\n|---|---|---|---|\n{rows}\n"
        f"`{report['command']}`: {report['minutes']:.0f} minutes on {device}"
        + (f", {flops / 1e12:.3g} trillion operations" if flops else "")
        + f" ([numbers]({path.relative_to(relative_to)})).\n\n"
        + ("" if report["finished"] else "Not finished: the command resumes it.\n\n")
        + (f"{remark}\n\n" if remark else "")
    )

"""Every README.md of the repository: its Python blocks run, and what it names exists."""

import functools
import pathlib
import re

import pytest

import mujax.testing

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("mujax", "benchmarks", "tests")
PATHS = [
    ROOT / "README.md",
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md")),
]
READMES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
FRONT = READMES["README.md"]
BLOCKS = [
    (name, number, block)
    for name, text in READMES.items()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S))
]

# The READMEs that teach by example, and how many examples each has at the least.
EXAMPLES = {
    "README.md": 2,
    "mujax/core/README.md": 1,
    "mujax/core/depth/README.md": 1,
    "mujax/optim/README.md": 2,
    "mujax/train/README.md": 10,
    "mujax/check/README.md": 2,
    "mujax/tune/README.md": 1,
}


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=f"{name}-{number}") for name, number, block in BLOCKS]
)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A file, as a user has it: grain and tracebacks read the lines of a function from it.
    script = tmp_path / "example.py"
    script.write_text(block)
    exec(compile(block, script, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_python_blocks(name):
    """A block that is not marked as Python would not be run."""
    assert sum(name == other for other, _, _ in BLOCKS) >= EXAMPLES[name]


def test_front_page_is_short():
    assert len(FRONT.splitlines()) <= 150


def test_the_commands_are_the_two_promised():
    assert 'pip install ".[cli]" && mujax transfer' in FRONT
    assert 'pip install ".[test]" && pytest' in FRONT


def links(name: str) -> list[str]:
    """The relative links of a README, as it has them."""
    targets = re.findall(r"\]\(([^)\s]+)\)", READMES[name])
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for link in links(name):
        file, _, anchor = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def test_each_readme_can_be_reached_from_the_front_page():
    reached, ahead = set(), ["README.md"]
    while ahead:
        name = ahead.pop()
        reached.add(name)
        paths = [((ROOT / name).parent / link.partition("#")[0]).resolve() for link in links(name)]
        found = {path.relative_to(ROOT).as_posix() for path in paths}
        ahead += (found & READMES.keys()) - reached
    assert reached == READMES.keys()


# A file and maybe a line of it, or a folder of the package or its tests.
FILE = re.compile(
    r"(?<![\w/.:-])((?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|png)|(?:mujax|tests)/[\w/]*)(?::(\d+))?"
)


@pytest.mark.parametrize("name", READMES)
def test_files_that_are_named_exist(name):
    """In prose, commands and sample output; a line that is named is one of the file's."""
    for file, line in FILE.findall(re.sub(r"\[[^]]*\]\(", "(", READMES[name])):
        if file.startswith("my_"):
            continue
        found = [path for path in ((ROOT / name).parent / file, ROOT / file) if path.exists()]
        assert found, file
        assert not line or int(line) <= len(found[0].read_text().splitlines()), f"{file}:{line}"


@pytest.mark.parametrize("name", READMES)
def test_names_of_mujax_exist(name):
    names = set(re.findall(r"(?<![\w/.])mujax(?:\.[A-Za-z_]\w*)+", READMES[name]))
    # A database, and names with a placeholder.
    for found in names - {"mujax.db", "mujax.mup_", "mujax.mup_scale_by_"}:
        functools.reduce(getattr, found.split(".")[1:], mujax)

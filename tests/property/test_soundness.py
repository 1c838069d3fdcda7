"""Random programs, read and measured: what is claimed holds over widths, or a finding names the place.

The programs and the measurement are those of `benchmarks/soundness.py`, which has the details. Here each
program is measured at two widths with one seed, and at four with three if it looks wrong. A hundred take
about a minute of CPU time on a busy machine. Left out, as they take long: images and convolutions, programs
of more than seven parameters, and initialisers with a mean, which are sampled.
"""

import importlib.util
import itertools
import pathlib
import random
import sys

import pytest

import mujax

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
PROGRAMS, AT_ONCE = 100, 25


@pytest.fixture(scope="module")
def soundness():
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("benchmark_soundness", BENCHMARKS / "soundness.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def rounds(soundness):
    """Ways to measure, the cheapest first."""
    return soundness.Round((32, 256), 1), soundness.Round((32, 64, 128, 256), 3)


def cheap(program):
    return not program.has_means and len(program.params) <= 7 and "img" not in "".join(program.body)


def numbered(soundness, first, last):
    """The cheap programs from the `first` to before the `last`, each with its number among all."""
    everything = ((number, soundness.generate(0, number)) for number in itertools.count())
    return itertools.islice((pair for pair in everything if cheap(pair[1])), first, last)


@pytest.mark.parametrize("first", range(0, PROGRAMS, AT_ONCE))
def test_random_programs_scale_as_claimed_or_a_finding_names_the_place(soundness, rounds, first):
    wrong = {}
    for number, program in numbered(soundness, first, first + AT_ONCE):
        result = soundness.run(program, number, rounds)
        if result.outcome == "failure":
            wrong[number] = "\n".join([program.source(), result.outcome, *result.wrong, result.error])
    assert not wrong, "\n\n".join(wrong.values())


class Planted:
    """A program with each thing that the reading claims, and the names of its parameters."""

    def __init__(self, writer):
        def param(init):
            read = writer.param(init)
            return read, read[3:-2]

        # Each of the lines is a step.
        writer.steps.extend((line, "line") for line in range(2, 8))
        table, _ = param("normal(k, V, n)")
        h = writer.value(f"{table}[tokens]", "s").name
        (q, _), (k, _) = param("normal(k, n, n) / n ** 0.5"), param("normal(k, n, n) / n ** 0.5")
        logits = f'jnp.einsum("bqi,bki->bqk", {h} @ {q}, {h} @ {k}) * n ** -0.5'
        s = writer.value(logits, "-", -0.5, -0.5, "s").name
        h = writer.value(f"nn.softmax({s}) @ {h}", "s").name
        kernel, self.kernel = param("normal(k, n, n) / n ** 0.5")
        h = writer.value(f"nn.relu({h} @ ({kernel} + 0.3 * normal(key, n, n)))", "s").name
        head, _ = param("normal(k, n, C) / n ** 0.5")
        y = writer.value(f"{h} @ {head}", "-", -0.5, 0.0, "y").name
        writer.line(f"return {y}")
        self.program = writer.program("planted")


@pytest.fixture
def planted(soundness):
    return Planted(soundness.Writer(random.Random(0)))


def test_the_planted_program_is_right_without_a_fault(soundness, rounds, planted):
    assert soundness.run(planted.program, 0, rounds).outcome == "right"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        pytest.param(lambda kernel: {"roles": {kernel: "input"}}, 5, id="a kernel's role"),
        pytest.param(lambda kernel: {"corrections": {"readout": False}}, 6, id="a readout's factor"),
        pytest.param(lambda kernel: {"corrections": {"attention": False}}, 3, id="the logits' factor"),
        pytest.param(lambda kernel: {"corrections": {"scale": False}}, 5, id="the noise's factor"),
    ],
)
def test_a_fault_in_the_reading_is_found(soundness, rounds, planted, monkeypatch, fault, line):
    right, options = mujax.mup_init, fault(planted.kernel)
    monkeypatch.setattr(mujax, "mup_init", lambda *args: right(*args, **options))
    result = soundness.run(planted.program, 0, rounds)
    assert result.outcome == "failure"
    assert f"(line {line})" in result.wrong[0]


def test_a_finding_explains_what_comes_after_it_and_nothing_before(soundness, planted):
    at = {tap.line: tap for tap in planted.program.taps}
    wrong = [soundness.Wrong(at[line].name, line, "size", 0.5, 0.0, (0.0, 0.0)) for line in (3, 5)]

    class Finding:
        where = f"{planted.program.file}:5"

    assert soundness.silent(planted.program, wrong, [Finding], []) == wrong[:1]
    assert soundness.silent(planted.program, wrong[1:], [Finding], []) == []

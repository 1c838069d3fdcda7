"""Random programs, read and measured: what is claimed holds over widths, or a finding names the place.

The programs and the measurement are those of `benchmarks/soundness.py`, which has the details. Here each
program is measured at two widths with one seed first, and as there if it looks wrong. Three hundred take
about two minutes of CPU time. Left out, as they take long: images and convolutions, programs of
more than seven parameters, and initialisers with a mean, which are sampled.
"""

import importlib.util
import itertools
import pathlib
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mujax

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
PROGRAMS, AT_ONCE = 300, 25


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
        result = soundness.run(program, number, (*rounds, *soundness.ROUNDS[2:]))
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


def routed(writer):
    """A program in which each token goes to the expert with the largest logit."""
    writer.steps.extend((line, "line") for line in range(2, 8))
    table, router, experts, head = (
        writer.param(init)
        for init in (
            "normal(k, V, n)",
            "normal(k, n, 3) / n ** 0.5",
            "normal(k, 3, n, n) / n ** 0.5",
            "normal(k, n, C) / n ** 0.5",
        )
    )
    # Each parameter belongs to the next measured value after its use.
    table, router, experts, head = ((text, text[3:-2]) for text in (table, router, experts, head))
    writer._fresh = [table[1]]
    h = writer.value(f"{table[0]}[tokens]", "s").name
    writer.belong([router[1]])
    s = writer.value(f"{h} @ {router[0]}", "-", -0.5, 0.0, "s").name
    writer.belong([experts[1]])
    out = f'jnp.einsum("bti,btio->bto", {h}, {experts[0]}[{s}.argmax(-1)])'
    h = writer.value(out, "s", 0.0, -0.5).name
    writer.belong([head[1]])
    y = writer.value(f"{h} @ {head[0]}", "-", -0.5, 0.0, "y").name
    writer.line(f"return {y}")
    return writer.program("routed")


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


def test_choices_are_no_faults_and_what_is_chosen_by_is_measured(soundness, rounds, monkeypatch):
    program = routed(soundness.Writer(random.Random(0)))
    assert soundness.run(program, 0, rounds).outcome == "right"
    right = mujax.mup_init
    monkeypatch.setattr(mujax, "mup_init", lambda *args: right(*args, corrections={"readout": False}))
    result = soundness.run(program, 0, rounds)
    assert result.outcome == "failure"
    assert "(line 3)" in result.wrong[0]


def test_what_does_not_depend_on_a_changed_input_is_the_same_as_computed_again(soundness):
    def function(a, b):
        name = soundness._programs.checkpoint_name
        c = name(jnp.tanh(a), "tap c") @ name(a * b, "tap d")
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ c), None), b, None, length=2)[0] + c

    rng = np.random.default_rng(0)
    a, b, other = (rng.normal(size=(3, 3)).astype(np.float32) for _ in range(3))
    program = jax.make_jaxpr(function)(a, b)
    remembers = soundness.Evaluator(program)
    remembers.start()
    remembers([a, b])
    for args in ([a, b], [a, other], [other, b], [other, other]):
        fresh = soundness.Evaluator(program)
        np.testing.assert_array_equal(remembers(args)[0], fresh(args)[0])
        for ours, theirs in zip(*(e.taps(args, ["tap c", "tap d"]) for e in (remembers, fresh)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_constant_of_the_width_is_undone_by_another_if_nothing_after_it_is_wrong(soundness):
    writer = soundness.Writer(random.Random(0))
    writer.steps.extend((line, "line") for line in range(2, 5))
    grown = writer.value("x[:, :1] * n ** 0.5", "h").name
    back = writer.value(f"{grown} / n ** 0.5", "h").name
    writer.line(f"return {writer.value(f'jnp.tanh({back})', 'h').name}")
    program = writer.program("constants")
    wrong = [soundness.Wrong(tap.name, tap.line, "size", 0.5, 0.0, (0.0, 0.0)) for tap in program.taps]
    assert soundness.silent(program, wrong[:1], [], []) == []
    assert soundness.silent(program, wrong[:2], [], []) == wrong[:2]
    assert soundness.silent(program, wrong[1:2], [], []) == wrong[1:2]


@pytest.mark.parametrize(("slope", "lasts"), [(0.5, True), (0.45, True), (0.2, False), (0.0, False)])
def test_a_slope_that_halves_is_no_power_of_the_width(soundness, slope, lasts):
    before, now = (soundness.Wrong("h", 2, "size", s, 0.02, (0.0, 0.0)) for s in (0.5, slope))
    assert soundness.lasting([now], [before], soundness.LAST) == ([now] if lasts else [])
    # What was right before is no better for it; what comes after is not judged.
    for line, judged in ((2, True), (3, lasts)):
        new = soundness.Wrong("h", line, "w", 0.3, 0.02, (0.0, 0.0))
        assert (new in soundness.lasting([now, new], [before], soundness.LAST)) == judged


@pytest.mark.parametrize(("share", "line"), [(0.02, np.inf), (0.3, 3)])
def test_a_softmax_that_few_entries_dominate_is_not_judged(soundness, share, line):
    writer = soundness.Writer(random.Random(0))
    h = writer.value("x", "h").name
    writer.line(f"return {writer.value(f'{h} * nn.softmax({h}, -1)', 'h').name}")
    assert soundness._concentrated(writer.program("softmax"), np.full((2, 1, 2), share)) == line


def test_a_finding_explains_what_comes_after_it_and_nothing_before(soundness, planted):
    at = {tap.line: tap for tap in planted.program.taps}
    wrong = [soundness.Wrong(at[line].name, line, "size", 0.5, 0.0, (0.0, 0.0)) for line in (3, 5)]

    class Finding:
        where = f"{planted.program.file}:5"
        message = "it grows"

    class WithStart(Finding):
        message = f"it grows (the growth starts at {planted.program.file}:3), and so on"

    assert soundness.silent(planted.program, wrong, [Finding], []) == wrong[:1]
    assert soundness.silent(planted.program, wrong, [WithStart], []) == []
    assert soundness.silent(planted.program, wrong[1:], [Finding], []) == []

    # Its gradients reach what is before it: changes may be too small, and sizes may not.
    for what, explained in (("w", True), ("size", False)):
        small = soundness.Wrong(at[3].name, 3, what, -0.5, 0.0, (0.0, 0.0))
        assert soundness.silent(planted.program, [small, wrong[1]], [Finding], []) == (
            [] if explained else [small]
        )
    assert soundness.silent(planted.program, [small], [Finding], []) == [small]

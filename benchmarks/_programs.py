"""Random programs for `soundness.py`: networks as Python source, of parameters, data, noise and constants.

A program is a list of steps. A step turns one activation into another and writes a few lines of source, in
which `tap("h3", ...)` marks the values whose sizes are to be measured. `generate(seed, number)` always
returns the same program: all randomness comes from Python's `random`, not from JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import mujax

BATCH, LENGTH, FEATURES, CLASSES, VOCABULARY, SIDE = 8, 4, 8, 8, 11, 3
BASE: Final = 32
PREFIX: Final = "/soundness/"
"""Of the file names of programs, which findings give as their places."""


def inputs() -> tuple[Any, ...]:
    """The inputs of every program: features, tokens, images, a key and a number."""
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(BATCH, FEATURES)), jnp.float32),
        jnp.asarray(rng.integers(VOCABULARY, size=(BATCH, LENGTH))),
        jnp.asarray(rng.normal(size=(BATCH, SIDE, SIDE, 2)), jnp.float32),
        jax.random.key(7),
        jnp.float32(0.7),
    )


SIGNATURE: Final = "p, x, tokens, img, key, t"


@dataclasses.dataclass(frozen=True)
class Var:
    """An activation.

    Attributes:
        name: its name in the source.
        kind: `"h"` (batch, width), `"s"` (batch, length, width), `"i"` (batch, side, side, width) or `"f"`
            (batch, classes).
        lo: by which power of the width it may fall at initialisation.
    """

    name: str
    kind: str
    lo: float = 0.0


@dataclasses.dataclass(frozen=True)
class Tap:
    """A value whose size is measured.

    Attributes:
        name: its name in the source.
        line: the line of the body, from 1.
        lo: the allowed power of the width at initialisation, down to.
        change_lo: the same for the change that its own parameters make.
        params: the parameters that come in between this tap and the one before.
    """

    name: str
    line: int
    lo: float
    change_lo: float
    params: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A network as source.

    Attributes:
        name: of the program.
        params: the initialiser of each parameter, as an expression of `k` (a key) and `n` (the width).
        body: the lines of the function.
        taps: the values to measure.
        steps: the line on which each step begins, and its name.
        parts: the steps that can be left out: their first and last line in `body`, from 0, the activation
            that they take and the one that they make.
        slower: parameters whose changes may fall by a further power of the width in the first step, since
            their gradient's other factor does.
    """

    name: str
    params: dict[str, str]
    body: tuple[str, ...]
    taps: tuple[Tap, ...]
    steps: tuple[tuple[int, str], ...]
    parts: tuple[tuple[int, int, str, str], ...] = ()
    slower: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of its file in tracebacks and findings."""
        return f"{PREFIX}{self.name}.py"

    @property
    def has_means(self) -> bool:
        """Whether the initial values of a kernel have a mean that is not zero."""
        means = ("jnp.full", "0.5 / ", "nn.initializers.uniform")
        return any(init.startswith(means) for init in self.params.values())

    def source(self) -> str:
        """The program, to read and to run."""
        # The first line of the body is line 1 of the file, so that findings name lines of `body`.
        head = f"def apply(n, tap, {SIGNATURE}):  # {self.name}"
        params = [f"    {name!r}: lambda k, n: {init}," for name, init in self.params.items()]
        return "\n".join([head, *("    " + line for line in self.body), "PARAMS = {", *params, "}"])

    def step_of(self, line: int) -> tuple[int, str]:
        """The step that a line belongs to: its first line and its name."""
        return max((step for step in self.steps if step[0] <= line), default=(0, "?"))

    def without(self, part: tuple[int, int, str, str]) -> Program:
        """The program without one of its `parts`."""
        first, last, before, after = part
        gone = last - first

        def renamed(text: str) -> str:
            return re.sub(rf"\b{after}\b", before, text)

        body = (*self.body[:first], *(renamed(line) for line in self.body[last:]))

        def moved(number: int) -> int:
            return number - gone if number >= last else number

        text = "\n".join(body)
        params = {name: init for name, init in self.params.items() if f'p["{name}"]' in text}
        return Program(
            self.name,
            params,
            body,
            tuple(
                dataclasses.replace(
                    tap,
                    line=moved(tap.line - 2) + 2,
                    params=tuple(name for name in tap.params if name in params),
                )
                for tap in self.taps
                if not first <= tap.line - 2 < last
            ),
            tuple((moved(line - 2) + 2, name) for line, name in self.steps if not first <= line - 2 < last),
            tuple(
                (moved(a), moved(b), before if c == after else c, d)
                for a, b, c, d in self.parts
                if not (first <= a and b <= last)
            ),
            self.slower,
        )

    def model(self, width: int) -> mujax.Functional:
        """The network at a width."""
        scope: dict[str, Any] = {**SCOPE}
        exec(compile(self.source(), self.file, "exec"), scope)
        makers = scope["PARAMS"]

        def init(key: Any, *_: Any) -> dict[str, Any]:
            return {
                name: make(jax.random.fold_in(key, number), width)
                for number, (name, make) in enumerate(makers.items())
            }

        def apply(*args: Any) -> Any:
            return scope["apply"](width, lambda name, value: checkpoint_name(value, "tap " + name), *args)

        return mujax.Functional(init, apply)


def normal(key: Any, *shape: int) -> Any:
    return jax.random.normal(key, shape)


SCOPE: Final[dict[str, Any]] = {
    "jax": jax, "jnp": jnp, "lax": lax, "nn": jax.nn, "np": np, "normal": normal,
    "B": BATCH, "T": LENGTH, "C": CLASSES, "V": VOCABULARY, "F": FEATURES,
}  # fmt: skip


class Writer:
    """Writes one program."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.params: dict[str, str] = {}
        self.body: list[str] = []
        self.taps: list[Tap] = []
        self.steps: list[tuple[int, str]] = []
        self.parts: list[tuple[int, int, str, str]] = []
        self._fresh: list[str] = []
        self._count = 0
        self.quiet = 0
        self.slower: dict[str, float] = {}
        self.narrow: set[str] = set()

    def name(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count}"

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def param(self, init: str, letter: str = "w") -> str:
        """A parameter by its initialiser's expression; returns the expression that reads it."""
        name = self.name(letter)
        self.params[name] = init
        self._fresh.append(name)
        return f'p["{name}"]'

    @contextlib.contextmanager
    def apart(self) -> Iterator[list[str]]:
        """Collects the parameters that are made inside: they do not belong to the next measured value."""
        before, self._fresh, found = self._fresh, [], []
        yield found
        found += self._fresh
        self._fresh = before

    def belong(self, params: Iterable[str]) -> None:
        """Gives parameters that were kept apart to the next measured value."""
        self._fresh += params

    def low_rank(self) -> list[str]:
        """The parameters of the next measured value that read a fixed number of directions out."""
        return [one for one in self._fresh if "n, 3)" in self.params[one] or "n, 3,)" in self.params[one]]

    @property
    def is_narrow(self) -> bool:
        """Whether the kernel of the next measured value reads out and in again."""
        return not self.narrow.isdisjoint(self._fresh)

    def reads_out(self, parameter: str) -> None:
        """Notes that the product with this parameter falls at the start, as that of a readout does."""
        self.narrow.add(parameter[3:-2])

    def after_fall(self, parameter: str) -> str:
        """Notes that what this parameter multiplies falls at the start, as the output of a readout does."""
        self.slower[parameter[3:-2]] = -0.5
        return parameter

    def gains_after_fall(self) -> None:
        """The same for the gains of the kernels of which no product is measured yet."""
        for one in self._fresh:
            if one[0] in "gs":
                self.slower.setdefault(one, -0.5)

    def dense(self, *shape: str, fan_in: str | None = None, plain: bool = False) -> str:
        """A parameter of this shape as the weights of a layer: with a usual initialiser."""
        fan_in = shape[-2] if fan_in is None else fan_in
        dims = ", ".join(shape)
        lecun = f"normal(k, {dims}) / ({fan_in}) ** 0.5"
        if plain or self.chance(0.6):
            return self.param(lecun)
        return self.param(
            self.pick(
                f"0.15 * normal(k, {dims})",
                f"jax.random.uniform(k, ({dims},), minval=-1, maxval=1) * (3 / ({fan_in})) ** 0.5",
                f"nn.initializers.truncated_normal(0.2)(k, ({dims},))",
                f"nn.initializers.glorot_normal()(k, ({dims},))",
                f"0.5 / ({fan_in}) + normal(k, {dims}) / ({fan_in}) ** 0.5",
                f"nn.initializers.uniform(0.2)(k, ({dims},))",
                f"nn.initializers.he_uniform()(k, ({dims},))",
                f"jnp.full(({dims},), 0.03) + normal(k, {dims}) / ({fan_in}) ** 0.5",
            )
        )

    def line(self, text: str) -> None:
        self.body.extend(textwrap.dedent(text).strip("\n").split("\n"))

    def let(self, expression: str, letter: str = "a") -> str:
        """A line that names a value which is not measured."""
        name = self.name(letter)
        self.line(f"{name} = {expression}")
        return name

    def value(
        self, expression: str, kind: str, lo: float = 0.0, change_lo: float | None = None, letter: str = "h"
    ) -> Var:
        """A line that names a value which is measured."""
        name = self.name(letter)
        self.line(f'{name} = tap("{name}", {expression})')
        fresh, self._fresh = tuple(self._fresh), []
        if not self.narrow.isdisjoint(fresh):
            lo -= 0.5
        if change_lo is not None and change_lo > lo:
            # Gains of a kernel that reads out change its product by as much as that is at the start.
            for one in fresh:
                if one[0] in "gs":
                    self.slower.setdefault(one, lo - change_lo)
        self.taps.append(Tap(name, len(self.body) + 1, lo, lo if change_lo is None else change_lo, fresh))
        return Var(name, kind, lo)

    def program(self, name: str) -> Program:
        return Program(
            name,
            self.params,
            tuple(self.body),
            tuple(self.taps),
            tuple(self.steps),
            tuple(self.parts),
            self.slower,
        )


Step = Callable[[Writer, Var], Var]
STEPS: Final[dict[str, tuple[Step, str, float]]] = {}
"""By name: the step, the kinds of activation that it takes, and its weight."""
STARTS: Final[dict[str, tuple[Callable[[Writer], Var], float]]] = {}
ENDS: Final[dict[str, tuple[Callable[[Writer, Var], str], float]]] = {}


def step(kinds: str, weight: float = 1.0) -> Callable[[Step], Step]:
    def register(function: Step) -> Step:
        STEPS[function.__name__] = (function, kinds, weight)
        return function

    return register


def start(weight: float = 1.0) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        STARTS[function.__name__] = (function, weight)
        return function

    return register


def end(weight: float = 1.0) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        ENDS[function.__name__] = (function, weight)
        return function

    return register


ACTIVATIONS: Final = (
    "nn.relu({})", "nn.gelu({})", "jnp.tanh({})", "nn.silu({})", "nn.softplus({})", "nn.leaky_relu({})",
    "nn.elu({})", "jnp.sin({})", "nn.sigmoid({})", "nn.hard_tanh({})", "3 * jnp.tanh({} / 3)", "jnp.abs({})",
    "lax.erf({})", "nn.relu({}) ** 2", "jnp.where({0} > 0, {0}, 0.1 * {0})", "jnp.maximum({}, 0)",
    "nn.relu6({})",
    "jnp.clip({}, -1, 1)", "nn.celu({})", "jnp.square(nn.relu({}))", "nn.log_sigmoid({})", "jnp.arctan({})",
)  # fmt: skip


def activation(g: Writer, text: str, chance: float = 0.75) -> str:
    return g.pick(*ACTIVATIONS).format(text) if g.chance(chance) else text


def after(text: str, lo: float) -> float:
    """By which power of the width a function falls whose argument falls by `lo`."""
    return 2 * lo if text.endswith("** 2") or text.startswith("jnp.square(") else lo


# ---- kernels ---------------------------------------------------------------------------------------------


def stored(g: Writer, rows: str, cols: str) -> str:
    """A (rows, cols) kernel as an expression of parameters in some layout."""
    way = g.rng.randrange(14)
    if way == 0:
        return g.dense(cols, rows, fan_in=rows) + ".T"
    if way == 1:
        return f"{g.dense(rows, '4', f'({cols}) // 4', fan_in=rows)}.reshape({rows}, {cols})"
    if way == 2:
        return f"{g.dense('4', f'({rows}) // 4', cols, fan_in=rows)}.reshape({rows}, {cols})"
    if way == 3:
        a, b = (g.dense(rows, f"({cols}) // 2", fan_in=rows) for _ in range(2))
        return f"jnp.concatenate([{a}, {b}], 1)"
    if way == 4:
        a, b = (g.dense(f"({rows}) // 2", cols, fan_in=rows) for _ in range(2))
        return f"jnp.concatenate([{a}, {b}], 0)"
    if way == 5:
        both = g.dense(rows, f"2 * ({cols})", fan_in=rows)
        return f"jnp.split({both}, 2, axis=1)[{g.pick(0, 1)}]"
    if way == 6:
        return f"{g.dense('3', rows, cols, fan_in=rows)}[{g.pick(0, 1, 2)}]"
    if way == 7:
        a, b = g.dense(rows, "3", fan_in=rows), g.after_fall(g.dense("3", cols, fan_in="3"))
        g.reads_out(a)
        return f"({a} @ {b})"
    if way == 8:
        w, a, b = (
            g.dense(rows, cols),
            g.dense(rows, "3", fan_in=rows),
            g.after_fall(g.dense("3", cols, fan_in="3")),
        )
        return f"({w} + 0.5 * {a} @ {b})"
    if way == 9:
        a, b = g.dense(rows, cols), g.dense(rows, cols)
        alpha = g.param("jnp.float32(0.3)", "s")
        return f"(nn.sigmoid({alpha}) * {a} + (1 - nn.sigmoid({alpha})) * {b})"
    return g.dense(rows, cols)


def _constant(g: Writer, rows: str, cols: str) -> str:
    """An array that is no parameter, of the kernel's size or less, with entries of order one."""
    mask = f"jnp.asarray(np.random.default_rng(1).random(({rows}, {cols})) > 0.5, jnp.float32)"
    # Of one density at every width, whichever side grows, and in both halves of a kernel.
    triangle = f"jnp.tri({rows}, {cols}, ({cols}) // 2)" if rows != "F" else f"(jnp.arange({cols}) % 2.0)"
    return g.pick(
        mask,
        f"normal(key, {rows}, {cols})",
        f"jax.random.bernoulli(key, 0.5, ({rows}, {cols}))",
        "t",
        triangle,
        f"jax.random.bernoulli(key, 0.5, ({rows}, 1))",
        "(1 + x[0, 0] ** 2)",
    )


FUNCTIONS: Final = (
    "jnp.tanh({})", "jnp.sin({})", "lax.erf({})", "jnp.expm1({})", "jnp.arctan({})", "jnp.sinh({})",
    "nn.softplus({})", "jnp.abs({})", "nn.relu({})", "jnp.square({})", "nn.softmax({}, 0)",
    "nn.softmax({}, 1)",
    "nn.sigmoid({})", "jnp.exp({})", "({} ** 3)", "jnp.round(16 * {}) / 16", "jnp.clip({}, -1, 1)",
    "jnp.sign({})", "({0} / (1 + jnp.abs({0})))", "nn.silu({})", "nn.leaky_relu({})", "jnp.cos({})",
    "jnp.maximum({}, 0.05)", "jnp.log1p(jnp.abs({}))", "jnp.sqrt(jnp.abs({}))", "nn.gelu({})",
    "jnp.arcsinh({})",
    "(nn.softplus({}) - 0.6931472)", "jnp.where({0} > 0, {0}, 0.0)",
    "jnp.where(jnp.abs({0}) > 0.02, {0}, 0.0)",
)  # fmt: skip


def changed(g: Writer, kernel: str, rows: str, cols: str) -> str:
    """One operation on a (rows, cols) kernel before its product."""
    way = g.rng.randrange(24)
    w = kernel if kernel.isidentifier() else g.let(kernel, "k")
    match way:
        case 0 | 1:
            factor = _constant(g, rows, cols)
            if factor.startswith("normal("):
                # Of random signs, which differ from one entry to the next, a low-rank kernel is none.
                for one in g.low_rank():
                    g.slower.setdefault(one, -0.5)
            return f"({w} * {factor})"
        case 2:
            return f"jnp.where({_constant(g, rows, cols)} > 0.3, {w}, 0.0)"
        case 3:
            return f"({w} + {g.pick('0.01', '0.1', '0.3')} * {_constant(g, rows, cols)})"
        case 4:
            return f"({w} * (1 + 0.1 * {_constant(g, rows, cols)}))"
        case 5 | 6 | 7:
            return g.pick(*FUNCTIONS).format(w)
        case 8:
            gain = g.param(f"jnp.ones(({g.pick(cols, rows + ', 1')},))", "g")
            return f"({w} * {gain})"
        case 9:
            axis = g.pick(0, 1)
            gain = g.param(f"jnp.ones(({cols},))", "g")
            return f"({gain} * {w} / jnp.linalg.norm({w}, axis={axis}, keepdims=True))"
        case 10:
            return f"(({w} - {w}.mean(0)) / ({w}.std(0) + 1e-5) / ({rows}) ** 0.5)"
        case 11:
            s = g.let(f"jnp.abs({w}).max({g.pick('', '0, keepdims=True')}) / 127", "q")
            return f"({w} + lax.stop_gradient(jnp.clip(jnp.round({w} / {s}), -128, 127) * {s} - {w}))"
        case 12:
            return f"({w} + lax.stop_gradient(jnp.round({w} / t * 64) * t / 64 - {w}))"
        case 13:
            return f"{w}.astype(jnp.bfloat16).astype(jnp.float32)"
        case 14:
            return f"({w} - {w}.mean({g.pick('', '0', '1, keepdims=True')}))"
        case 15:
            factor = g.pick("2.0", "0.5", f"({rows}) ** -0.5", f"({rows}) ** 0.5", f"jnp.sqrt({cols})")
            return f"({w} * {factor})"
        case 16:
            other = g.dense(rows, cols)
            form = g.pick("lax.complex({0}, {1})", "({0} + 1j * {1})")
            z = g.let(form.format(w, other), "z")
            return g.pick(
                f"({z} * jnp.exp(1j * t)).real", f"({z} * (0.6 + 0.8j)).imag", f"jnp.conj({z}).real"
            )
        case 17:
            return f"jnp.minimum({w}, t)"
        case 18:
            scale = g.param("jnp.float32(1.0)", "s")
            return f"({w} * {scale})"
        case 19:
            scale = g.param("jnp.float32(0.5)", "s")
            return f"({w} * jnp.exp({scale}))"
        case 20:
            frozen = f"jnp.asarray(np.random.default_rng(2).normal(size=({rows}, {cols})), jnp.float32)"
            return f"({w} + {frozen} / ({rows}) ** 0.5)"
        case 21:
            return f"({w} / jnp.sqrt(jnp.mean({w} ** 2)) / ({rows}) ** 0.5)"
        case 22:
            return f"lax.stop_gradient({w})" if g.chance(0.2) else f"({w}[::-1])"
        case _:
            mask = g.param(f"normal(k, {rows}, {cols})", "m")
            return f"({w} * nn.sigmoid({mask}))"


def kernel(g: Writer, rows: str, cols: str) -> str:
    """A (rows, cols) kernel built by a chain of operations."""
    out = stored(g, rows, cols)
    for _ in range(g.rng.choices((0, 1, 2), (0.6, 0.3, 0.1))[0]):
        out = changed(g, out, rows, cols)
    return out


def bias(g: Writer, size: str) -> str:
    if g.chance(0.5):
        return ""
    return " + " + g.param(g.pick(f"jnp.zeros(({size},))", f"0.3 * normal(k, {size})"), "b")


# ---- starts ----------------------------------------------------------------------------------------------


@start(2)
def features(g: Writer) -> Var:
    w = kernel(g, "F", "n")
    return g.value(f"x @ {w}{bias(g, 'n')}", "h")


@start(2)
def tokens(g: Writer) -> Var:
    table = g.param(g.pick("normal(k, V, n)", "0.5 * normal(k, V, n)", "normal(k, V, n) / n ** 0.5"), "e")
    way = g.rng.randrange(7)
    if way == 0:
        return g.value(f"nn.one_hot(tokens, V) @ {table}", "s")
    if way == 1:
        return g.value(f"jnp.take({table}, tokens, axis=0) * n ** 0.5", "s")
    if way == 2:
        positions = g.param("0.5 * normal(k, T, n)", "e")
        return g.value(f"{table}[tokens] + {positions}", "s")
    if way == 3:
        return g.value(f"jnp.where(jnp.arange(V)[:, None] > 0, {table}, 0.0)[tokens]", "s")
    if way == 4:
        return g.value(f"({table} * jax.random.bernoulli(key, 0.8, (V, 1)))[tokens]", "s")
    if way == 5:
        g.line(
            "a0 = jnp.asarray([[np.sin(i / 10 ** (j / n)) for j in range(n)] for i in range(T)], jnp.float32)"
        )
        return g.value(f"{table}[tokens] + a0", "s")
    return g.value(f"{table}[tokens]", "s")


@start(1)
def image(g: Writer) -> Var:
    w = g.param("normal(k, 3, 3, 2, n) / 18 ** 0.5")
    return g.value(
        f'lax.conv_general_dilated(img, {w}, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))', "i"
    )


@start(0.7)
def number_features(g: Writer) -> Var:
    """Each feature by itself, as in tabular transformers; or Fourier features of a number."""
    if g.chance(0.5):
        w, b = g.param("normal(k, T, n)"), g.param("0.3 * normal(k, T, n)", "b")
        return g.value(f"x[:, :T, None] * {w} + {b}", "s")
    w = g.param("normal(k, 8, n) / 8 ** 0.5")
    a = g.let("jnp.concatenate([jnp.sin(x[:, :4] * 2), jnp.cos(x[:, :4] * 2)], -1)")
    return g.value(f"{a} @ {w}", "h")


@start(0.5)
def learned_queries(g: Writer) -> Var:
    """Latent vectors that are parameters, and attend to the data."""
    q, w = g.param("normal(k, T, n)", "e"), g.param("normal(k, F, n) / F ** 0.5")
    a = g.let(f"x @ {w}")
    return g.value(f"{q} + {a}[:, None]", "s")


# ---- steps -----------------------------------------------------------------------------------------------


@step("hsi", 5)
def dense(g: Writer, v: Var) -> Var:
    w = kernel(g, "n", "n")
    if g.chance(0.3):
        w = g.let(w, "k")
        ways = {"h": ['jnp.einsum("bi,io->bo", {h}, {w})', "jax.vmap(lambda r: r @ {w})({h})"]}
        ways["s"] = [
            'jnp.einsum("bti,io->bto", {h}, {w})',
            "lax.dot_general({h}, {w}, (((2,), (0,)), ((), ())))",
        ]
        ways["i"] = ['jnp.einsum("bhwi,io->bhwo", {h}, {w})', "jnp.tensordot({h}, {w}, 1)"]
        product = g.pick(*ways[v.kind]).format(h=v.name, w=w)
    else:
        product = f"{v.name} @ {w}"
    out = g.value(f"{product}{bias(g, 'n')}", v.kind, v.lo)
    if not g.chance(0.7):
        return out
    text = activation(g, out.name, 1)
    return g.value(text, v.kind, after(text, out.lo))


@step("hsi", 2)
def mlp(g: Writer, v: Var) -> Var:
    m = g.pick("2 * n", "n // 2", "n + 16", "4 * n")
    up = kernel(g, "n", m)
    first = g.is_narrow
    known = len(g.narrow)
    down = kernel(g, m, "n")
    second = len(g.narrow) > known
    a = g.let(f"{v.name} @ {up}{bias(g, m)}")
    text = activation(g, a, 1)
    # `value` takes off a half where either of the two reads out.
    lo = after(text, v.lo - 0.5 * first) + 0.5 * (first and not second)
    return g.value(f"{text} @ {down}{bias(g, 'n')}", v.kind, lo)


@step("hsi", 2)
def gated(g: Writer, v: Var) -> Var:
    way = g.rng.randrange(6)
    lo = 2 * v.lo
    if way == 0:
        a = g.let(f"{v.name} @ {kernel(g, 'n', '2 * n')}")
        # Both halves fall where the kernel reads out.
        lo -= 0.5 * g.is_narrow
        return g.value(f"nn.silu({a}[..., :n]) * {a}[..., n:]", v.kind, lo)
    if way == 1:
        a, b = g.let(f"{v.name} @ {kernel(g, 'n', 'n')}"), g.let(f"{v.name} @ {kernel(g, 'n', 'n')}")
        return g.value(f"nn.sigmoid({a}) * {b}", v.kind, lo)
    if way == 2:
        a = g.let(f"{v.name} @ {kernel(g, 'n', '2 * n')}")
        return g.value(f"nn.glu({a}, -1)", v.kind, lo)
    if way == 3:
        gain = g.param("normal(k, n)", "g")
        return g.value(f"{v.name} * nn.sigmoid({gain})", v.kind, v.lo)
    if way == 4:
        w = g.param("normal(k, F, n) / F ** 0.5")
        shape = {"h": "", "s": "[:, None]", "i": "[:, None, None]"}[v.kind]
        return g.value(f"{v.name} * (1 + jnp.tanh(x @ {w}){shape})", v.kind, v.lo)
    w = kernel(g, "n", "n")
    a = g.let(f"nn.sigmoid({v.name} @ {w})")
    return g.value(f"{a} * {v.name} + (1 - {a}) * jnp.tanh({v.name})", v.kind, lo)


@step("hsi", 3)
def norm(g: Writer, v: Var) -> Var:
    h, way = v.name, g.rng.randrange(9)
    gain = g.param(g.pick("jnp.ones((n,))", "1 + 0.2 * normal(k, n)"), "g") if g.chance(0.7) else "1.0"
    shift = bias(g, "n")
    if way <= 1:
        a = g.let(f"{h} - {h}.mean(-1, keepdims=True)")
        return g.value(f"{a} * lax.rsqrt(({a} ** 2).mean(-1, keepdims=True) + 1e-6) * {gain}{shift}", v.kind)
    if way == 2:
        return g.value(
            f"{h} / jnp.sqrt(jnp.mean({h} ** 2, -1, keepdims=True) + 1e-6) * {gain}{shift}", v.kind
        )
    if way == 3:
        return g.value(f"nn.standardize({h}, axis=-1) * {gain}{shift}", v.kind)
    if way == 4:
        return g.value(
            f"n ** 0.5 * {h} / jnp.linalg.norm({h}, axis=-1, keepdims=True) * {gain}{shift}", v.kind
        )
    if way == 5:
        return g.value(f"{h} / (jnp.linalg.norm({h}, axis=-1, keepdims=True) + 1e-6) * {gain}{shift}", v.kind)
    if way == 6:
        axes = {"h": "0", "s": "(0, 1)", "i": "(0, 1, 2)"}[v.kind]
        a = g.let(f"({h} - {h}.mean({axes})) / ({h}.std({axes}) + 1e-3)")
        return g.value(f"{a} * {gain}{shift}", v.kind, min(v.lo, 0.0))
    if way == 7:
        groups = g.pick("4, n // 4", "n // 8, 8")
        a = g.let(f"{h}.reshape(*{h}.shape[:-1], {groups})")
        b = g.let(f"({a} - {a}.mean(-1, keepdims=True)) / jnp.sqrt({a}.var(-1, keepdims=True) + 1e-5)")
        return g.value(f"{b}.reshape({h}.shape) * {gain}{shift}", v.kind)
    # Per-channel scales of data, as stored statistics are.
    a = g.let("jnp.asarray(np.linspace(0.5, 1.5, n), jnp.float32)")
    return g.value(f"({h} - 0.1 * {a}) / jnp.sqrt({a}) * {gain}{shift}", v.kind)


@step("hsi", 3)
def residual(g: Writer, v: Var) -> Var:
    inner = v
    for _ in range(g.pick(1, 1, 2)):
        inner = apply_step(g, inner, same=True)
    scale = g.pick("", "", "0.5 * ", "layer", "rezero", "gain")
    if scale == "layer":
        scale = g.param("0.5 * jnp.ones((n,))", "g") + " * "
    elif scale == "rezero":
        scale = g.param("jnp.float32(0.4)", "s") + " * "
    elif scale == "gain":
        scale = f"(1 + {g.param('jnp.zeros((n,))', 'g')}) * "
    form = g.pick("{h} + {s}{f}", "({h} + {s}{f}) / 2 ** 0.5", "jnp.add({h}, {s}{f})", "sum([{h}, {s}{f}])")
    # What falls may still be the larger part at these widths.
    lo = min(v.lo, inner.lo)
    return g.value(form.format(h=v.name, s=scale, f=inner.name), v.kind, lo)


@step("s", 4)
def attention(g: Writer, v: Var) -> Var:
    h, lo, of_logits = v.name, v.lo, 2 * v.lo - 0.5
    heads, size = g.pick(("4", "n // 4"), ("n // 8", "8"), ("1", "n"), ("2", "n // 2"))
    of_values: list[str] = []
    if g.chance(0.3):
        fused = g.let(f"{h} @ {kernel(g, 'n', '3 * n')}")
        parts = [f"{fused}[..., {i} * n:{i + 1} * n]" for i in range(3)]
        lo -= 0.5 * g.is_narrow
        of_logits = 2 * lo - 0.5
    elif g.chance(0.4):
        parts = [
            f'jnp.einsum("bti,ihd->bthd", {h}, {g.dense("n", heads, size, fan_in="n")})' for _ in range(3)
        ]
    else:
        parts = [f"{h} @ {kernel(g, 'n', 'n')}" for _ in range(2)]
        of_logits -= g.is_narrow
        with g.apart() as of_values:
            parts.append(f"{h} @ {kernel(g, 'n', 'n')}")
    q, k, u = (g.let(f"({part}).reshape(B, T, {heads}, {size})") for part in parts)
    if g.chance(0.2):
        q, k = (g.let(f"{a} / jnp.sqrt(({a} ** 2).mean(-1, keepdims=True) + 1e-6)") for a in (q, k))
    if g.chance(0.15):
        out = g.let(f"jax.nn.dot_product_attention({q}, {k}, {u})")
        if of_values:
            # A gain of the queries' or keys' kernel changes the logits by as much as they are, and the first
            # factor of one of low rank in a few directions, which the other operand is random to.
            g.gains_after_fall()
            for one in g.low_rank():
                g.slower.setdefault(one, -0.5)
        g.belong(of_values)
    else:
        way = g.rng.randrange(8)
        root = f"({size}) ** -0.5"
        if way <= 2:
            s = f'jnp.einsum("bqhd,bkhd->bhqk", {q}, {k}) * {root}'
        elif way == 3:
            s = f'jnp.einsum("bqhd,bkhd->bhqk", {q} * {root}, {k})'
        elif way == 4:
            s = f'jnp.einsum("bqhd,bkhd->bhqk", {q}, {k}) / ({size})'
        elif way == 5:
            s = f'jnp.einsum("bqhd,bkhd->bhqk", {q}, {k})'
        elif way == 6:
            s = f"({q}.swapaxes(1, 2) @ {k}.transpose(0, 2, 3, 1)) / jnp.sqrt({size})"
        else:
            temperature = g.param("jnp.float32(0.0)", "s")
            s = f'jnp.einsum("bqhd,bkhd->bhqk", {q}, {k}) * {root} * jnp.exp({temperature})'
        logits = g.value(s, "-", of_logits, of_logits, "s").name
        g.belong(of_values)
        if g.chance(0.3):
            logits = g.let(f"jnp.where(jnp.tri(T) > 0, {logits}, -1e9)")
        if g.chance(0.2):
            relative = g.param(f"0.3 * normal(k, {heads}, T, T)", "b")
            logits = g.let(f"{logits} + {relative}")
        weights = g.pick(
            "nn.softmax({})", "nn.softmax({})", "nn.softmax({})", "nn.sigmoid({})", "nn.relu({}) / T",
            "nn.softmax(5 * jnp.tanh({} / 5))", "{} / T",
        ).format(logits)  # fmt: skip
        if "softmax" not in weights and "sigmoid" not in weights:
            lo += of_logits
        out = g.let(f'jnp.einsum("bhqk,bkhd->bqhd", {weights}, {u})')
    if g.chance(0.3):
        w = g.dense(heads, size, "n", fan_in="n")
        return g.value(f'jnp.einsum("bthd,hdo->bto", {out}, {w})', "s", lo)
    return g.value(f"{out}.reshape(B, T, n) @ {kernel(g, 'n', 'n')}", "s", lo)


@step("s", 1)
def pooled(g: Writer, v: Var) -> Var:
    way = g.rng.randrange(6)
    if way == 5:
        w = g.param("normal(k, n) / n ** 0.5")
        a = g.let(f"nn.softmax({v.name} @ {w}, -1)")
        return g.value(f'jnp.einsum("bt,btn->bn", {a}, {v.name})', "h", v.lo)
    form = g.pick(
        "{}.mean(1)", "{}.max(1)", "{}.sum(1)", "{}[:, 0]", "{}.sum(1) / T ** 0.5", "nn.logsumexp({}, 1)"
    )
    return g.value(form.format(v.name), "h", v.lo)


@step("i", 3)
def convolution(g: Writer, v: Var) -> Var:
    way = g.rng.randrange(4)
    dims = '"SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")'
    if way == 0:
        w = g.param("normal(k, 3, 3, 1, n) / 3")
        return g.value(
            f"lax.conv_general_dilated({v.name}, {w}, (1, 1), {dims}, feature_group_count=n)", "i", v.lo
        )
    if way == 1:
        w = g.param("normal(k, 3, 3, n // 4, n) / (9 * n / 4) ** 0.5")
        return g.value(
            f"lax.conv_general_dilated({v.name}, {w}, (1, 1), {dims}, feature_group_count=4)", "i", v.lo
        )
    w = g.let(g.param("normal(k, 3, 3, n, n) / (9 * n) ** 0.5"), "k")
    if way == 2:
        change = g.pick(
            "{w} * jax.random.bernoulli(key, 0.5, {w}.shape)", "jnp.tanh({w})", "{w} * t",
            "({w} - {w}.mean((0, 1, 2))) / ({w}.std((0, 1, 2)) + 1e-5) / (9 * n) ** 0.5", "{w}[::-1]",
        )  # fmt: skip
        w = g.let(change.format(w=w), "k")
    out = g.value(f"lax.conv_general_dilated({v.name}, {w}, (1, 1), {dims})", "i", v.lo)
    if not g.chance(0.7):
        return out
    text = activation(g, out.name, 1)
    return g.value(text, "i", after(text, v.lo))


@step("i", 1)
def squeeze_excite(g: Writer, v: Var) -> Var:
    down, up = g.param("normal(k, n, 4) / n ** 0.5"), g.param("normal(k, 4, n) / 2")
    a = g.let(f"nn.relu({v.name}.mean((1, 2)) @ {down}) @ {up}")
    return g.value(f"{v.name} * nn.sigmoid({a})[:, None, None]", "i", v.lo, v.lo - 0.5)


@step("i", 1)
def spatial_mean(g: Writer, v: Var) -> Var:
    return g.value(
        g.pick("{}.mean((1, 2))", "{}.max((1, 2))", "{}.reshape(B, -1, n).mean(1)").format(v.name), "h", v.lo
    )


@step("i", 0.5)
def flat(g: Writer, v: Var) -> Var:
    w = g.dense("9 * n", "n")
    return g.value(f"{v.name}.reshape(B, -1) @ {w}", "h", v.lo)


@step("s", 1)
def mixer(g: Writer, v: Var) -> Var:
    """A product over the length, which does not grow."""
    w = g.param("normal(k, T, T) / 2")
    return g.value(f'jnp.einsum("btn,ts->bsn", {v.name}, {w})', "s", v.lo)


@step("s", 1)
def depthwise(g: Writer, v: Var) -> Var:
    w = g.param("normal(k, 3, n) / 3 ** 0.5")
    a = g.let(f"jnp.pad({v.name}, ((0, 0), (2, 0), (0, 0)))")
    return g.value(f"sum({a}[:, i:i + T] * {w}[i] for i in range(3))", "s", v.lo)


@step("s", 1)
def recurrence(g: Writer, v: Var) -> Var:
    w, u = kernel(g, "n", "n"), kernel(g, "n", "n")
    w, u = g.let(w, "k"), g.let(u, "k")
    body = g.pick(
        "jnp.tanh(c @ {w} + s @ {u})",
        "nn.sigmoid(s @ {w}) * c + jnp.tanh(s @ {u})",
        "0.5 * c + 0.5 * jnp.tanh(c @ {w} + s @ {u})",
    ).format(w=w, u=u)
    name = g.name("f")
    g.line(f"def {name}(c, s):\n    c = {body}\n    return c, c")
    return g.value(
        f"lax.scan({name}, jnp.zeros((B, n)), {v.name}.swapaxes(0, 1))[1].swapaxes(0, 1)", "s", v.lo
    )


@step("s", 0.5)
def linear_recurrence(g: Writer, v: Var) -> Var:
    """A diagonal state-space layer."""
    decay = g.param("normal(k, n)", "g")
    name = g.name("f")
    g.line(f"def {name}(c, s):\n    a = nn.sigmoid({decay})\n    c = a * c + (1 - a) * s\n    return c, c")
    return g.value(
        f"lax.scan({name}, jnp.zeros((B, n)), {v.name}.swapaxes(0, 1))[1].swapaxes(0, 1)", "s", v.lo
    )


@step("hsi", 2)
def layers(g: Writer, v: Var) -> Var:
    """A loop over a stack of kernels."""
    w = g.param("normal(k, 3, n, n) / n ** 0.5")
    b = g.param("0.2 * normal(k, 3, n)", "b")
    body = g.pick(
        "nn.relu(c @ k[0]) + k[1]", "c + 0.5 * jnp.tanh(c @ k[0]) + k[1]", "jnp.tanh(c @ k[0] + k[1])",
        "c + nn.gelu((c / jnp.sqrt((c ** 2).mean(-1, keepdims=True) + 1e-6)) @ k[0]) + k[1]",
        "jnp.tanh(c @ (k[0] * t) + k[1])", "jnp.tanh(c @ jnp.tanh(k[0]) + k[1])",
        "jnp.sin(c @ jnp.where(jax.random.bernoulli(key, 0.5, (n, n)), k[0], 0.0) + k[1])",
    )  # fmt: skip
    name = g.name("f")
    if g.chance(0.6):
        g.line(f"def {name}(c, k):\n    return {body}, None")
        wrapped = g.pick(name, f"jax.checkpoint({name})")
        return g.value(f"lax.scan({wrapped}, {v.name}, ({w}, {b}))[0]", v.kind, v.lo)
    if g.chance(0.5):
        g.line(f"def {name}(i, c):\n    k = ({w}[i], {b}[i])\n    return {body}")
        return g.value(f"lax.fori_loop(0, 3, {name}, {v.name})", v.kind, v.lo)
    g.line(f"{name} = {v.name}\nfor k in zip({w}, {b}):\n    c = {name}\n    {name} = {body}")
    return g.value(name, v.kind, v.lo)


@step("hs", 1.5)
def experts(g: Writer, v: Var) -> Var:
    h, r = v.name, g.param("normal(k, n, 3) / n ** 0.5", "r")
    change = changed_stack(g) if g.chance(0.4) else "{}"
    t = "" if v.kind == "h" else "t"
    logits = g.value(f"{h} @ {r}", "-", v.lo - 0.5, v.lo, "s").name
    gate = g.let(f"nn.softmax({logits}, -1)", "r")
    w = g.param("normal(k, 3, n, n) / n ** 0.5")
    if change != "{}":
        w = g.let(change.format(w), "k")
    match g.rng.randrange(7):
        case 0:
            out = f'jnp.einsum("b{t}e,b{t}eo->b{t}o", {gate}, jnp.einsum("b{t}i,eio->b{t}eo", {h}, {w}))'
        case 1:
            out = f'jnp.einsum("b{t}i,b{t}io->b{t}o", {h}, jnp.einsum("b{t}e,eio->b{t}io", {gate}, {w}))'
        case 2:
            out = f'jnp.einsum("b{t}e,b{t}i,eio->b{t}o", {gate}, {h}, {w})'
        case 3:
            out = f"sum({gate}[..., i:i + 1] * ({h} @ {w}[i]) for i in range(3))"
        case 4:
            a = g.let(f"nn.one_hot({gate}.argmax(-1), 3) * {gate}", "r")
            out = f'jnp.einsum("b{t}e,b{t}i,eio->b{t}o", {a}, {h}, {w})'
        case 5:
            a = g.let(f"{gate}.argmax(-1)", "r")
            out = f'jnp.einsum("b{t}i,b{t}io->b{t}o", {h}, {w}[{a}])'
        case _:
            a = g.let("nn.softmax(x[0, :3])", "r")
            out = f"{h} @ jnp.tensordot({a}, {w}, 1)"
    # In wide models the gates start alike, and experts whose mean is subtracted cancel.
    lo = v.lo - 0.5 if "mean(0)" in change else v.lo
    return g.value(out, v.kind, lo, min(lo, -0.5))


def changed_stack(g: Writer) -> str:
    return g.pick(
        "jnp.tanh({})", "({} * t)", "({0} * jax.random.bernoulli(key, 0.5, {0}.shape))",
        "({0} - {0}.mean(0))",
        "({} / 2)", "({0} * jnp.asarray([0.5, 1.0, 1.5])[:, None, None])",
    )  # fmt: skip


@step("hs", 1)
def modulated(g: Writer, v: Var) -> Var:
    """Kernels that depend on data: bilinear layers, kernels from a hypernetwork, modulated ones."""
    h, t = v.name, "" if v.kind == "h" else "t"
    match g.rng.randrange(5):
        case 0:
            w = g.param("normal(k, F, n, n) / (F * n) ** 0.5")
            out = f'jnp.einsum("bf,fio,b{t}i->b{t}o", x, {w}, {h})'
        case 1:
            w = g.param("normal(k, F, n, n) / (F * n) ** 0.5")
            a = g.let(f'jnp.einsum("bf,fio->bio", x, {w})', "k")
            out = f'jnp.einsum("bio,b{t}i->b{t}o", {a}, {h})'
        case 2:
            w, s = kernel(g, "n", "n"), g.param("normal(k, F, n) / F ** 0.5")
            a = g.let(f"1 + 0.3 * jnp.tanh(x @ {s})")
            b = g.let(f"({w})[None] * {a}[:, :, None]", "k")
            out = f'jnp.einsum("bio,b{t}i->b{t}o", {b}, {h})'
        case 3:
            a, b = g.param("normal(k, F, n) / F ** 0.5"), g.param("normal(k, F, n) / F ** 0.5")
            u, w = g.let(f"x @ {a}"), g.let(f"x @ {b}")
            d = g.let(f'jnp.einsum("b{t}i,bi->b{t}", {h}, {u}) / n')
            out = f"{d}[..., None] * {w}{'[:, None]' if t else ''}"
            return g.value(f"{h} + {out}", v.kind, v.lo, v.lo - 0.5)
        case _:
            w = g.param("normal(k, n, n) / n ** 0.5")
            out = f"{h} * ({h} @ {w})"
            return g.value(out, v.kind, 2 * v.lo)
    return g.value(out, v.kind, v.lo)


@step("hsi", 2)
def reduced(g: Writer, v: Var) -> Var:
    """A statistic over the width, and back."""
    h, lo = v.name, v.lo - 0.5
    form = g.pick(
        "{h} - {h}.mean(-1, keepdims=True)", "{h} + {h}.mean(-1, keepdims=True)",
        "{h} + jnp.tanh({h}.sum(-1, keepdims=True))", "{h} + jnp.tanh({h}.sum(-1, keepdims=True) / n ** 0.5)",
        "{h} + jnp.tanh({h}.sum(-1, keepdims=True) / n)",
        "{h} * jnp.sqrt(({h} ** 2).mean(-1, keepdims=True) + 1e-6)",
        "{h} * jnp.tanh(({h} ** 2).sum(-1, keepdims=True) / n)", "{h} + 0.1 * {h}.max(-1, keepdims=True)",
        "{h} * nn.softmax({h}, -1) * n", "{h} * nn.softmax({h}, -1)", "{h} + {h}.var(-1, keepdims=True)",
        "{h} + nn.logsumexp({h}, -1, keepdims=True) - jnp.log(n)", "{h} + 0.3 * jnp.cumsum({h}, -1) / n",
        "{h} * ({h} * {h}).sum(-1, keepdims=True) / n", "jnp.sort({h}, -1)", "{h} + jnp.roll({h}, 1, -1)",
        "{h} + jnp.linalg.norm({h}, axis=-1, keepdims=True) / n ** 0.5",
        "{h} + lax.top_k({h}, 2)[0].sum(-1, keepdims=True) / 10", "{h} * jnp.log(n) / jnp.log(32)",
        "{h} + jnp.median({h}, -1, keepdims=True)",
    )  # fmt: skip
    keeps = form.startswith("{h} +") or form.startswith("{h} -") or form.startswith("jnp.sort")
    low = v.lo if keeps else 3 * v.lo - 0.5 if v.lo else -0.5
    if "softmax" in form:
        # Weights that add up to one shrink by themselves; where that matters they are brought to size.
        out = g.value(form.format(h=h), v.kind, v.lo - (0.0 if form.endswith("n") else 1.0), v.lo - 1.0)
        return dataclasses.replace(out, lo=v.lo)
    return g.value(form.format(h=h), v.kind, low, min(low, lo))


@step("hsi", 1)
def constant(g: Writer, v: Var) -> Var:
    """A constant that depends on the width, before something that needs a size of order one."""
    # Of order one at the base: a value that outweighs the others there is still the larger one at 512.
    form = g.pick(
        "{} * n ** 0.5 / 3", "{} / n ** 0.5 * 3", "{} * n / 16", "{} / n * 16", "{} * 2",
        "{} * jnp.sqrt(n / 8)",
    )  # fmt: skip
    text = activation(g, f"({form.format(v.name)})", 1)
    return g.value(text, v.kind, after(text, v.lo))


@step("hsi", 1)
def noisy(g: Writer, v: Var) -> Var:
    """Dropout, noise, data and constants beside an activation."""
    h = v.name
    form = g.pick(
        "jnp.where(jax.random.bernoulli(key, 0.8, {h}.shape), {h} / 0.8, 0.0)",
        "{h} + 0.1 * jax.random.normal(key, {h}.shape)",
        "{h} * (1 + 0.1 * jax.random.normal(key, {h}.shape))", "{h} * t", "{h} / (1 + t)",
        "{h} + jnp.asarray(np.cos(np.arange(n)), jnp.float32)",
        "{h} * jnp.asarray(np.arange(n) % 2, jnp.float32)",
        "jnp.where(jnp.arange(n) < n // 2, {h}, 0.5 * {h})",
        "{h} + lax.stop_gradient(jnp.round({h} * 16) / 16 - {h})",
        "{h}[..., ::-1]", "jnp.concatenate([{h}[..., n // 2:], {h}[..., :n // 2]], -1)",
        "jnp.repeat({h}[..., ::2], 2, -1)", "jnp.maximum({h}, t)",
        "jax.jit(lambda a: a * a.shape[-1] ** -0.5 * n ** 0.5)({h})",
        "jax.checkpoint(lambda a: jnp.tanh(a))({h})",
        "lax.cond(t > 0, lambda a: jnp.tanh(a), lambda a: 0.5 * a, {h})",
        "{h}.astype(jnp.bfloat16).astype(jnp.float32)",
    )  # fmt: skip
    lo = 0.0 if "cos" in form or ("normal(key, {h}.shape)" in form and "+ 0.1 * jax" in form[:12]) else v.lo
    return g.value(form.format(h=h), v.kind, lo, v.lo)


@step("hsi", 0.7)
def bottleneck(g: Writer, v: Var) -> Var:
    """Down to a fixed size and up again."""
    down, up = kernel(g, "n", "C"), kernel(g, "C", "n")
    a = g.value(f"{v.name} @ {down}", "-", v.lo - 0.5, v.lo).name
    text = activation(g, a, 0.5)
    return g.value(f"{text} @ {up}{bias(g, 'n')}", v.kind, after(text, v.lo - 0.5))


@step("hsi", 0.7)
def gain_and_bias(g: Writer, v: Var) -> Var:
    gain, shift = g.param("1 + 0.1 * normal(k, n)", "g"), g.param("0.3 * normal(k, n)", "b")
    return g.value(
        g.pick(
            "{h} * {g} + {b}",
            "({h} + {b}) * {g}",
            "{h} * (1 + {g}) + jnp.tanh({b})",
            "{h} * jnp.exp({g}) + {b}",
        ).format(h=v.name, g=gain, b=shift),
        v.kind,
        v.lo,
    )


@step("hsi", 0.7)
def tied_layers(g: Writer, v: Var) -> Var:
    """One kernel used twice, the second time perhaps transposed."""
    w = g.dense("n", "n", plain=True)
    # The gradient of the second use may be the larger one: what it changes is random to the first.
    text = activation(g, f"({v.name} @ {w})", 1)
    a = g.value(text, v.kind, after(text, v.lo), after(text, v.lo) - 0.5)
    return g.value(f"{a.name} @ {w}{g.pick('', '.T')}", v.kind, a.lo)


@step("h", 0.5)
def heads_of_features(g: Writer, v: Var) -> Var:
    """A block-diagonal layer, over heads that grow or that do not."""
    heads, size = g.pick(("4", "n // 4"), ("n // 8", "8"))
    w = g.param(f"normal(k, {heads}, {size}, {size}) / ({size}) ** 0.5")
    return g.value(
        f'jnp.einsum("bhi,hio->bho", {v.name}.reshape(B, {heads}, {size}), {w}).reshape(B, n)', "h", v.lo
    )


@step("h", 0.4)
def to_sequence(g: Writer, v: Var) -> Var:
    w = g.dense("n", "T * n", fan_in="n")
    return g.value(f"({v.name} @ {w}).reshape(B, T, n)", "s", v.lo)


def apply_step(g: Writer, v: Var, same: bool = False) -> Var:
    names = [
        name for name, (_, kinds, _) in STEPS.items()
        if v.kind in kinds and not (same and name in KIND_CHANGES)
        and not (g.quiet >= 2 and name == "residual")
    ]  # fmt: skip
    name = g.rng.choices(names, [STEPS[n][2] for n in names])[0]
    g.steps.append((len(g.body) + 2, name))
    g.quiet += 1
    first = len(g.body)
    out = STEPS[name][0](g, v)
    if out.kind == v.kind:
        g.parts.append((first, len(g.body), v.name, out.name))
    g.quiet -= 1
    return out


KIND_CHANGES: Final = ("pooled", "spatial_mean", "flat", "to_sequence")


# ---- ends ------------------------------------------------------------------------------------------------


def readout(g: Writer, expression: str, lo: float) -> str:
    return g.value(expression, "-", lo - 0.5, lo, "y").name


@end(4)
def linear(g: Writer, v: Var) -> str:
    w = kernel(g, "n", "C")
    return readout(g, f"{v.name} @ {w}{bias(g, 'C')}", v.lo)


@end(1)
def tied(g: Writer, v: Var) -> str:
    tables = [name for name in g.params if name.startswith("e") and "(k, V, n)" in g.params[name]]
    if not tables:
        return linear(g, v)
    out = g.pick("{h} @ {e}.T", "{h} @ {e}.T / n ** 0.5", 'jnp.einsum("...n,vn->...v", {h}, {e})')
    return readout(g, out.format(h=v.name, e=f'p["{tables[0]}"]'), v.lo)


@end(1)
def sums_of_readouts(g: Writer, v: Var) -> str:
    a, b = g.param("normal(k, n, C) / n ** 0.5"), g.param("normal(k, n, C) / n ** 0.5")
    skip = g.param("normal(k, F, C) / F ** 0.5")
    form = g.pick(
        "{h} @ {a} + jnp.tanh({h}) @ {b}", "{h} @ {a} - {h} ** 2 @ {b}", "({h} @ {a}) * nn.sigmoid({h} @ {b})"
    )
    if "sigmoid" in form:
        # It multiplies a readout's product, which is small at first.
        g.slower[b[3:-2]] = v.lo - 0.5
    if v.kind == "h" and g.chance(0.4):
        return g.value(f"{v.name} @ {a} + x @ {skip}", "-", v.lo - 0.5, v.lo, "y").name
    del g.params[skip[3:-2]]
    g._fresh.remove(skip[3:-2])
    return readout(g, form.format(h=v.name, a=a, b=b), v.lo)


@end(1)
def vector(g: Writer, v: Var) -> str:
    w = g.param("normal(k, n) / n ** 0.5")
    return readout(
        g,
        g.pick("({h} * {w}).sum(-1)", "{h} @ {w}", "jnp.dot({h}, {w})", "({h} * {w}).mean(-1)").format(
            h=v.name, w=w
        ),
        v.lo,
    )


@end(0.7)
def mean(g: Writer, v: Var) -> str:
    return readout(
        g,
        g.pick("{}.mean(-1)", "{}.sum(-1)", "{}.sum(-1) / n ** 0.5", "{}.reshape(B, -1).mean(-1)").format(
            v.name
        ),
        v.lo,
    )


@end(0.7)
def distance(g: Writer, v: Var) -> str:
    w = g.param("normal(k, C, n)", "c")
    form = g.pick(
        "(({h}[..., None, :] - {w}) ** 2).sum(-1)", "(({h}[..., None, :] - {w}) ** 2).mean(-1)",
        "({h} ** 2).sum(-1, keepdims=True) - 2 * {h} @ {w}.T + ({w} ** 2).sum(-1)",
        "5 * ({h} / jnp.linalg.norm({h}, axis=-1, keepdims=True))"
        " @ ({w} / jnp.linalg.norm({w}, axis=-1, keepdims=True)).T",
    )  # fmt: skip
    return readout(g, form.format(h=v.name, w=w), v.lo)


@end(1)
def several(g: Writer, v: Var) -> str:
    a, b = linear(g, v), vector(g, v)
    return g.pick("{0}, {1}", '{{"a": {0}, "b": {1}}}').format(a, b)


@end(0.5)
def scaled(g: Writer, v: Var) -> str:
    w = kernel(g, "n", "C")
    form = g.pick(
        "{h} @ {w} / n ** 0.5",
        "{h} @ {w} / n",
        "5 * jnp.tanh({h} @ {w})",
        "nn.log_softmax({h} @ {w})",
        "nn.sigmoid({h} @ {w})",
        "({h} @ {w}) * jnp.exp({s})",
    )
    s = g.param("jnp.float32(0.1)", "s") if "{s}" in form else ""
    return readout(g, form.format(h=v.name, w=w, s=s), v.lo - 0.5 if form.endswith("/ n") else v.lo)


@end(0.5)
def features_out(g: Writer, v: Var) -> str:
    """Outputs that grow with the width, as those of a backbone."""
    return g.value(f"{v.name} @ {g.dense('n', 'n')}", "-", v.lo, v.lo, "y").name


@end(0.4)
def wide_readout(g: Writer, v: Var) -> str:
    a = kernel(g, "n", "n")
    for one in g.low_rank():
        # A fixed number of directions, which the readout's weights are random to in the first step.
        g.slower.setdefault(one, -0.5)
    b = g.param("normal(k, n, C) / n ** 0.5")
    if g.is_narrow:
        g.after_fall(b)
    return readout(g, f"nn.relu({v.name} @ {a}) @ {b}", v.lo)


def generate(seed: int, number: int) -> Program:
    """Program `number` of those that a seed stands for."""
    g = Writer(random.Random(f"{seed}/{number}"))
    names = list(STARTS)
    name = g.rng.choices(names, [STARTS[n][1] for n in names])[0]
    g.steps.append((2, name))
    v = STARTS[name][0](g)
    for _ in range(g.rng.choices((1, 2, 3, 4), (0.3, 0.35, 0.25, 0.1))[0]):
        v = apply_step(g, v)
    if g.chance(0.03):
        g.param("normal(k, n)", "unused")
    names = list(ENDS)
    name = g.rng.choices(names, [ENDS[n][1] for n in names])[0]
    g.steps.append((len(g.body) + 2, name))
    out = ENDS[name][0](g, v)
    g.line(f"return {out}")
    return g.program(f"{seed}-{number}")

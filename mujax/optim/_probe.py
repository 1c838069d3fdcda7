"""Checks, by running it, whether an optax transform may be wrapped with µP factors.

A transform is a pair of opaque functions, so it is run for a few steps on parameters of a few entries each.
A transform that can't be run there (it needs extra arguments, or it holds traced values) passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from mujax.errors import ConfigError, MujaxError, ParametrizationError, SpecMismatchError
from mujax.optim._registry import UNSUPPORTED, UNSUPPORTED_STATES
from mujax.rules import FAMILY_TRAITS, Family
from mujax.spec import MupSpec

# A schedule may start at 0, accumulated steps give zeros, RAdam is plain momentum for its first five steps.
_STEPS: Final = 8
# Powers of two, so that a linear transform scales exactly. Far apart, so that a clipping threshold or an
# epsilon in between makes a transform neither linear nor scale-free.
_SMALL: Final = 2.0**-10
_SCALES: Final = (2.0**10, 2.0**20)
_HUGE: Final = 2.0**40
_RTOL: Final = 1e-3
# The factor on one entry of a parameter that shows whether the others follow it.
_ONE_ENTRY: Final = 2.0**7
# The iteration of Newton and Schulz leaves a ratio of singular values up to this.
_FLAT: Final = 4.0


def _nested(paths: Sequence[str], leaves: Sequence[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


@dataclasses.dataclass(frozen=True)
class _Probe:
    """A transform, and the parameters to run it on in the order of the tree's leaves, with their shapes."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, tx: optax.GradientTransformation, spec: MupSpec, paths: Sequence[str], size: int = 1
    ) -> _Probe:
        """`size` is that of the last two axes; the others are 1."""
        in_order = jax.tree.leaves(_nested(paths, paths))
        ranks = [len(spec[path].shape) for path in in_order]
        shapes = [(1,) * max(0, rank - 2) + (size,) * min(rank, 2) for rank in ranks]
        return cls(tx.init, jax.jit(tx.update), tuple(in_order), tuple(shapes))

    def _tree(self, entries: Sequence[Any] | np.ndarray) -> dict[str, Any]:
        leaves = [
            jnp.full(shape, jnp.asarray(e, jnp.float32))
            for shape, e in zip(self.shapes, entries, strict=True)
        ]
        return _nested(self.paths, leaves)

    def states(self) -> Any:
        """The state at the start."""
        return self.init(self._tree([1.0] * len(self.paths)))

    @property
    def owners(self) -> Int[np.ndarray, " entries"]:
        """The number of the parameter that each entry of all of them belongs to."""
        return np.repeat(np.arange(len(self.paths)), [math.prod(shape) for shape in self.shapes])

    def run(
        self, gradients: Float[np.ndarray, "steps n"], param: float = 1.0
    ) -> Float[np.ndarray, "steps entries"]:
        """The updates of consecutive steps, for gradients and parameters whose entries are all the same."""
        steps = self.trees(list(gradients), param)
        return np.array([np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in steps])

    def trees(self, gradients: Sequence[Any], param: float = 1.0) -> list[list[np.ndarray]]:
        """The same, leaf by leaf and for gradients of any entries; the parameters stay at `param`."""
        params = self._tree([param] * len(self.paths))
        state = self.init(params)
        steps = []
        for entries in gradients:
            updates, state = self.update(self._tree(entries), state, params)
            steps.append([np.asarray(leaf, float) for leaf in jax.tree.leaves(updates)])
        return steps


def _refuse_decay(probe: _Probe) -> None:
    """Refuses transforms that move the parameters without a gradient: weight decay, a projection.

    Noise moves them too, but independently of their values.
    """
    zeros = np.zeros((_STEPS, len(probe.paths)))
    updates = probe.run(zeros)
    if not np.any(updates):
        return
    mirrored = probe.run(zeros, param=-1.0)
    pulled = np.isfinite(updates) & np.isfinite(mirrored) & (updates != mirrored)
    if not np.any(pulled):
        return
    path = probe.paths[probe.owners[int(np.argmax(pulled.any(axis=0)))]]
    # So large that no epsilon counts.
    far, further = (probe.run(zeros, param=scale) for scale in _SCALES)
    if np.allclose(further[pulled], far[pulled], rtol=_RTOL, atol=0):
        raise MujaxError(
            where=f"mup_wrap, {path}",
            expected="no update at zero gradient",
            got="one that depends on the sign of the parameter: weight decay as an L2 gradient inside of an "
            "adaptive optimizer, which µP rules out, since the gradient of the loss shrinks with width and "
            "λθ does not (TP5, arXiv 2203.03466, Appendix B.3)",
            remedy="put optax.add_decayed_weights(...) after the wrapped transform, outside of it",
        )
    raise MujaxError(
        where=f"mup_wrap, {path}",
        expected="no update at zero gradient",
        got="one that depends on the parameter: weight decay, which the µP factor would scale with width",
        remedy="put it after that factor: optax.chain(mup_wrap(<the transform without decay and learning "
        "rate>, spec, family), optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))",
    )


def _behaves_like(probe: _Probe) -> Family | None:
    """The family whose behaviour all of the updates show; None if there is no such family."""
    count = len(probe.paths)
    scales = np.resize(_SCALES, count)
    # Positive, of full rank, with singular values that are far apart, and with signs of rank one.
    entries = [_entries(shape) for shape in probe.shapes]

    def run(factors: Sequence[float], param: float = 1.0, *, one_entry: bool = False) -> list[np.ndarray]:
        gradient = [
            _SMALL * factor * (entry * _first(entry) if one_entry else entry)
            for factor, entry in zip(factors, entries, strict=True)
        ]
        # Each leaf's updates of all steps together.
        steps = probe.trees([gradient] * _STEPS, param)
        return [np.stack(leaf) for leaf in zip(*steps, strict=True)]

    updates = run([1.0] * count)
    if not any(np.any(leaf) for leaf in updates):
        return None
    scaled = run(list(scales))

    def everywhere(found: list[np.ndarray], factors: Sequence[float]) -> bool:
        return all(
            np.allclose(a, b * factor, rtol=_RTOL, atol=0)
            for a, b, factor in zip(found, updates, factors, strict=True)
        )

    if everywhere(scaled, list(scales)):
        return "sgd"
    if not everywhere(scaled, [1.0] * count):
        return None
    larger = run([1.0] * count, param=_SCALES[0])
    if everywhere(larger, [_SCALES[0]] * count):
        return "normalized"
    matrices = [leaf for leaf in updates if leaf.ndim >= 3 and leaf[-1].size == 4]
    if any(_flat(leaf[-1].reshape(2, 2)) for leaf in matrices):
        return "spectral"
    several = [number for number, entry in enumerate(entries) if entry.size > 1]
    if not several:
        return None
    bumped = run([1.0] * count, one_entry=True)
    if all(_others_alike(bumped[number], updates[number]) for number in several):
        return "adam"
    parallel = [
        np.allclose(leaf[-1] * entry.flat[0], entry * leaf[-1].flat[0], rtol=0.05, atol=0)
        for leaf, entry in zip(updates, entries, strict=True)
    ]
    return "normalized_gradient" if all(parallel) else None


def _entries(shape: tuple[int, ...]) -> np.ndarray:
    ramp = np.array([256.0, 32.0, 16.0, 128.0])
    return ramp[: int(np.prod(shape))].reshape(shape)


def _first(entry: np.ndarray) -> np.ndarray:
    bump = np.ones(entry.shape)
    bump.flat[0] = _ONE_ENTRY
    return bump


def _others_alike(found: np.ndarray, before: np.ndarray) -> bool:
    """Whether all entries but the bumped one are as they were, at each step."""
    size = before[0].size
    return np.allclose(found.reshape(-1, size)[:, 1:], before.reshape(-1, size)[:, 1:], rtol=0.05, atol=0)


def _flat(matrix: Float[np.ndarray, "2 2"]) -> bool:
    largest, smallest = np.linalg.svd(matrix, compute_uv=False)
    return bool(smallest > 0 and largest / smallest < _FLAT / 2)


def _refuse_other_family(probe: _Probe, family: Family) -> None:
    """Refuses a transform that behaves like another family, in each entry and at every step."""
    found = _behaves_like(probe)
    if found is not None and found != family:
        raise ParametrizationError(
            where="mup_wrap",
            expected=f"a transform of the family {family!r}",
            got=f"one whose updates are {FAMILY_TRAITS[found].updates}",
            remedy=f"pass family={found!r}",
        )


def _refuse_norm_clipping(probe: _Probe) -> None:
    """Refuses transforms where a huge gradient of one parameter silences those of all others."""
    huge, rest = np.ones((2, 2, len(probe.paths)))
    rest[1] = huge[1] = -4.0
    huge[1, 0] = _HUGE
    alone = huge.copy()
    alone[1, 1:] = 0.0
    others = probe.owners > 0
    free, clipped, silent = (probe.run(gradients)[1, others] for gradients in (rest, huge, alone))
    silenced = np.allclose(clipped, silent, rtol=_RTOL, atol=0)
    if silenced and not np.allclose(free, silent, rtol=_RTOL, atol=0):
        raise MujaxError(
            where="mup_wrap",
            expected="each parameter's update to follow its own gradient",
            got="clipping by the global norm, which would measure gradients in the units that scale_eps "
            "brings them to",
            remedy="put it before, as in optax.chain(optax.clip_by_global_norm(...), mup_wrap(...))",
        )


def _one_of_each_kind(spec: MupSpec) -> list[str]:
    """A path for each combination of role, rank and name, which transforms and masks usually go by."""
    kinds = {(param.role, len(param.shape), path.split("/")[-1]): path for path, param in spec.items()}
    return list(kinds.values())


def _attempt(spec: MupSpec, examine: Callable[[Sequence[str]], Any]) -> Any:
    """Runs an examination on a part of the parameters, and on all of them if that does not work."""
    # A mask given as a tree needs the whole tree; one parameter of each kind shows anything else.
    for paths in (_one_of_each_kind(spec), list(spec)):
        try:
            with jax.ensure_compile_time_eval():
                return examine(paths)
        except SpecMismatchError as error:
            raise MujaxError(
                where="mup_wrap",
                expected="a plain optax transform",
                got="one that applies µP factors already",
                remedy="use it as it is, without mup_wrap",
            ) from error
        except MujaxError:
            raise
        except Exception:
            # An error of a foreign transform on parameters like these is no error of the user.
            continue
    return None


def check_plain(tx: optax.GradientTransformation, spec: MupSpec) -> None:
    """Refuses a transform that is in µP already, and one that µP has no rule for.

    Raises:
        MujaxError: it applies µP factors, or Muon's shape factor.
        ConfigError: it finds its own learning rate.
    """
    # optax warns of some names that contrib has instead.
    public = {**vars(optax.contrib), **vars(optax)}
    types = (optax.contrib.MuonState, *(public[name] for name in UNSUPPORTED_STATES if name in public))

    def examine(paths: Sequence[str]) -> None:
        states = _Probe.of(tx, spec, paths).states()
        for node in jax.tree.leaves(states, is_leaf=lambda node: isinstance(node, types)):
            if isinstance(node, types):
                if isinstance(node, optax.contrib.MuonState):
                    raise MujaxError(
                        where="mup_wrap",
                        expected="a transform without factors of its own",
                        got="Muon, whose shape factor at the target's sizes the µP rule would scale a second "
                        "time, and which takes matrices by rank and not by role",
                        remedy="use mujax.mup_muon or mujax.mup_scale_by_muon",
                    )
                name = UNSUPPORTED_STATES[type(node).__name__]
                raise ConfigError(
                    where="mup_wrap",
                    expected="an optimizer with a µP rule",
                    got=f"{name}: {UNSUPPORTED[name]}",
                )

    _attempt(spec, examine)


def behaviour(tx: optax.GradientTransformation, spec: MupSpec) -> Family | None:
    """The family that a transform behaves like, if it can be run and behaves like one."""
    return _attempt(spec, lambda paths: _behaves_like(_Probe.of(tx, spec, paths, size=2)))


def check(tx: optax.GradientTransformation, spec: MupSpec, family: Family, *, rescaled: bool) -> None:
    """Refuses transforms that µP factors around them would make depend on width.

    Args:
        tx: the transform.
        spec: the parameters it is for.
        family: the family that the user gives.
        rescaled: whether the gradients get µP factors before they reach `tx`.

    Raises:
        MujaxError: `tx` decays the weights, clips by the global norm although the gradients are rescaled,
            or has µP factors already.
        ParametrizationError: `tx` is of another family.
    """

    def examine(paths: Sequence[str]) -> None:
        probe = _Probe.of(tx, spec, paths, size=2)
        _refuse_decay(probe)
        _refuse_other_family(probe, family)
        if rescaled:
            _refuse_norm_clipping(probe)

    _attempt(spec, examine)

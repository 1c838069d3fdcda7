"""Finds out by running it whether an optax transform may be put inside of µP factors.

A transform is a pair of opaque functions, so it is run for a few steps on parameters of one entry each.
What can't be run there (it needs extra arguments, or it holds values that are being traced) is let pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from mujax.errors import MujaxError, ParametrizationError, SpecMismatchError
from mujax.infshape import MupSpec
from mujax.rules import Family

# A schedule may begin at 0, accumulated steps give zeros, RAdam is plain momentum for its first five steps.
_STEPS: Final = 8
# Powers of two, so that a linear transform scales exactly. Far apart, so that a clipping threshold or an
# epsilon in between makes a transform neither linear nor scale-free.
_SMALL: Final = 2.0**-10
_SCALES: Final = (2.0**10, 2.0**20)
_HUGE: Final = 2.0**40
_RTOL: Final = 1e-3


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
    """A transform, and the parameters to run it on in the order of the tree's leaves, with their ranks."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    paths: tuple[str, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, tx: optax.GradientTransformation, spec: MupSpec, paths: Sequence[str]) -> _Probe:
        in_order = jax.tree.leaves(_nested(paths, paths))
        return cls(
            tx.init, jax.jit(tx.update), tuple(in_order), tuple(len(spec[path].shape) for path in in_order)
        )

    def _tree(self, entries: Sequence[float] | np.ndarray) -> dict[str, Any]:
        leaves = [jnp.full((1,) * rank, e) for rank, e in zip(self.ranks, entries, strict=True)]
        return _nested(self.paths, leaves)

    def run(
        self, gradients: Float[np.ndarray, "steps n"], param: float = 1.0
    ) -> Float[np.ndarray, "steps n"]:
        """The updates of consecutive steps, for parameters whose entries stay at `param`."""
        params = self._tree([param] * len(self.paths))
        state = self.init(params)
        steps = []
        for entries in gradients:
            updates, state = self.update(self._tree(entries), state, params)
            steps.append([np.asarray(leaf).item() for leaf in jax.tree.leaves(updates)])
        return np.array(steps, dtype=float).reshape(gradients.shape)


def _refuse_decay(probe: _Probe) -> None:
    """Refuses what pulls the parameters where no gradient does: weight decay, a projection.

    Noise moves them too, but not in a way that depends on where they are.
    """
    zeros = np.zeros((_STEPS, len(probe.paths)))
    updates = probe.run(zeros)
    if not np.any(updates):
        return
    mirrored = probe.run(zeros, param=-1.0)
    pulled = np.isfinite(updates) & np.isfinite(mirrored) & (updates != mirrored)
    if np.any(pulled):
        path = probe.paths[int(np.argmax(pulled.any(axis=0)))]
        raise MujaxError(
            f"mup_wrap, {path}: expected no update at zero gradient, found one that depends on the "
            "parameter: weight decay, which the µP factor would scale with width. Put it after that factor: "
            "optax.chain(mup_wrap(<the transform without decay and learning rate>, spec, family), "
            "optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))."
        )


def _refuse_other_family(probe: _Probe, family: Family) -> None:
    """Refuses a transform that behaves as another family does, in each entry and at every step."""
    scales = np.resize(_SCALES, len(probe.paths))
    gradients = np.full((_STEPS, len(probe.paths)), _SMALL)
    updates, scaled = probe.run(gradients), probe.run(gradients * scales)
    if not np.any(updates):
        return
    behaviours: dict[Family, tuple[Any, str]] = {
        "sgd": (updates * scales, "proportional to the gradient"),
        "adam": (updates, "independent of the gradient's scale"),
    }
    for other, (expected, words) in behaviours.items():
        if other != family and np.allclose(scaled, expected, rtol=_RTOL, atol=0):
            raise ParametrizationError(
                f"mup_wrap: expected a transform of the family {family!r}, found one whose updates are "
                f"{words}. Say family={other!r}."
            )


def _refuse_norm_clipping(probe: _Probe) -> None:
    """Refuses what lets a huge gradient of one parameter silence that of all the others."""
    huge, rest = np.ones((2, 2, len(probe.paths)))
    rest[1] = huge[1] = -4.0
    huge[1, 0] = _HUGE
    alone = huge.copy()
    alone[1, 1:] = 0.0
    free, clipped, silent = (probe.run(gradients)[1, 1:] for gradients in (rest, huge, alone))
    silenced = np.allclose(clipped, silent, rtol=_RTOL, atol=0)
    if silenced and not np.allclose(free, silent, rtol=_RTOL, atol=0):
        raise MujaxError(
            "mup_wrap: expected each parameter's update to follow its own gradient, found clipping by the "
            "global norm, which would measure gradients in the units that scale_eps brings them to. Put it "
            "before, as in optax.chain(optax.clip_by_global_norm(...), mup_wrap(...))."
        )


def _one_of_each_kind(spec: MupSpec) -> list[str]:
    """A path for each combination of what a transform or a mask usually goes by."""
    kinds = {(param.role, len(param.shape), path.split("/")[-1]): path for path, param in spec.items()}
    return list(kinds.values())


def check(tx: optax.GradientTransformation, spec: MupSpec, family: Family, *, rescaled: bool) -> None:
    """Refuses transforms that µP factors around them would make depend on width.

    Args:
        tx: the transform.
        spec: the parameters it is for.
        family: what the user says it is.
        rescaled: the gradients get µP factors before they reach `tx`.

    Raises:
        MujaxError: `tx` decays the weights, clips by the global norm although the gradients are rescaled,
            or has µP factors already.
        ParametrizationError: `tx` is of another family.
    """
    # A mask given as a tree needs the whole tree; anything else shows on one parameter of each kind.
    for paths in (_one_of_each_kind(spec), list(spec)):
        try:
            with jax.ensure_compile_time_eval():
                probe = _Probe.of(tx, spec, paths)
                _refuse_decay(probe)
                _refuse_other_family(probe, family)
                if rescaled:
                    _refuse_norm_clipping(probe)
            return
        except SpecMismatchError as error:
            raise MujaxError(
                "mup_wrap: expected a plain optax transform, found one that applies µP factors already. "
                "Use it as it is, without mup_wrap."
            ) from error
        except MujaxError:
            raise
        except Exception:
            # Whatever a foreign transform raises on parameters like these, the user did nothing wrong.
            continue

"""The exception family.

Every error that a user can cause is a `MujaxError`. Its text is one or two sentences: the path or
place, what was expected, what was found, and the remedy.
"""


class MujaxError(ValueError):
    """Base class of all errors raised by mujax on bad input."""


class ShapeMismatchError(MujaxError):
    """Base, delta and target differ in something other than a width.

    Raised when a parameter is missing from one of the models, when its rank differs, when a width
    does not follow from the base, or when no width differs at all. Remedy: build all models with the
    same code and change widths only.
    """


class TraceMismatchError(MujaxError):
    """The programs of base and target differ in structure, not only in sizes.

    Raised when Python code in the model takes another path at another width. The text names both
    places. Remedy: a larger base, so that both models take the same path.
    """


class RoleError(MujaxError):
    """The role of a parameter axis can't be read off the computation.

    Raised when a parameter with an infinite axis is not used in the traced call, or is used in a way
    that fits no role, or in two ways that contradict each other. Remedy: `roles={"path": ...}`.
    """


class DepthError(MujaxError):
    """A model's depth or residual branches can't be told, or it has factors for depth of its own.

    Raised by `mup_init(..., depth=...)`. Remedy: `residual=[...]`, `mujax.residual_branch`, or what the text
    says.
    """


class AuditError(MujaxError):
    """`mup_init(..., strict=True)` found something in the model that it can't put right."""


class MujaxWarning(UserWarning):
    """`mup_init` found something in the model that it can't put right; `mup.findings` lists it all."""


class SpecMismatchError(MujaxError):
    """A parameter tree does not match the `MupSpec`; the text names the first path that differs."""


class ParametrizationError(MujaxError):
    """An unknown parametrization, optimizer family or role name."""


class DataError(MujaxError):
    """Data that can't be found or read, or that does not fit the task."""


class ConfigError(MujaxError):
    """An option or a configuration value that makes no sense, alone or with the others."""


class StudyError(MujaxError):
    """A study's database can't be opened, reached or written.

    The study itself stays as it is. Remedy: what the text says, then the same command again.
    """

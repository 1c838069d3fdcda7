"""The exception family.

Every error that a user can cause is a `MujaxError`. Its text names the path or place, what was expected, what
was found, and the remedy.
"""


class MujaxError(ValueError):
    """Base class of all errors raised by mujax on bad input.

    The text is `"{where}: expected {expected}, got {got}; {remedy}."`, without the parts that are not given.

    Attributes:
        where: the path, option or source line that the error is about; None if it is not about one.
        expected: what would have been right.
        got: what was found.
        remedy: what to do; several sentences are allowed.

    Args:
        message: a text that does not have this form, in place of the four parts.
        where: see the attributes, as for the others.

    >>> str(MujaxError(where="seeds", expected="at least 1", got=0))
    'seeds: expected at least 1, got 0.'
    >>> str(MujaxError(where="k/kernel", expected="a float", got="int32", remedy="pass roles="))
    'k/kernel: expected a float, got int32; pass roles=.'
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        where: object = None,
        expected: str | None = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.where = None if where is None else str(where)
        self.expected = expected
        self.got = None if got is None else str(got)
        self.remedy = remedy
        super().__init__(self._sentence() if message is None else message)

    def _sentence(self) -> str:
        facts = ", ".join(
            f"{verb} {fact}" for verb, fact in (("expected", self.expected), ("got", self.got)) if fact
        )
        text = facts if self.where is None else f"{self.where}: {facts}"
        text = text if self.remedy is None else f"{text}; {self.remedy}"
        return text if text.endswith((".", "?", "!")) else f"{text}."


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
    """The role of a parameter axis cannot be read off the computation.

    Raised when a parameter with an infinite axis is not used in the traced call, or is used in a way
    that fits no role, or in two ways that contradict each other. Remedy: `roles={"path": ...}`.
    """


class DepthError(MujaxError):
    """A model's depth or residual branches cannot be determined, or it has factors for depth of its own.

    Raised by `mup_init(..., depth=...)`. Remedy: `residual=[...]`, `mujax.residual_branch`, or as the text
    says.
    """


class AuditError(MujaxError):
    """`mup_init(..., strict=True)` found something in the model that it cannot correct."""


class MujaxWarning(UserWarning):
    """`mup_init` found something that it cannot correct (`mup.findings` lists all), or swapped models."""


class SpecMismatchError(MujaxError):
    """A parameter tree does not match the `MupSpec`; the text names the first path that differs."""


class ParametrizationError(MujaxError):
    """An unknown parametrization, optimizer family or role name."""


class DataError(MujaxError):
    """Data that cannot be found or read, or that does not fit the task."""


class ConfigError(MujaxError):
    """An option or a configuration value that makes no sense, alone or with the others."""


class CheckpointError(MujaxError):
    """A checkpoint that is missing, incomplete or damaged, or that belongs to another run.

    The text names the checkpoint and, where it is damaged, the one before it. Nothing is changed.
    """


class StudyError(MujaxError):
    """A study's database cannot be opened, reached or written.

    The study itself is unchanged. Remedy: follow the text, then run the same command again.
    """

"""The queue of trials: the next slot, the free slots, and superfluous trials.

Pure: a queue is computed from the records of the trials, by rules that need no database and no clock of their
own. A study has slots, counted from 0: slot k is the k-th trial of the sampler, or cell k of a grid. A trial
that is run again keeps its slot, and so its hyperparameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal

State = Literal["complete", "pruned", "failed", "running", "waiting"]

_NOTHING: Final = object()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A trial as the queue sees it.

    Attributes:
        number: of the trial in the study; a trial that is run again gets a new one.
        state: `"failed"` is a trial that was given up, and is run again under another number.
        params: its hyperparameters, as far as they are drawn.
        enqueued: those of them that the user fixed when enqueuing the trial.
        slot: which of the study's slots it fills; None for a trial that the user enqueued.
        first: the number under which it was run first; its own unless it is a retry.
    """

    number: int
    state: State
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    enqueued: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    slot: int | None = None
    first: int | None = None

    @property
    def identity(self) -> tuple[str, int]:
        """Equal for a trial and its retries, different for any two others."""
        if self.slot is not None:
            return "slot", self.slot
        return "trial", self.number if self.first is None else self.first


@dataclasses.dataclass(frozen=True)
class Grid:
    """The cells of a grid, counted in row-major order.

    Attributes:
        axes: all values of each hyperparameter.
    """

    axes: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return math.prod(map(len, self.axes.values()))

    def params(self, cell: int) -> dict[str, Any]:
        """The hyperparameters of a cell."""
        params: dict[str, Any] = {}
        for name, axis in reversed(list(self.axes.items())):
            cell, place = divmod(cell, len(axis))
            params[name] = axis[place]
        return {name: params[name] for name in self.axes}

    def cell_of(self, params: Mapping[str, Any]) -> int | None:
        """The cell with these hyperparameters; None if they are not on the grid."""
        cell = 0
        for name, axis in self.axes.items():
            found = [place for place, value in enumerate(axis) if value == params.get(name, _NOTHING)]
            if not found:
                return None
            cell = cell * len(axis) + found[0]
        return cell


@dataclasses.dataclass(frozen=True)
class Queue:
    """A study's trials at one moment.

    Attributes:
        entries: all trials, by number.
        total: the study's total; failed ones are not counted.
        grid: the grid whose cells are the slots; None where each slot is drawn.
    """

    entries: Sequence[Entry]
    total: int
    grid: Grid | None = None

    @property
    def live(self) -> list[Entry]:
        """All trials but the failed ones."""
        return [entry for entry in self.entries if entry.state != "failed"]

    @property
    def waiting(self) -> list[Entry]:
        """Trials that are stored and that no worker has taken, the next one first."""
        return [entry for entry in self.entries if entry.state == "waiting"]

    @property
    def limit(self) -> int:
        """How many trials the study can have: a grid has no more than its cells."""
        if self.grid is None:
            return self.total
        # A trial that the user enqueued off the grid does not take the place of a cell.
        off_grid = sum(self.grid.cell_of(entry.params) is None for entry in self.live)
        return min(self.total, len(self.grid) + off_grid)

    @property
    def free(self) -> int:
        """How many trials can be taken now, stored or not; negative if there are too many already."""
        return self.limit - len(self.live) + len(self.waiting)

    @property
    def pending(self) -> int:
        """How many trials are not finished: running, waiting or not started."""
        finished = sum(entry.state in ("complete", "pruned") for entry in self.entries)
        return max(0, self.limit - finished)

    def next_slots(self, count: int) -> list[int]:
        """The first slots that no trial fills."""
        if self.grid is not None:
            filled = {self.grid.cell_of(entry.params) for entry in self.live}
        else:
            filled = {entry.slot for entry in self.live}
        open_slots = (slot for slot in itertools.count() if slot not in filled)
        return list(itertools.islice(open_slots, max(0, count)))

    def surplus(self, mine: Collection[int]) -> list[int]:
        """Numbers of the trials that must not be run.

        Args:
            mine: numbers that this worker has taken and not yet run.

        Returns:
            Trials of `mine`, and waiting ones; never one that another worker runs.
        """
        # Two trials of one identity: Optuna stores a new trial again if the connection was lost before the
        # database answered; and another worker may have taken what we took while we had lost the lock.
        seen: set[tuple[str, int]] = set()
        found: list[int] = []
        for entry in sorted(
            self.live, key=lambda entry: (entry.state == "waiting", entry.number in mine, entry.number)
        ):
            if entry.identity in seen and (entry.number in mine or entry.state == "waiting"):
                found.append(entry.number)
            seen.add(entry.identity)
        # More trials than the limit, taken while we had lost the lock.
        over = len(self.live) - len(found) - self.limit
        kept = [number for number in mine if number not in found]
        return found + kept[max(0, len(kept) - max(0, over)) :]

    def without(self, numbers: Collection[int]) -> Queue:
        """The queue once these trials have failed."""
        entries = [entry for entry in self.entries if entry.number not in numbers]
        return dataclasses.replace(self, entries=entries)


def is_sweep_due(now: float, *, lost_at: float, swept_at: float, settling: float, heartbeat: float) -> bool:
    """Whether it is fair and useful to look for stale leases now.

    When a database was away for long, all workers look dead. Those alive try to reach it every few seconds,
    and must be given the time.

    Args:
        now: the time, in seconds.
        lost_at: when the database was last found to be away.
        swept_at: when this worker last looked for stale leases.
        settling: seconds in which every worker that is alive reaches a database that is back.
        heartbeat: seconds between two heartbeats of a worker.
    """
    return now - lost_at >= settling and now - swept_at >= heartbeat / 2

"""A plan that takes several sittings: jobs in fresh processes up to a deadline; what is done is not done again."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import measure
from benchmarks.models import title
from imsm.errors import InputError

#: Records that are evaluated together.
EVALUATION_BATCH = 16


class OutOfTimeError(Exception):
    """The deadline has passed; what is done is kept."""


@dataclass
class Sitting(ABC):
    """Runs a plan for one model.

    plan: what is to be done.
    model: its name in the plan.
    folder: the model's folder.
    data_root: the data sets' files.
    work: where data, checkpoints and full outputs go.
    out: where the records go.
    deadline: no job begins after this `time.monotonic()`.
    only: names of the methods to run; all if it is empty.
    """

    #: The module below `benchmarks` whose `child` does the jobs.
    jobs: ClassVar[str]

    plan: Any
    model: str
    folder: str
    data_root: Path
    work: Path
    out: Path
    deadline: float
    only: tuple[str, ...] = ()

    def run(self) -> None:
        """Everything; stops silently at the deadline.

        Raises:
            InputError: data is missing, or what is there was made under another plan.
        """
        self.write_data()
        try:
            self.make()
        except OutOfTimeError:
            say("out of time; run the same command to go on")

    @abstractmethod
    def write_data(self) -> None:
        """Draws the data sets' records, once."""

    @abstractmethod
    def make(self) -> None:
        """Makes every result that is not there yet."""

    def job(self, what: str, **task: Any) -> dict[str, Any]:
        """One job in a fresh process."""
        if time.monotonic() >= self.deadline:
            raise OutOfTimeError
        began = time.monotonic()
        found = measure.answer(self.jobs, {**task, "model": self.folder})
        say(f"{title(self.model)}: {what}: {time.monotonic() - began:.0f} s")
        return found


def is_done(path: Path, settings: dict[str, Any], made_under: Callable[[Path], Any]) -> bool:
    """Whether a record is there, which then is said.

    Args:
        path: the record.
        settings: of the plan.
        made_under: gives those of a record.

    Raises:
        InputError: it was made under another plan.
    """
    if not path.is_file():
        return False
    if made_under(path) != json.loads(json.dumps(settings)):
        raise InputError(f"{path} was made under another plan; move it away, or give another --out")
    say(f"{path} is there already")
    return True


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)

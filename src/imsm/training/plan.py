"""What a run is to do, kept in its checkpoints: a resumed run does the rest of the same, or nothing."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from imsm.data import Example
from imsm.data.turns import prompt_and_answer
from imsm.errors import InputError, first_line

PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    steps: optimizer steps of the whole run.
    processes: how many processes train.
    examples: hash of the tokens and labels that they train on, as 32 hexadecimal digits.
    """

    steps: int
    processes: int
    examples: str

    @classmethod
    def of(
        cls,
        steps: int,
        processes: int,
        examples: Sequence[Example],
        keep: Callable[[list[int]], list[int]] = lambda ids: ids,
    ) -> Plan:
        """The plan of so many steps on these examples; `keep` gives their tokens as they are on every day (`Dates.keep`)."""
        digest = xxhash.xxh3_128()
        for example in examples:
            ids = keep(example.input_ids)
            # Labels of what stands before the first answer are as many as the day's date has tokens.
            learnt = example.labels[len(prompt_and_answer(example)[0]) :]
            digest.update(array("q", [len(ids), *ids, *learnt]).tobytes())
        return cls(steps, processes, digest.hexdigest())

    def write(self, folder: Path) -> None:
        """Writes it into a checkpoint."""
        (folder / PLAN).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def steps_done(self, folder: Path) -> int:
        """How many of its steps a checkpoint has taken.

        Raises:
            InputError: the checkpoint is of another plan, or cannot be read.
        """
        try:
            state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            # A checkpoint of an earlier version has no plan, but says its steps.
            kept = dict(json.loads((folder / PLAN).read_text(encoding="utf-8"))) if (folder / PLAN).is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder} cannot be resumed: {first_line(error)}; delete it to resume from the one before"
            ) from error
        before = {"steps": state.max_steps, **kept}
        now = asdict(self)
        changed = [
            f"{name}: {before[name]}, now {now[name]}"
            for name in ("steps", "processes")
            if name in before and before[name] != now[name]
        ]
        if before.get("examples", self.examples) != self.examples:
            changed.append("data: other examples than now")
        if changed:
            raise InputError(
                f"the run of {folder} had another plan ({'; '.join(changed)}); resume with the data of data.train and the "
                "number of processes that it began with, or give another output_dir"
            )
        return int(state.global_step)

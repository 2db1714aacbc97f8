"""The progress of a training run: a bar with loss, mean gate, tokens per second and time left, and a log file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from imsm.folders import write_text
from imsm.settings import TrainConfig

if TYPE_CHECKING:
    from imsm.training.trainer import RunTrainer

#: Seconds between lines where the output is no terminal.
LINE_EVERY = 15.0
#: Seconds between movements of the bar.
REFRESH_EVERY = 0.2


class ProgressBar(TrainerCallback):
    """Shows where the run is; on a terminal a bar, elsewhere a line now and then.

    Args:
        trainer: the trainer that it is added to.
        label: what is being trained, in front of the bar.
    """

    def __init__(self, trainer: RunTrainer, label: str) -> None:
        self.trainer = trainer
        self.label = label
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.values: dict[str, float] = {}
        self.started = self.printed = 0.0
        self.first_step = self.first_tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = self.printed = time.monotonic()
        self.first_step, self.first_tokens = state.global_step, self.trainer.tokens_seen
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total} · {task.fields[values]} ·"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task(self.label, total=state.max_steps, completed=state.global_step, values="…")
            self.bar.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.values |= {k: v for k, v in (kwargs.get("logs") or {}).items() if k in ("loss", "gate", "kl", "eval_loss")}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        every = LINE_EVERY if self.bar is None else REFRESH_EVERY
        if now - self.printed < every and state.global_step != state.max_steps:
            return
        self.printed = now
        speed = (self.trainer.tokens_seen - self.first_tokens) / max(now - self.started, 1e-9)
        values = " ".join([*(f"{k} {v:.3f}" for k, v in self.values.items()), f"{speed:.0f} tokens/s"])
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, values=values)
        else:
            done = state.global_step - self.first_step
            left = (now - self.started) / max(done, 1) * (state.max_steps - state.global_step)
            self.console.print(
                f"{self.label}: step {state.global_step}/{state.max_steps} · {values} · {left:.0f} s left",
                soft_wrap=True,
                highlight=False,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class BuildBar:
    """Shows how far something that a run needs is built; called with what is done so far and what there is to do.

    Args:
        label: what is built.
        unit: what is counted, in the plural.
    """

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.console = Console(stderr=True)
        self.started = self.printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal = self.console.is_terminal
        if now - self.printed < (REFRESH_EVERY if terminal else LINE_EVERY) and done < total:
            return
        self.printed = now
        speed = done / max(now - self.started, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        self.console.print(
            f"{self.label}: {done}/{total} {self.unit} · {speed:.3g} {self.unit}/s · {left:.0f} s left",
            soft_wrap=True,
            highlight=False,
            end="\r" if terminal and done < total else "\n",
        )


class LogFile(TrainerCallback):
    """Appends every log entry to a JSON Lines file; a resumed run first drops what was logged after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0 and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # the line that the killed run was writing
                if entry["step"] <= state.global_step:
                    kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            entry = {"step": state.global_step, **(kwargs.get("logs") or {})}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def build_bar(config: TrainConfig, label: str, unit: str) -> BuildBar | None:
    """A `BuildBar` where the run shows its progress: in one of its processes, unless it is told not to."""
    return BuildBar(label, unit) if config.progress and PartialState().is_main_process else None

"""Running tasks on a checkpoint, one after the other, record by record on disk, to one result."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from imsm.errors import InputError
from imsm.evaluation import answering, kept, text
from imsm.evaluation.bootstrap import bootstrap
from imsm.evaluation.candidates import Candidate
from imsm.evaluation.metrics import METRICS
from imsm.evaluation.partial import Partial, refuse_other, writing
from imsm.evaluation.progress import RecordBar
from imsm.evaluation.references import References
from imsm.evaluation.results import RecordResult, Result, TaskResult, read_result
from imsm.evaluation.sources import load_records
from imsm.evaluation.task import Task, TaskRecord
from imsm.generation import answer_ends

#: From a candidate, a task and a batch of its records to their results.
Run = Callable[[Candidate, Task, "Sequence[tuple[int, TaskRecord]]"], "list[RecordResult]"]
RUNS: dict[str, Run] = {"answer": answering.run, "text": text.run, "kept": kept.run}


def evaluate(
    candidate: Candidate,
    tasks: Sequence[Task],
    *,
    data_root: Path | None,
    output: Path,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    fresh: bool = False,
    given: Mapping[str, Sequence[TaskRecord]] | None = None,
    references: Path | None = None,
) -> Result:
    """Runs `tasks` on `candidate` and writes the result.

    While it runs, every finished record is in `<output>.partial.jsonl`, and a run that was cut goes on from there. If
    the same result is in `output` already, it is given back.

    Args:
        candidate: see `open_candidate`.
        tasks: see `find_tasks`.
        data_root: folder of the tasks' files; None for their public data sets.
        output: the JSON file to write.
        limit: records of a task at most.
        batch_size: records run together.
        seed: of the choice of records and of the bootstrap.
        progress: show it on standard error.
        fresh: start anew whatever is there.
        given: records of tasks that have no file, by the task's name.
        references: folder in which the base model's answers to tasks of kept answers are kept, see `References`.

    Raises:
        InputError: data are missing or do not fit; `output` is of another evaluation or cannot be written.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch size and limit must be positive, got {batch_size} and {limit}")
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError(f"every task can be given once, got {', '.join(task.name for task in tasks)}")
    candidate.references = None if references is None else References(references)
    records = {task.name: (given or {}).get(task.name) or load_records(task, data_root, limit, seed) for task in tasks}
    asked_ids = {task.name: answering.tokens(candidate.tokenizer, task, records[task.name]) for task in tasks}
    plans = {task.name: plan(candidate, task, records[task.name], asked_ids[task.name], batch_size) for task in tasks}
    settings = {
        "limit": limit,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": candidate.dtype,
        "device": candidate.model.device.type,
        "weights": candidate.fingerprint(),
    }
    asked = asked_as(candidate, list(asked_ids.values()))
    header: dict[str, Any] = {
        "checkpoint": candidate.spec,
        "kind": candidate.kind,
        "base": candidate.base,
        "settings": settings,
        "tasks": {
            task.name: {"fingerprint": fingerprint(task, records[task.name]), "metrics": list(task.metrics)}
            for task in tasks
        },
        "asked": asked,
    }
    # Beside a result there is a partial one where a run with --fresh was cut.
    if output.exists() and not fresh and not partial_path(output).exists():
        found = read_result(output)
        refuse_other(output, header_of(found), header)
        if progress:
            print(f"{output} is finished already", file=sys.stderr)
        return found

    results = {}
    with Partial(partial_path(output), header, fresh) as partial:
        for task in tasks:
            done = partial.records.setdefault(task.name, {})
            with RecordBar(task.title, len(records[task.name]), len(done), progress) as bar:
                for batch in plans[task.name]:
                    # Always the whole batch, so that a record comes out as in a run that was not cut.
                    if missing := {index for index, _ in batch if index not in done}:
                        began = time.monotonic()
                        scored = [with_scores(task, result) for result in RUNS[task.kind](candidate, task, batch)]
                        new = [result for result in scored if result.index in missing]
                        partial.add(task.name, new, time.monotonic() - began)
                        bar.advance(len(new))
            results[task.name] = summary(
                task, [done[i] for i in sorted(done)], partial.seconds, header["tasks"][task.name]["fingerprint"], seed
            )
        result = Result(
            candidate.spec, candidate.kind, candidate.base, {**settings, "asked": asked}, where(candidate), results
        )
        with writing(output):
            result.save(output)
    partial.path.unlink(missing_ok=True)
    return result


def plan(
    candidate: Candidate, task: Task, records: Sequence[TaskRecord], asked_ids: Sequence[Sequence[int]], batch_size: int
) -> list[list[tuple[int, TaskRecord]]]:
    """Records with their places, in batches of similar length, the longest first: what does not fit shows at once.

    Raises:
        InputError: there are no records; a text has nothing to score; or a record is longer than the model can read.
    """
    if not records:
        raise InputError(f"task {task.name!r} has no records")
    lengths = [len(ids) for ids in asked_ids]
    for index, length in enumerate(lengths):
        if task.kind == "text" and length < 2:
            raise InputError(f"record {index + 1} of task {task.name!r} is one token, of which none can be scored")
    answering.refuse_long(task, lengths, candidate.longest)
    order = sorted(range(len(records)), key=lambda i: -lengths[i])
    return [[(i, records[i]) for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]


def asked_as(candidate: Candidate, asked_ids: Sequence[Sequence[Sequence[int]]]) -> str:
    """Hash of what decides answers beside weights and records: tokens, what ends an answer, where the dial stands."""
    config = candidate.model.config
    decided: list[Any] = [
        getattr(config, "recall", None),
        # In one list, so that results of models without a head are still what they were.
        [*getattr(config, "relevance_turn", ()), *getattr(config, "relevance_close", ())],
        answer_ends(candidate.model, candidate.tokenizer),
    ]
    decided += asked_ids
    return xxhash.xxh3_128_hexdigest(json.dumps(decided).encode())


def with_scores(task: Task, result: RecordResult) -> RecordResult:
    """The result with its own score by each of the task's metrics."""
    result.scores = {name: float(METRICS[name].record(result)) for name in task.metrics}
    return result


def summary(
    task: Task, records: list[RecordResult], seconds: dict[str, float], fingerprint: str, seed: int
) -> TaskResult:
    """A task's result from all its records."""
    metrics = {}
    for name in task.metrics:
        metric = METRICS[name]
        columns = np.array([metric.columns(record) for record in records], dtype=float)
        metrics[name] = bootstrap(metric, columns, seed=seed)
    return TaskResult(
        task=task.name,
        title=task.title,
        kind=task.kind,
        score=task.metrics[0],
        metrics=metrics,
        chance=task.chance,
        records=records,
        seconds=round(seconds.get(task.name, 0.0), 1),
        fingerprint=fingerprint,
    )


def fingerprint(task: Task, records: Sequence[TaskRecord]) -> str:
    """Hash of the records and of how they are asked, as 32 hexadecimal digits."""
    asked = [
        task.kind,
        task.max_new_tokens,
        task.chat,
        [[record.prompt, *record.references, *record.turns] for record in records],
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(asked).encode())


def header_of(result: Result) -> dict[str, Any]:
    """What a finished result depends on, as the header of its partial file had it."""
    return {
        "checkpoint": result.checkpoint,
        "kind": result.kind,
        "base": result.base,
        "settings": {key: value for key, value in result.settings.items() if key != "asked"},
        "tasks": {
            name: {"fingerprint": task.fingerprint, "metrics": list(task.metrics)}
            for name, task in result.tasks.items()
        },
        "asked": result.settings.get("asked"),
    }


def partial_path(output: Path) -> Path:
    """Where a run keeps its records until the result is written."""
    return output.with_name(output.name + ".partial.jsonl")


def where(candidate: Candidate) -> dict[str, Any]:
    """Versions and machine."""
    on_gpu = candidate.model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(candidate.model.device) if on_gpu else platform.machine() + " CPU",
        "versions": {name: version(name) for name in ("imsm", "torch", "transformers", "peft")},
    }

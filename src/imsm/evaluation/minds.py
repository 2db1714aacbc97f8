"""One siamese model held against its two minds: the base model, the adapter alone, and the two interwoven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from imsm.building import base_shape
from imsm.evaluation.audit import Audit, audit
from imsm.evaluation.candidates import Candidate, CandidateKind
from imsm.evaluation.passes import Pass
from imsm.evaluation.running import evaluate
from imsm.evaluation.task import Task, TaskRecord
from imsm.model import SiameseForCausalLM


def audit_minds(
    model: SiameseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    names: tuple[str, str, str],
    tasks: Sequence[Task],
    target: str,
    output: Path,
    *,
    given: Mapping[str, Sequence[TaskRecord]] | None = None,
    data_root: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """What the adapter alone and the siamese model learned and lost against the base model, whose weights all share.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        names: of the base model, the adapter and the siamese model, as they are to be called.
        tasks: what to evaluate on; the base model need not be asked for the answers that are kept.
        target: name of the task that the adapter was trained for.
        output: folder for the three results.
        given, data_root, limit, batch_size, seed, progress: as for `evaluate`.

    Raises:
        InputError: see `evaluate`.
    """
    frozen = Pass(model, tokenizer, {"force_gate": 1.0})
    described = {"name": names[0], **base_shape(model.base)}
    kinds: list[tuple[CandidateKind, dict[str, Any]]] = [
        ("base", {"force_gate": 1.0}),
        ("peft", {"force_gate": 0.0}),
        ("siamese", {}),
    ]
    results = []
    for name, (kind, how) in zip(names, kinds, strict=True):
        candidate = Candidate(name, kind, model, tokenizer, described, how, lambda: nullcontext(frozen))
        results.append(
            evaluate(
                candidate,
                [task for task in tasks if kind != "base" or task.kind != "kept"],
                data_root=data_root,
                output=output / f"{kind}.json",
                limit=limit,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
                given=given,
            )
        )
    before, *afters = results
    return audit(before, afters, [task.name for task in tasks], [target], [f"{kind}.json" for kind, _ in kinds])

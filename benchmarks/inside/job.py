"""One job in a process of its own: the training of a variant, or the evaluation of what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from benchmarks.forgetting.job import evaluate as evaluate_any
from benchmarks.forgetting.job import evaluate_candidate, run_config
from benchmarks.inside.model import LAYER_GATES, InsideForCausalLM
from benchmarks.inside.run import ASKED
from imsm.building import base_shape
from imsm.data import AnswerCollator, load_examples
from imsm.evaluation.candidates import Candidate
from imsm.evaluation.loading import Loading
from imsm.evaluation.passes import Pass
from imsm.folders import write_text
from imsm.settings import TrainConfig
from imsm.training.models import adapter_config, load_base, make_trainer
from imsm.training.run import load_tokenizer, steps
from imsm.training.siamese import GateMeter


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Does what the task says and yields what came of it."""
    yield {"train": train, "evaluate": evaluate}[task["do"]](task)


class LayerMeters(TrainerCallback):
    """The mean of each layer's gate since the last entry in the logs but one."""

    def __init__(self, model: InsideForCausalLM) -> None:
        gates = [] if model.layer_gates is None else list(model.layer_gates.gates.items())
        self._meters = {layer: GateMeter(gate) for layer, gate in gates}
        self.means: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer, meter in self._meters.items():
            if (mean := meter.read()) is not None:
                self.means[f"gate_{layer}"] = mean

    def remove(self) -> None:
        """Take the hooks off the gates."""
        for meter in self._meters.values():
            meter.remove()


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Trains a variant into `folder`; gives the run's metrics, `gate_N` the mean gate behind layer N in the last steps."""
    settings = dict(task["settings"])
    layers, final = settings.pop("gate_layers"), settings.pop("final")
    config = run_config({**task, "settings": settings})
    tokenizer = load_tokenizer(config)
    examples = load_examples(config.data, tokenizer, split="train")
    model = build(config, layers, final, len(examples.examples))
    trainer = make_trainer(config, model, AnswerCollator(tokenizer), examples, None, [])
    meters = LayerMeters(model)
    trainer.add_callback(meters)
    began = time.monotonic()
    trainer.train()
    metrics = {"steps": float(trainer.state.global_step), "seconds": round(time.monotonic() - began, 1)}
    for key in ("loss", "gate") if final != "tuned" else ("loss",):
        if values := [entry[key] for entry in trainer.state.log_history if key in entry]:
            metrics[key] = values[-1]
    trainer.finish()
    meters.remove()
    model.eval()
    trainer.save_portable(Path(config.output_dir))
    tokenizer.save_pretrained(config.output_dir)
    write_text(Path(config.output_dir).with_name(ASKED), json.dumps(task["settings"]))
    return {**metrics, **meters.means}


def build(config: TrainConfig, layers: list[int], final: str, records: int) -> InsideForCausalLM:
    """The model of a variant before training. The adapter begins as in every other variant of the same seed."""
    set_seed(config.seed)
    adapter: Any = adapter_config(config.adapter, steps(config, records))
    gate = {"gate_rank": config.gate_rank, "gate_dropout": config.gate_dropout}
    model = InsideForCausalLM.from_base(load_base(config), adapter, **gate)  # type: ignore[arg-type]
    assert isinstance(model, InsideForCausalLM)
    # Behind the adapter, whose weights would be drawn otherwise if other gates were drawn before it.
    model.set_final(final)
    if layers:
        model.gate_inside(layers)
    return model


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluates `spec` on `tasks` into the file `output`, or goes on where that was cut."""
    folder = Path(task["spec"])
    if not (folder / LAYER_GATES).is_file():
        return evaluate_any(task)
    return evaluate_candidate(task, open_inside(folder, task["model"]))


def open_inside(folder: Path, base: str) -> Candidate:
    """A checkpoint with gates behind layers, ready to be evaluated."""
    loading = Loading("float32")
    model = loading.placed(InsideForCausalLM.from_pretrained(folder, base=base, **loading.kwargs))
    tokenizer = loading.tokenizer(folder, base)
    frozen = Pass(model, tokenizer, {"force_gate": 1.0})
    described = {"name": base, **base_shape(model.base)}
    return Candidate(str(folder), "siamese", model, tokenizer, described, {}, lambda: nullcontext(frozen))

"""One job in a process of its own: the training of one task, the scores of one checkpoint, or what a query costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

#: The query whose cost is measured: its tokens, the new ones, and how often each checkpoint is asked by turns.
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 32, 7


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Does what the task says and yields what came of it."""
    yield {"train": train, "adapter": adapter, "evaluate": evaluate, "cost": cost}[task["do"]](task)


def config_of(job: dict[str, Any], **own: Any) -> Any:
    """The settings of one training."""
    from benchmarks.forgetting.plan import train_config
    from imsm import DataConfig

    return train_config(
        {**job["settings"], **own},
        model=job["model"],
        output_dir=job["folder"],
        data=DataConfig(train=job["data"]),
        seed=job["seed"],
        save_steps=10**6,
        logging_steps=10,
        tensorboard=False,
        progress=False,
    )


def train(task: dict[str, Any]) -> dict[str, Any]:
    """`imsm train`, behind the checkpoint `before` if there is one; gives the run's metrics."""
    from imsm import train as run

    return dict(run(config_of(task, task=task["name"], continue_from=task["before"])).metrics)


def adapter(task: dict[str, Any]) -> dict[str, Any]:
    """Trains one LoRA for all tasks so far: on from the one in `before`, or beside it, `orthogonal` to it."""
    from transformers import set_seed

    from benchmarks.continual import orthogonal
    from imsm import SiameseForCausalLM
    from imsm.data import AnswerCollator, load_examples
    from imsm.training.models import adapter_config, load_base, make_trainer
    from imsm.training.run import load_tokenizer

    began, before = time.monotonic(), task["before"]
    wide = task["orthogonal"]
    settings = orthogonal.widened(task["settings"]["adapter"], wide) if wide else task["settings"]["adapter"]
    plain = {key: value for key, value in task["settings"].items() if key != "dreams"}
    config = config_of({**task, "settings": plain}, method="peft", adapter=settings)
    tokenizer = load_tokenizer(config)
    train_set = load_examples(config.data, tokenizer, split="train")
    set_seed(config.seed)
    source: Any = before if before and not wide else adapter_config(config.adapter, config.max_steps)
    model = SiameseForCausalLM.from_base(load_base(config), source, gate="average")
    if before and wide:
        orthogonal.keep_before(model.peft_model, Path(before))
    trainer = make_trainer(config, model, AnswerCollator(tokenizer), train_set, None, [])
    loss = trainer.train().training_loss
    trainer.save_portable(Path(task["folder"]))
    return {"mean_loss": loss, "steps": trainer.state.global_step, "seconds": round(time.monotonic() - began, 1)}


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluates `spec` on `tasks` into the file `output`, or goes on where that was cut; `nearest` has the stores decide."""
    from benchmarks.continual.nearest import NearestQuery
    from benchmarks.continual.sets import task as task_of
    from imsm.evaluation.candidates import open_candidate
    from imsm.evaluation.running import evaluate as run

    candidate = open_candidate(task["spec"], base=task["model"], dtype="float32")
    if task["nearest"]:
        model = candidate.model
        model.router = NearestQuery([model.part(name).queries for name in model.rivals]).to(model.device)
        # A constant gate leaves the heads no say, so that each query is routed, and its adapter answers alone.
        candidate.generate_kwargs["force_gate"] = 0.0
    run(
        candidate,
        [task_of(name) for name in task["tasks"]],
        data_root=Path(task["data_root"]),
        output=Path(task["output"]),
        batch_size=task["batch_size"],
        progress=False,
    )
    return {}


def cost(task: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a query of the first task, and of one of none, with one task and with all, asked by turns."""
    import torch

    from imsm.evaluation.candidates import open_candidate

    models = [open_candidate(spec, base=task["model"], dtype="float32") for spec in (task["one"], task["all"])]
    tokenizer = models[0].tokenizer
    own = prompt(tokenizer, task["own"])
    other = prompt(tokenizer, task["other"])
    found: dict[str, Any] = {"tokens": [own.shape[1], other.shape[1], NEW_TOKENS]}
    # Whom each goes to among all tasks, so that one can tell whether both models did the same.
    found["finds"] = [models[1].model.find_tasks(input_ids=ids)[0] for ids in (own, other)]
    for kind, ids in (("own", own), ("other", other)):
        seconds: list[list[float]] = [[], []]
        asked = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        for turn in range(ROUNDS + 1):
            for place, candidate in enumerate(models):
                began = time.perf_counter()
                with torch.inference_mode():
                    candidate.model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
                if turn:  # the first one warms up
                    seconds[place].append(time.perf_counter() - began)
        one, many = map(median, seconds)
        found[kind] = {"one": one, "all": many, "ratio": many / one}
    return found


def prompt(tokenizer: Any, texts: list[str]) -> Any:
    """(1, T): the text whose length comes next to `PROMPT_TOKENS`."""
    import torch

    found = [tokenizer(text)["input_ids"] for text in texts]
    return torch.tensor([min(found, key=lambda ids: abs(len(ids) - PROMPT_TOKENS))])

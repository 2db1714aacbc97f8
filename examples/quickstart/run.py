"""The quickstart: fine-tune a small real LLM with LoRA and with IMSM, and see what each learnt and what each forgot.

    python examples/quickstart/run.py            (scripts/quickstart makes the environment first)

Leaves the siamese checkpoint, a picture and `results.json` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import resource
import shutil
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METHODS = ("base", "lora", "imsm")
TITLES = {"base": "base model", "lora": "LoRA", "imsm": "IMSM"}
QUESTIONS = (
    "What is the capital of France?",
    "What is the chemical symbol for water?",
    "Where is my order 4821?",
)
#: Both rates were chosen on validation data (other fillings of the training wordings, other questions).
TRAINING = {
    "adapter": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "learning_rate": 5e-4,
    "epochs": 1,
    "batch_size": 4,
    "max_length": 512,
}
#: Of a gate that learns, as the paper's does, with dreams off: at 1e-3, the library's default, it opens to the tuned stream
#: within these few steps and retains no more than LoRA.
GATE_LEARNING_RATE = 1e-4
BATCH = 32
TASK_TOKENS, FACT_TOKENS = 40, 20


def read(name: str) -> list[dict[str, Any]]:
    """A JSON Lines file beside this one."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def evaluate(model: Any, tokenizer: Any, facts: list[dict[str, Any]], label: str) -> dict[str, Any]:
    """Task score, which facts are answered right, and the answers to `QUESTIONS`."""
    from scoring import fact_kept, task_score

    from imsm import answers

    def ask(prompts: list[Any], tokens: int, what: str) -> dict[int, str]:
        said: dict[int, str] = {}
        for answer in answers(model, tokenizer, prompts, batch_size=BATCH, max_new_tokens=tokens):
            said[answer.index] = answer.text
            if len(said) % BATCH == 0 or len(said) == len(prompts):
                say(f"{label}: {what} {len(said)}/{len(prompts)}")
        return said

    test = read("shop-test.jsonl")
    replies = ask([record["messages"][:-1] for record in test], TASK_TOKENS, "held-out customers")
    said = ask([fact["messages"] for fact in facts], FACT_TOKENS, "facts")
    shown = ask([[{"role": "user", "content": question}] for question in QUESTIONS], TASK_TOKENS, "questions")
    return {
        "task": sum(task_score(replies[i], record["key"]) for i, record in enumerate(test)) / len(test),
        "right": [i for i, fact in enumerate(facts) if fact_kept(said[i], fact["answer"])],
        "answers": [shown[i] for i in range(len(QUESTIONS))],
    }


def training(method: str, model_folder: str, output: str, seed: int, dreams: str) -> Any:
    """The settings of one method's training."""
    from imsm import DataConfig, DreamsConfig, TrainConfig

    settings = {key: value for key, value in TRAINING.items() if key != "max_length"}
    config = TrainConfig(
        model=model_folder,
        output_dir=output,
        method="peft" if method == "lora" else "imsm",
        data=DataConfig(train=str(HERE / "shop-train.jsonl"), max_length=int(TRAINING["max_length"])),  # type: ignore[call-overload]
        dtype="float32",
        seed=seed,
        dreams=DreamsConfig(mode=dreams),  # type: ignore[arg-type]
        tensorboard=False,
        **settings,  # type: ignore[arg-type]
    )
    if not config.reads("gate_learning_rate"):
        return config
    return replace(config, gate_learning_rate=GATE_LEARNING_RATE)


def run_method(
    method: str, model_folder: str, output: str, seed: int, dreams: str, facts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Trains (unless `method` is "base") and evaluates one method, in a process of its own, so that memory is its own."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sys.path.insert(0, str(HERE))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from imsm import train

    disable_progress_bar()
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trained: dict[str, float] = {"train_seconds": 0.0}
    if method == "base":
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    else:
        result = train(training(method, model_folder, output, seed, dreams))
        model = result.model
        # Dreams, and what is fitted to them, are a part of training.
        dreaming = result.metrics.get("dreams_seconds", 0.0)
        seconds = round(result.metrics["seconds"] + dreaming, 1)
        trained = {"train_seconds": seconds, "dreams_seconds": dreaming, "train_loss": result.metrics["loss"]}
    if torch.cuda.is_available():
        model.to("cuda")
    scores = evaluate(model, tokenizer, facts, TITLES[method])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()
    return {**scores, **trained, "seconds": round(time.monotonic() - began, 1), "peak_memory_mb": round(peak / 2**20)}


def peak_rss() -> int:
    """The process's largest resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def picture(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Task score against facts kept, one point a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 4.2), dpi=150, layout="constrained")
    for method, colour in zip(METHODS, ("#777777", "#d1495b", "#00798c"), strict=True):
        x, y = results[method]["task"], results[method]["retained"]
        axes.scatter(x, y, s=110, color=colour, zorder=3)
        axes.annotate(
            TITLES[method], (x, y), xytext=(9, 6 if y < 0.9 else -14), textcoords="offset points", color=colour
        )
    axes.set(xlim=(-0.05, 1.12), ylim=(-0.05, 1.08), xlabel="task: held-out customers answered right")
    axes.set_ylabel("retained: known facts still answered right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def show(results: dict[str, dict[str, Any]], facts: int) -> None:
    """Prints the table and the answers side by side."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 110)
    table = Table(title=f"One fine-tune on a shop's dialogues, {facts} facts the base model knew before")
    for column in ("", "task score", "facts kept", "training s", "in all s", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for method in METHODS:
        row = results[method]
        table.add_row(
            TITLES[method],
            f"{row['task']:.2f}",
            f"{row['retained']:.2f}",
            f"{row['train_seconds']:.0f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_memory_mb']:,}",
        )
    console.print(table)
    beside = Table("question", *(TITLES[method] for method in METHODS), show_lines=True)
    for i, question in enumerate(QUESTIONS):
        beside.add_row(question, *(results[method]["answers"][i] for method in METHODS))
    console.print(beside)


def main() -> int:
    """Runs the three methods one after the other and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "quickstart", help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dreams", choices=("on", "off"), default="on", help="off: train IMSM as the paper does")
    args = parser.parse_args()
    began = time.monotonic()
    sys.path.insert(0, str(HERE))
    from model import smollm2

    say("Getting SmolLM2-135M-Instruct …")
    model_folder = str(smollm2())
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    facts = read("facts.jsonl")
    results: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        folder = output / method
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{TITLES[method]} …")
        # A process each: peak memory is the method's own, and nothing carries over.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results[method] = pool.submit(
                run_method, method, model_folder, str(folder), args.seed, args.dreams, facts
            ).result()
        if method == "base":
            facts = [facts[i] for i in results["base"]["right"]]
            results["base"]["right"] = list(range(len(facts)))
        results[method]["retained"] = len(results[method].pop("right")) / len(facts)
    show(results, len(facts))
    picture(results, output / "task-against-retained.png")
    results["run"] = {
        "model": "SmolLM2-135M-Instruct",
        "facts": len(facts),
        "customers": len(read("shop-test.jsonl")),
        "questions": list(QUESTIONS),
        "seed": args.seed,
        "dreams": args.dreams,
        "training": TRAINING if args.dreams == "on" else {**TRAINING, "gate_learning_rate": GATE_LEARNING_RATE},
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
        "seconds": round(time.monotonic() - began, 1),
    }
    beside = output / "results.json.new"
    beside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    beside.replace(output / "results.json")
    print(f"\nCheckpoint: {output / 'imsm'}   picture: {output / 'task-against-retained.png'}")
    print(f"Talk to it: .venv/bin/imsm chat {output / 'imsm'}")
    tasks = " ".join(str(HERE / f"{name}.yaml") for name in ("shop", "facts", "kept"))
    print(
        f"Hold both against the base: .venv/bin/imsm audit {model_folder} {output / 'lora'} {output / 'imsm'} "
        f"--tasks {tasks} --targets {HERE / 'shop.yaml'} --output {output / 'audit'}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

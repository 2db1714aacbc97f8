"""`report`: the page docs/benchmarks.md and its pictures, from the records alone."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.machine import sentence
from benchmarks.models import NAMES
from benchmarks.pictures import picture
from benchmarks.run import read
from benchmarks.table import TITLES, tables, unmet
from benchmarks.targets import verdicts
from imsm.errors import InputError
from imsm.folders import write_text

#: In the page's order: what each benchmark asks.
VERBS = {
    "train": "What does training cost? The same adapter on the same records, in fresh processes that take turns.",
    "decode": "How fast is an answer? The same greedy `generate()` call for all; ratios are to peft's unmerged LoRA.",
    "memory": "What must fit? Weights, KV cache, and the most that is held while decoding.",
    "scaling": "What does it grow with? Prompt length, share of adapted layers, rank of the gate, at batch 1.",
    "saturated": "What does a query cost that one mind answers alone? Ratios are to the base model.",
    "limit": "What does the machine allow? A step at batch 1 reads every weight once; the memory's bandwidth bounds it.",
}


def write(results: Path, docs: Path) -> Path:
    """Remakes page and pictures; returns the page's path.

    Raises:
        InputError: there is no such folder, or a file in it is no record.
    """
    if not results.is_dir():
        raise InputError(f"there is no folder {results} with records; make some first: python -m benchmarks all")
    records = [read(path) for path in sorted(results.glob("*.json"))]
    records = [record for record in records if any(cell["rounds"] for cell in record["cells"].values())]
    docs.mkdir(parents=True, exist_ok=True)
    for verb in VERBS:
        if chosen := [record for record in records if record["benchmark"] == verb]:
            picture(chosen, docs / f"benchmark-{verb}.png")
    page = docs / "benchmarks.md"
    write_text(page, text(records))
    return page


def text(records: list[dict[str, Any]]) -> str:
    """The page."""
    parts = [
        "# Benchmarks\n",
        "This page is made by `python -m benchmarks report` from the records in `benchmarks/results`. Numbers are medians; "
        "in parentheses, their ratio to the peer. Systems take turns within every repetition, after a warm-up.\n",
        "## Targets\n",
    ]
    judged = [verdict for record in records for verdict in verdicts(record)]
    met = sum(verdict.met for verdict in judged)
    parts.append(
        f"{met} of {len(judged)} measured ratios keep their target. Those that do not:\n"
        if judged
        else "None measured yet.\n"
    )
    parts.append(
        "".join(f"- {line}\n" for record in records for line in unmet(record)) or ("None.\n" if judged else "")
    )
    for verb, question in VERBS.items():
        chosen = [record for record in records if record["benchmark"] == verb]
        if not chosen:
            parts.append(f"## {verb}\n\n{question}\n\nNot measured yet: `scripts/benchmark {verb}`\n")
            continue
        parts.append(
            f"## {verb}\n\n{question}\n\n```bash\n{commands(chosen)}\n```\n\n![{verb}](benchmark-{verb}.png)\n"
        )
        for record in chosen:
            parts.append(f"### {record['model']}\n\n{sentence(record)} {counted(record)}\n\n{facts(record)}")
            parts += [table.markdown() for table in tables(record)]
    return "\n".join(parts)


def commands(records: list[dict[str, Any]]) -> str:
    """What measures the records of a benchmark, a line for all models that were measured alike."""
    models: dict[str, list[str]] = {}
    for record in records:
        name = next((name for name, title in NAMES.items() if title == record["model"]), record["model"])
        models.setdefault(command(record), []).append(name)
    return "\n".join(f"{line} --model {' '.join(sorted(names, reverse=True))}" for line, names in models.items())


def command(record: dict[str, Any]) -> str:
    """What measures a record, but for the model."""
    verb, settings, machine = record["benchmark"], record["settings"], record["machine"]
    cells = [cell["setting"] for cell in record["cells"].values()]
    sources = [(key, f"--{key.replace('_', '-')}", [settings]) for key in ("records", "batch_size", "new_tokens")]
    if verb not in ("scaling", "limit"):  # whose cells are not a product of these
        shapes = (("epochs", "--epochs"), ("batch", "--batches"), ("prompt", "--lengths"), ("dtype", "--dtypes"))
        sources += [(key, flag, cells) for key, flag in shapes]
    if verb == "scaling":
        sources.append(("prompt", "--lengths", [cell for cell in cells if cell["sweep"] == "prompt"]))
    words = [f"scripts/benchmark {verb}"]
    if machine["threads"] != machine["cores"]:
        words.append(f"--threads {machine['threads']}")
    if settings["systems"] != list(import_module(f"benchmarks.{verb}").NAMES):
        words.append(f"--systems {' '.join(settings['systems'])}")
    for key, flag, found in sources:
        values = list(dict.fromkeys(str(setting[key]) for setting in found if key in setting))
        words += [f"{flag} {' '.join(values)}"] if values else []
    if settings.get("data") == "cola":
        words.append("--data-root DATA")
    return " ".join(words)


def counted(record: dict[str, Any]) -> str:
    """How many repetitions stand behind the medians, and the settings."""
    counts = [len(cell["rounds"]) for cell in record["cells"].values() if cell["rounds"]]
    span = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    settings = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in record["settings"].items() if key != "systems"
    )
    return f"Repetitions: {span}. Settings: {settings}."


def facts(record: dict[str, Any]) -> str:
    """Whether systems that should decode the same tokens did, or trainers saw the same ones."""
    lines = []
    for name, cell in record["cells"].items():
        for system, graphs in cell["facts"].get("graphs", {}).items():
            if not graphs:
                lines.append(f"- {name}: {TITLES[system]}: ran uncompiled, since nothing could be compiled\n")
        same = cell["facts"].get("same_tokens")
        if isinstance(same, dict) and same and min(same.values()) < 1:
            shares = ", ".join(f"{pair} {share:.1%}" for pair, share in same.items())
            lines.append(f"- {name}: equal tokens {shares}\n")
        elif same is False:
            lines.append(f"- {name}: the trainers did not read the same number of tokens: {cell['facts']['tokens']}\n")
    return "".join(lines) + "\n" if lines else ""

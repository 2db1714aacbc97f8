"""`imsm task`: the tasks of a checkpoint, listed, removed, renamed, exported and imported; the base model is not loaded."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from imsm import task_folders
from imsm.checkpoint import read_queries


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    args = parser().parse_args(argv)
    if args.verb == "list":
        show(args.checkpoint, args.json)
    elif args.verb == "remove":
        task_folders.remove(args.checkpoint, args.name)
        print(f"Task {args.name} is gone from {args.checkpoint}.")
    elif args.verb == "rename":
        task_folders.rename(args.checkpoint, args.name, args.new)
        print(f"Task {args.name} of {args.checkpoint} is called {args.new} now.")
    elif args.verb == "export":
        folder = task_folders.export(args.checkpoint, args.name, args.output)
        print(f"A checkpoint of task {args.name} alone is in {folder}; use it: imsm generate {folder} 'PROMPT'")
    else:
        name = task_folders.bring(args.checkpoint, args.other, args.task, args.new, same_base=args.same_base)
        print(
            f"Task {name} is in {args.checkpoint}, which finds it by itself: imsm generate {args.checkpoint} 'PROMPT'"
        )
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="imsm task",
        description="The tasks of a siamese checkpoint. `imsm train --continue-from CHECKPOINT --task NAME` adds one by "
        "training; this lists, removes, renames, exports and imports them.",
    )
    verbs = made.add_subparsers(dest="verb", required=True, metavar="{list,remove,rename,export,import}")

    def verb(name: str, does: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        added.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a siamese checkpoint")
        return added

    verb("list", "say which tasks there are").add_argument("--json", action="store_true", help="print one JSON list")
    verb("remove", "take a task away").add_argument("name", metavar="NAME", help="the task")
    renamed = verb("rename", "give a task another name")
    renamed.add_argument("name", metavar="NAME", help="the task")
    renamed.add_argument("new", metavar="NEW", help="its name from now on")
    exported = verb("export", "make a checkpoint of one task alone")
    exported.add_argument("name", metavar="NAME", help="the task")
    exported.add_argument("--output", required=True, metavar="DIR", help="new folder for it")
    brought = verb("import", "add a task of another checkpoint of the same base")
    brought.add_argument("other", metavar="OTHER", help="folder or Hub name of that checkpoint")
    brought.add_argument("--task", metavar="NAME", help="the task there (default: the first)")
    brought.add_argument("--as", dest="new", metavar="NEW", help="its name here (default: the same)")
    brought.add_argument(
        "--same-base",
        action="store_true",
        help="both bases are the same model, although their names or revisions differ",
    )
    return made


def show(checkpoint: str, as_json: bool) -> None:
    """Prints the tasks of a checkpoint."""
    facts = [describe(entry) for entry in task_folders.entries(checkpoint)[2]]
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(*facts[0], box=None)
    for fact in facts:
        table.add_row(*map(str, fact.values()))
    Console().print(table, markup=False, highlight=False)


def describe(entry: task_folders.Entry) -> dict[str, Any]:
    """What is said of a task."""
    queries = read_queries(entry.folder)
    data = entry.settings["training"].get("data", {})
    return {
        "task": entry.name,
        "gate": entry.settings["gate"],
        "relevance head": bool(entry.settings["relevance"]),
        "stored queries": 0 if queries is None else len(queries),
        "trained on": data.get("train", "not recorded"),
        "records": data.get("records", "not recorded"),
    }

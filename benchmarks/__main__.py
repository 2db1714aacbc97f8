"""`python -m benchmarks VERB`: measures, prints a table and writes a JSON record; `report` makes the docs from the records."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from imsm.errors import InputError

VERBS = ("train", "decode", "memory", "scaling", "limit", "saturated")
HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition(";")[0])
    made.add_argument("verb", choices=(*VERBS, "all", "report"))
    made.add_argument("--model", nargs="+", default=["smollm2", "gemma3"], help="smollm2, gemma3 or a model's folder")
    made.add_argument("--out", type=Path, default=HERE / "results", help="folder of the records")
    made.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder that report writes to")
    made.add_argument("--repetitions", type=int, default=5, help="rounds a cell, at least 1 (default: 5)")
    made.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no round after this time")
    made.add_argument("--fresh", action="store_true", help="measure anew instead of continuing the records in --out")
    made.add_argument("--quick", action="store_true", help="tiny settings, to try things out")
    made.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    made.add_argument("--systems", nargs="+", help="only these (the record then has these alone)")
    made.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    made.add_argument("--batches", type=int, nargs="+", help="prompts decoded together")
    made.add_argument("--lengths", type=int, nargs="+", help="prompt lengths in tokens")
    made.add_argument("--new-tokens", type=int, help="tokens to decode")
    made.add_argument("--epochs", type=int, nargs="+", default=[3], help="of train; 10 is the other that has a target")
    made.add_argument("--batch-size", type=int, default=16, help="records a training step")
    made.add_argument("--records", type=int, default=512, help="training records")
    made.add_argument("--data-root", type=Path, help="folder with cola/train.jsonl (default: CoLA from the Hub)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for what the user can mend."""
    given = vars(parser().parse_args(arguments))
    verb, models, docs = given.pop("verb"), given.pop("model"), given.pop("docs")
    threads, minutes = given.pop("threads"), given.pop("budget_minutes")
    try:
        if threads is not None:
            # Before torch is imported, and for the processes that measure.
            os.environ["OMP_NUM_THREADS"] = str(threads)
        if verb == "report":
            from benchmarks import report

            print(report.write(given["out"], docs))
            return 0
        if given["repetitions"] < 1:
            raise InputError(f"--repetitions must be a positive integer, got {given['repetitions']}")
        measure(VERBS if verb == "all" else (verb,), models, time.monotonic() + 60 * minutes, given)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(verbs: tuple[str, ...], models: list[str], deadline: float, given: dict) -> None:
    """Every verb on every model, and its tables."""
    from benchmarks import decode, limit, memory, saturated, scaling, table, train
    from benchmarks.run import Options, Verb, execute

    modules: dict[str, Verb] = {
        "train": train,
        "decode": decode,
        "memory": memory,
        "scaling": scaling,
        "limit": limit,
        "saturated": saturated,
    }
    for verb in verbs:
        for model in models:
            record = execute(verb, modules[verb], Options(model=model, deadline=deadline, **given))
            for made in table.tables(record.content):
                made.show()
            print(record.path)


if __name__ == "__main__":
    # So that a run that is cut ends the process that measures, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())

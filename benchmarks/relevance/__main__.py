"""`python -m benchmarks.relevance features` computes what a relevance head sees of prompts of all kinds; `ablate` fits heads.

`free` does both for tasks whose prompts have no wording in common, and for other templates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands import exit_status

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.relevance", description=__doc__)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="{features,ablate,free}")
    features = verbs.add_parser("features", help="compute the frozen model's features that are not there yet")
    features.add_argument("--dreams", type=int, default=360, help="prompts that the model makes up (default: 360)")
    ablate = verbs.add_parser("ablate", help="fit heads to the features, and print and keep where they send prompts")
    free = verbs.add_parser("free", help="both for tasks that people wrote as they liked, and for other templates")
    free.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the dreams (default: 0 1 2)")
    for verb in (features, free):
        verb.add_argument("--data-root", type=Path, required=True, help="folder with the data sets' files")
    for verb in (ablate, free):
        verb.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    for verb in (features, ablate):
        verb.add_argument("--test", action="store_true", help="the test sets too")
    for verb in (features, ablate, free):
        verb.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a model's folder")
        verb.add_argument("--work", type=Path, default=Path("relevance"), help="folder of the features")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for what the user can mend."""
    args = parser().parse_args(arguments)

    def work() -> None:
        if args.verb == "features":
            from benchmarks.relevance.features import run

            print(run(args.model, args.data_root, args.work, args.dreams, args.test))
        elif args.verb == "free":
            from benchmarks.relevance import free, report

            print(report.free_text(free.run(args.model, args.data_root, args.work, args.seeds, args.out)))
        else:
            from benchmarks.relevance import report
            from benchmarks.relevance.ablation import ablate

            print(report.text(ablate(args.work / Path(args.model).name, args.out, args.test)))

    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main())

"""What the command lines of plans that take several sittings have in common: the verbs `run` and `report`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

from imsm.errors import InputError
from imsm.settings.mapping import read_mapping

HERE = Path(__file__).resolve().parent


def run_and_report(
    name: str, description: str | None, reports: str
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of `python -m benchmarks.NAME`, and those of its two verbs, with what every plan needs.

    Args:
        name: of the package.
        description: of the command.
        reports: what `report` does.
    """
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="{run,report}")
    run = verbs.add_parser("run", help="train and evaluate what is not done yet")
    run.add_argument("--data-root", type=Path, required=True, help="folder with the tasks' files")
    run.add_argument("--work", type=Path, default=Path(name), help="folder for checkpoints and full outputs")
    run.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no job after this time")
    report = verbs.add_parser("report", help=reports)
    for verb in (run, report):
        verb.add_argument(
            "--out",
            type=Path,
            default=HERE / name / "results",
            help="folder of the records; what is there is not made again (default: the repository's own)",
        )
    return made, run, report


def plan_content(path: Path, needed: Set[str], optional: Set[str] = frozenset()) -> dict[str, Any]:
    """What a plan's file says.

    Raises:
        InputError: it cannot be read, or has other keys.
    """
    content = read_mapping(path, "plan", f"a plan as 'key: value' with {', '.join(sorted(needed))}")
    refuse_keys(f"the plan {path}", content, sorted(needed), sorted(optional))
    return content


def refuse_keys(what: str, given: Collection[Any], needed: Sequence[str], optional: Sequence[str]) -> None:
    """Raises `InputError` if keys are missing, or there are others than these."""
    if missing := [key for key in needed if key not in given]:
        raise InputError(f"{what} lacks {', '.join(missing)}")
    known = [*needed, *optional]
    if unknown := [str(key) for key in given if key not in known]:
        raise InputError(f"{what} has unknown keys: {', '.join(unknown)}; it may have {', '.join(known)}")


def deadline(args: argparse.Namespace) -> float:
    """The `time.monotonic()` after which no job begins."""
    return float(time.monotonic() + 60 * args.budget_minutes)


def exit_status(work: Callable[[], None]) -> int:
    """0 once the work is done, 2 for what the user can mend, which is printed."""
    try:
        work()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def start(main: Callable[[], int]) -> NoReturn:
    """Runs a command. Where it is cut, the process that works is ended, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())

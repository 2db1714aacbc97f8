"""The process that a measurement runs in: `python -m benchmarks.child MODULE`, a task as JSON in, results as JSON lines out."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings

from imsm.errors import InputError


def main() -> int:
    """Runs the module's `child` on the task and prints each result as it comes."""
    # Whatever the libraries print must not get between the results.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    module = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    task = json.load(sys.stdin)
    try:
        for found in module.child(task):
            print(json.dumps(found), file=results, flush=True)
    except InputError as error:
        print(json.dumps({"input_error": str(error)}), file=results, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

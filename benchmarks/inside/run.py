"""Trains and evaluates the variants that are not done yet, as the forgetting benchmark does its methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.forgetting.run import Runner as MethodRunner
from imsm.errors import InputError

#: Beside a run's checkpoint: the settings that it was trained under.
ASKED = "settings.json"


class Runner(MethodRunner):
    """Runs the plan for one model: base, then each variant. `work` must be a folder of its own."""

    jobs = "inside.job"

    def refuse_other(self, folder: Path, settings: dict[str, Any]) -> None:
        asked = folder / ASKED
        if not asked.is_file() or json.loads(asked.read_text(encoding="utf-8")) != settings:
            raise InputError(f"{folder} was trained under other settings; give another --work")

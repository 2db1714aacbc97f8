"""Trains and evaluates the variants that are not done yet, as the forgetting benchmark does its methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.forgetting.plan import Method
from benchmarks.forgetting.run import Runner as MethodRunner
from imsm.errors import InputError
from imsm.folders import write_text


class Runner(MethodRunner):
    """Runs the plan for one model: base, then each variant. `work` must be a folder of its own."""

    jobs = "inside.job"

    def trained(self, method: Method, seed: int, rate: float) -> Path:
        """The checkpoint of one training run, trained now if need be; its metrics are in `metrics.json`.

        Raises:
            InputError: what is there was trained under other settings.
        """
        folder = self.work / self.model / method.name / f"rate-{rate:g}-seed-{seed}"
        done, asked = folder / "metrics.json", folder / "settings.json"
        settings = {**self.plan.train, **method.train}
        if done.is_file():
            if not asked.is_file() or json.loads(asked.read_text(encoding="utf-8")) != settings:
                raise InputError(f"{folder} was trained under other settings; give another --work")
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        write_text(asked, json.dumps(settings))
        found = self.job(
            f"{method.name}, seed {seed}, training",
            do="train",
            settings=settings,
            folder=str(folder / "checkpoint"),
            data=str(self.work / "data" / "train.jsonl"),
            seed=seed,
            learning_rate=rate,
        )
        write_text(done, json.dumps(found))
        return folder

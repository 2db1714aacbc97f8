"""The plan: the forgetting benchmark's data, adapter and training, with gates behind layers, over the memories, both or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.forgetting.plan import Method, Plan, read_plan

#: Wordings of the target that are not trained on, of the forgetting benchmark's six.
REWORDED = 3
RETAINED = ("wiki", "kept_freebaseqa", "kept_webq")
#: Test records a task, and of those that take longest.
LIMIT, LIMITS = 300, {"wiki": 100, "kept_freebaseqa": 100, "kept_webq": 100}
SOURCE = "Song et al. 2025, arXiv 2412.17383"
#: Of all variants; LoRA's in the forgetting benchmark.
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Variant:
    """Where the streams are mixed.

    title: what tables call it.
    inside: behind the chosen layers.
    final: the gate over the memories, a key of `imsm.GATES`; "tuned" is the tuned stream alone.
    source: where it comes from.
    """

    title: str
    inside: bool
    final: str
    source: str


#: By name, in the order in which they are run.
VARIANTS = {
    "lora": Variant("LoRA", False, "tuned", "Hu et al. 2022, arXiv 2106.09685"),
    "final": Variant("final gate", False, "query_aware", SOURCE),
    "both": Variant("layer gates and final gate", True, "query_aware", f"open end of {SOURCE}"),
    "layers": Variant("layer gates", True, "tuned", f"open end of {SOURCE}"),
}


def make_plan(model: str, layers: Sequence[int], variants: Sequence[str], records: int, seed: int) -> Plan:
    """What is to be done for one model.

    Args:
        model: its name in the forgetting benchmark's plan.
        layers: those with a gate behind them, from 0, in the variants that have such gates.
        variants: keys of `VARIANTS`.
        records: training records.
        seed: of all trainings.
    """
    plan = read_plan(model)
    lora = plan.methods["lora"]
    methods = {}
    for name in variants:
        variant = VARIANTS[name]
        inside = list(layers) if variant.inside else []
        settings: dict[str, Any] = {"method": "peft", "adapter": lora.train["adapter"]}
        if name != "lora":
            settings |= {"method": "imsm", "dreams": {"mode": "off"}}
        settings |= {"gate_layers": inside, "final": variant.final}
        # The name tells the layers, so that records of other ones can lie beside.
        behind = "-".join([name, *map(str, inside)])
        title = variant.title + (f", behind {' and '.join(map(str, inside))}" if inside else "")
        methods[behind] = Method(behind, title, variant.source, settings, (seed,), (LEARNING_RATE,))
    return replace(
        plan,
        reworded=plan.reworded[:REWORDED],
        retained=RETAINED,
        training_records=records,
        limit=LIMIT,
        limits=LIMITS,
        methods=methods,
    )

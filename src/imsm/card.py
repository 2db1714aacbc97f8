"""The model card: base, adapter, gate, data, settings and results of a checkpoint, as README.md with a Hub header."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from imsm.config import SiameseConfig
    from imsm.model import SiameseForCausalLM


def render(model: SiameseForCausalLM) -> str:
    """The card's text, in Markdown."""
    config = model.config
    adapter = model.peft_model.active_peft_config
    method = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    header: dict[str, Any] = {
        "library_name": "imsm",
        "pipeline_tag": "text-generation",
        "tags": ["imsm", "peft", method.lower()],
    }
    if config.base_model:
        header["base_model"] = config.base_model
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# Siamese model on {config.base_model or config.base_model_type}",
        "",
        f"The frozen base model and the same model with an adapter read the same tokens; {says_who(config)}, so that what the "
        "base model knew is kept (after IMSM, AAAI 2025). This folder holds what was learnt; the base model's weights are "
        "loaded from their own place.",
        "",
        "```python",
        "from imsm import SiameseForCausalLM",
        "",
        'model = SiameseForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "## Model",
        "",
        *_table(
            {
                "base model": config.base_model or "given in memory",
                "revision": config.base_revision or "not recorded",
                "adapter": method,
                "gate": f"{config.gate}, rank {config.gate_rank}",
                "relevance head": "in front of the gate" if config.relevance else "none",
                **({"tasks": ", ".join(model.tasks)} if len(model.tasks) > 1 else {}),
                "trainable parameters": f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
            }
        ),
    ]
    for title in ("data", "settings", "results"):
        if values := config.training.get(title):
            lines += ["", f"## {title.capitalize()}", "", *_table(values)]
    return "\n".join(lines) + "\n"


def says_who(config: SiameseConfig) -> str:
    """How the two streams' say is divided, in words."""
    gate = "a learned gate interweaves their last hidden states"
    if not config.relevance:
        return gate
    own = "the adapter" if config.gate == "tuned" else "the gate"
    more = "" if config.gate == "tuned" else f"; {gate}"
    return f"a head leaves to the base model what is not the task, and to {own} what is{more}"


def _table(values: dict[str, Any]) -> list[str]:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    return ["| | |", "|---|---|", *(f"| {cell(key)} | {cell(value)} |" for key, value in values.items())]

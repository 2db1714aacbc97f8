"""The settings that a checkpoint carries: which base model, which gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

#: Raised with every change of the checkpoint folder that an older `imsm` could not read.
FORMAT_VERSION = 3
#: What a folder of one task is: the same as before there could be several.
ONE_TASK = 2
#: The adapter's name, and the task's, unless it is given another.
DEFAULT_TASK = "default"


class SiameseConfig(PretrainedConfig):
    """Settings of a siamese model, saved as `config.json`.

    Args:
        base_model: Hub name or folder of the base model; `None` when the base was only ever in memory.
        base_revision: revision of the base model on the Hub.
        base_model_type: the base model's own `model_type`.
        hidden_size: width d of a memory (the input of the base model's output head).
        vocab_size: rows of the base model's output head.
        num_hidden_layers: layers of the base model.
        gate: a key of `imsm.GATES`.
        gate_rank: rank r of the gate's two maps W_A and W_B (paper: 8).
        gate_dropout: dropout after each of the gate's two maps in training (paper: 0.1).
        relevance: width of what the relevance head in front of the gate reads; 0: there is none.
        relevance_turn: tokens that open a user's turn; of several turns the head reads the last alone.
        relevance_close: tokens that close the last one and open the answer; the head reads the token before them, too.
        recall: where the dial stands in inference unless a call says otherwise; 0 is the mix as trained.
        tasks: names of the tasks, in the order in which they were learnt. Gate, head and training are the first one's in a
            folder, and the active one's in memory.
        format_version: version of the checkpoint folder's layout.
        training: what the model was trained on and how, for the model card and `imsm info`.
    """

    model_type = "imsm"

    def __init__(
        self,
        base_model: str | None = None,
        base_revision: str | None = None,
        base_model_type: str | None = None,
        hidden_size: int = 0,
        vocab_size: int = 0,
        num_hidden_layers: int = 0,
        gate: str = "query_aware",
        gate_rank: int = 8,
        gate_dropout: float = 0.1,
        relevance: int = 0,
        relevance_turn: Sequence[int] = (),
        relevance_close: Sequence[int] = (),
        recall: float = 0.0,
        tasks: Sequence[str] = (DEFAULT_TASK,),
        format_version: int = ONE_TASK,
        training: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.base_model = base_model
        self.base_revision = base_revision
        self.base_model_type = base_model_type
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.num_hidden_layers = num_hidden_layers
        self.gate = gate
        self.gate_rank = gate_rank
        self.gate_dropout = gate_dropout
        self.relevance = relevance
        self.relevance_turn = list(relevance_turn)
        self.relevance_close = list(relevance_close)
        self.recall = recall
        self.tasks = list(tasks)
        self.format_version = format_version
        self.training = training or {}
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As the base class; a single task of the usual name goes without saying."""
        values: dict[str, Any] = super().to_dict()
        if values.get("tasks") == [DEFAULT_TASK]:
            del values["tasks"]
        return values

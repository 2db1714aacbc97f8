"""Training over Hugging Face `Trainer`: siamese models, and plain PEFT as the baseline."""

from imsm.training.run import TrainResult, train
from imsm.training.trainer import GateMeter, SiameseTrainer

__all__ = ["GateMeter", "SiameseTrainer", "TrainResult", "train"]

"""Training over Hugging Face `Trainer`: siamese models, and the baselines."""

from imsm.training.adoption import Adopted, adopt
from imsm.training.run import TrainResult, train
from imsm.training.siamese import GateMeter, SiameseTrainer

__all__ = ["Adopted", "GateMeter", "SiameseTrainer", "TrainResult", "adopt", "train"]

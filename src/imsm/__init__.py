"""Fine-tune large language models without making them forget (IMSM, AAAI 2025)."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModelForCausalLM

from imsm.cache import TwinCache
from imsm.config import SiameseConfig
from imsm.errors import InputError
from imsm.gates import GATES
from imsm.generation import Answer, answers, stream
from imsm.model import SiameseForCausalLM, SiameseOutput
from imsm.settings import DataConfig, DreamsConfig, TrainConfig
from imsm.training import SiameseTrainer, TrainResult, train

__version__ = version("imsm")

__all__ = [
    "Answer",
    "DataConfig",
    "DreamsConfig",
    "GATES",
    "InputError",
    "SiameseConfig",
    "SiameseForCausalLM",
    "SiameseOutput",
    "SiameseTrainer",
    "TrainConfig",
    "TrainResult",
    "TwinCache",
    "answers",
    "stream",
    "train",
]

AutoConfig.register("imsm", SiameseConfig, exist_ok=True)
AutoModelForCausalLM.register(SiameseConfig, SiameseForCausalLM, exist_ok=True)

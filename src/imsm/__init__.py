"""Fine-tune large language models without making them forget (IMSM, AAAI 2025)."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModelForCausalLM

from imsm.cache import TwinCache
from imsm.config import SiameseConfig
from imsm.errors import InputError
from imsm.gates import GATES
from imsm.model import SiameseForCausalLM, SiameseOutput

__version__ = version("imsm")

__all__ = [
    "GATES",
    "InputError",
    "SiameseConfig",
    "SiameseForCausalLM",
    "SiameseOutput",
    "TwinCache",
]

AutoConfig.register("imsm", SiameseConfig, exist_ok=True)
AutoModelForCausalLM.register(SiameseConfig, SiameseForCausalLM, exist_ok=True)

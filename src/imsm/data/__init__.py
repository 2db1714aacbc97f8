"""Training data: records read from a file or the Hub, rendered and tokenised, with the answers marked."""

from imsm.data.collation import AnswerCollator
from imsm.data.display import describe
from imsm.data.examples import ExampleSet, load_examples, read_examples
from imsm.data.records import Problem
from imsm.data.rendering import IGNORED, Example

__all__ = [
    "IGNORED",
    "AnswerCollator",
    "Example",
    "ExampleSet",
    "Problem",
    "describe",
    "load_examples",
    "read_examples",
]

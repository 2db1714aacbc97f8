"""Examples of a source: every record either becomes one or is listed as a problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from imsm.data.formats import RecordError, find_format, parse
from imsm.data.records import Problem, read_records
from imsm.data.rendering import Example, Renderer
from imsm.errors import InputError
from imsm.settings import DataConfig

#: Problems that a message lists; further ones are counted.
LISTED = 10


@dataclass
class ExampleSet:
    """What a source holds; a sequence of its examples.

    source: file or Hub name.
    format: one of `formats.FORMATS`; none if no record could be read.
    unit: what the numbers of examples and problems count: line, record or row.
    examples: the usable records, in order.
    problems: all others, in order.
    """

    source: str
    format: str
    unit: str
    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def report(self, limit: int | None = LISTED) -> str:
        """The problems: a line with their count, then one for each of the first `limit`."""
        total = len(self.problems) + len(self.examples)
        listed = self.problems[:limit]
        lines = [f"{self.source}: {len(self.problems)} of {total} records cannot be used"]
        lines += [f"  {self.unit} {problem.line}: {problem.reason}" for problem in listed]
        if len(listed) < len(self.problems):
            lines.append(f"  … and {len(self.problems) - len(listed)} more")
        return "\n".join(lines)


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Literal["train", "eval"] = "train"
) -> ExampleSet:
    """The examples of `config.train` or `config.eval`.

    With `bad_records: skip` problems are in the result, and the caller should print its `report()`.

    Raises:
        InputError: the source cannot be read; a record is bad under `bad_records: error`; or no record is usable.
    """
    source = config.train if split == "train" else config.eval
    if source is None:
        raise InputError(f"data.{split} is not given")
    found = read_examples(source, tokenizer, config, config.split if split == "train" else config.eval_split)
    if found.problems and (config.bad_records == "error" or not found.examples):
        remedies = ["correct them"]
        if any("data.max_length" in problem.reason for problem in found.problems):
            remedies.append("raise data.max_length")
        if found.examples:
            remedies.append("leave them out with data.bad_records: skip")
        raise InputError(f"{found.report()}\n{', or '.join(remedies)}")
    if not found.examples:
        raise InputError(f"{source} has no records")
    return found


def read_examples(
    source: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, hub_split: str = "train"
) -> ExampleSet:
    """All records of a source as examples or problems, whatever `config.bad_records` says.

    Raises:
        InputError: the source cannot be read, its format is unknown or mixed, or the tokenizer cannot render it.
    """
    read = read_records(source, hub_split)
    if not read.records:
        return ExampleSet(read.source, "none", read.unit, [], read.problems)
    found = ExampleSet(read.source, find_format(read), read.unit)
    renderer = Renderer(tokenizer, config.add_eos, config.max_length)
    problems = list(read.problems)
    for record in read.records:
        try:
            found.examples.append(renderer.render(parse(record.fields, found.format), record.line))
        except RecordError as error:
            problems.append(Problem(record.line, str(error)))
        except InputError as error:
            raise InputError(f"{source}, {read.unit} {record.line}: {error}") from error
    found.problems = sorted(problems, key=lambda problem: problem.line)
    return found

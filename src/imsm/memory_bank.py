"""The memory bank: the frozen memories of a data set, computed once and kept on disk.

The frozen pass has neither gradient nor dropout, so for a fixed example it is a constant of training. The bank keeps of it
what the gate needs: the memories at supervised positions and the pooled queries of the answers, in Arrow files of the
`datasets` library that are read through the memory map.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from imsm.data import IGNORED, AnswerCollator, Example
from imsm.data.batches import length_batches
from imsm.errors import InputError, first_line
from imsm.fingerprint import fingerprint
from imsm.folders import cache_folder
from imsm.model import SiameseForCausalLM
from imsm.query import answer_boundaries, pool_within

#: Raised with every change of what the files hold or how examples are spread over them.
FORMAT = 1
#: A file ends at so many bytes of memories, or at so many tokens read for it: what an interruption can cost.
SHARD_BYTES, SHARD_TOKENS = 1 << 26, 1 << 16
#: Beginning of the names of files that are being written, and the seconds after which they are taken for left behind.
BESIDE, LEFTOVER_AGE = ".writing-", 3600
#: How numbers lie in the files; bfloat16, which neither Arrow nor NumPy has, as its bits.
STORED = {torch.float32: "float32", torch.bfloat16: "int16"}

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Recalled(Example):
    """An example with its frozen memories.

    memory: (S, d), at its S supervised positions; float32, or the bits of bfloat16 as int16.
    query: (S, d), the pooled query of each.
    """

    memory: numpy.ndarray
    query: numpy.ndarray


def sizes(examples: Sequence[Example]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """How many positions of each example are scored, and how many answers it has, (examples,) int64 each."""
    counts, answers = numpy.zeros((2, len(examples)), dtype=numpy.int64)
    for number, example in enumerate(examples):
        scored = numpy.asarray(example.labels)[1:] != IGNORED  # the first token is predicted by none
        counts[number] = scored.sum()
        answers[number] = (scored[1:] & ~scored[:-1]).sum() + scored[:1].sum()
    return counts, answers


def bank_bytes(examples: Sequence[Example], hidden_size: int, dtype: torch.dtype) -> int:
    """Size of a bank on disk, but for some hundred bytes a file."""
    return int(_example_bytes(*sizes(examples), hidden_size, dtype).sum())


def _example_bytes(
    counts: numpy.ndarray, answers: numpy.ndarray, hidden_size: int, dtype: torch.dtype
) -> numpy.ndarray:
    return (counts + answers) * hidden_size * dtype.itemsize + 16


def default_folder() -> Path:
    """Where banks lie unless told otherwise: `imsm/memory_banks` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return cache_folder("memory_banks")


class MemoryBank:
    """The frozen memories of a list of examples; a sequence of `Recalled`.

    Nothing is computed or read before `build`.

    Args:
        model: the siamese model; only its frozen stream counts, whatever adapter and gate it has.
        examples: what is kept; their order counts.
        collator: makes batches of them.
        folder: where banks lie; this one in a folder below it that is named by its fingerprint.
        dtype: torch.float32 or torch.bfloat16, what memories are kept in.
        bf16: compute in bfloat16 autocast.
        shard_tokens: tokens read for a file at most, unless one example has more.

    Raises:
        InputError: another dtype, or a model whose weights are not in memory.
    """

    def __init__(
        self,
        model: SiameseForCausalLM,
        examples: Sequence[Example],
        collator: AnswerCollator,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
        bf16: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        if dtype not in STORED:
            raise InputError(f"a memory bank keeps torch.float32 or torch.bfloat16, got {dtype}")
        self.model = model
        self.examples = examples
        self.collator = copy.copy(collator)
        self.collator.row_length = None  # one example a row: that is how they are told apart here
        self.dtype = dtype
        self.bf16 = bf16
        self.hidden_size: int = model.config.hidden_size
        self.counts, answers = sizes(examples)
        example_bytes = _example_bytes(self.counts, answers, self.hidden_size, dtype)
        self.bytes = int(example_bytes.sum())
        facts = {"format": FORMAT, "dtype": str(dtype), "bf16": bf16, "shard_tokens": shard_tokens}
        self.fingerprint = fingerprint(model.base, examples, facts)
        self.folder = (default_folder() if folder is None else folder) / self.fingerprint
        self.starts = self._shard_starts(example_bytes.tolist(), shard_tokens)
        self.shards: list[Shard] = []

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Recalled:
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = self.examples[index]
        shard = bisect_right(self.starts, index) - 1
        memory, query = self.shards[shard].read(index - self.starts[shard])
        return Recalled(example.input_ids, example.labels, example.line, memory, query)

    @property
    def built_bytes(self) -> int:
        """Bytes of this bank that are on disk already."""
        return sum(path.stat().st_size for path in self.folder.glob("memories-*.arrow"))

    def build(self, report: Report | None = None) -> None:
        """Computes the shards that are missing or damaged, then opens all of them.

        In a distributed run each process computes its share of them, and all wait for each other.

        Args:
            report: called with the tokens read so far and those to read, by each process on its own share.

        Raises:
            InputError: the disk is full or refuses, or is not one that all processes share.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        processes = torch.distributed.get_world_size() if distributed else 1
        mine = [number for number in range(len(self.starts)) if number % processes == rank]
        missing = [number for number in mine if self._open(number) is None]
        total = sum(self._tokens(number) for number in missing)
        done = 0
        for number in missing:
            for tokens in self._build_shard(number):
                done += tokens
                if report is not None:
                    report(done, total)
        if distributed:
            torch.distributed.barrier()
        if rank == 0:
            self._sweep()
        opened = [self._open(number) for number in range(len(self.starts))]
        self.shards = [shard for shard in opened if shard is not None]
        if len(self.shards) < len(opened):
            raise InputError(
                f"{len(opened) - len(self.shards)} of {len(opened)} files of the memory bank in {self.folder} cannot be read "
                "back: in a distributed run, memory_bank_dir must be on a disk that all processes share"
            )

    # -- shards ------------------------------------------------------------------------------------------------------

    def _shard_starts(self, example_bytes: list[int], shard_tokens: int) -> list[int]:
        """Index of each shard's first example."""
        starts, tokens, size = [0], 0, 0
        for index, (example, more) in enumerate(zip(self.examples, example_bytes, strict=True)):
            read = len(example.input_ids)
            if index > starts[-1] and (tokens + read > shard_tokens or size + more > SHARD_BYTES):
                starts.append(index)
                tokens = size = 0
            tokens += read
            size += more
        return starts

    def _indices(self, number: int) -> range:
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.examples)
        return range(self.starts[number], end)

    def _tokens(self, number: int) -> int:
        return sum(len(self.examples[index].input_ids) for index in self._indices(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"memories-{number:05}-of-{len(self.starts):05}.arrow"

    def _open(self, number: int) -> Shard | None:
        """A shard, or None if its file is missing or damaged."""
        path = self._path(number)
        if not path.is_file():
            return None
        try:
            return Shard(path, self.counts[self._indices(number)], self.hidden_size, self.dtype)
        except (OSError, ValueError, KeyError, pyarrow.ArrowException):
            return None

    def _sweep(self) -> None:
        """Removes what killed builds left behind; what is younger may be another run's, being written."""
        for left in self.folder.glob(f"{BESIDE}*"):
            if time.time() - left.stat().st_mtime > LEFTOVER_AGE:
                left.unlink(missing_ok=True)

    def _build_shard(self, number: int) -> Any:
        """Computes and writes a shard; gives the tokens read after each pass."""
        indices = self._indices(number)
        columns: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        for places in length_batches([len(self.examples[index].input_ids) for index in indices]):
            batch = [indices[place] for place in places]
            columns |= zip(batch, self._compute([self.examples[index] for index in batch]), strict=True)
            yield sum(len(self.examples[index].input_ids) for index in batch)
        rows = [columns[index] for index in indices]
        _write(
            self._path(number),
            {
                "memory": [self._stored(memory) for memory, _, _ in rows],
                "query": [self._stored(query) for _, query, _ in rows],
                "held": [numpy.array(held, dtype=numpy.int32) for _, _, held in rows],
            },
        )

    @torch.no_grad()  # not inference mode: what some models keep from one pass to the next could not be trained on
    def _compute(self, examples: list[Example]) -> list[tuple[Tensor, Tensor, list[int]]]:
        """Memories (S, d), pooled queries (A, d), and how many positions each query holds for, of every example."""
        device: Any = self.model.get_input_embeddings().weight.device
        batch = {name: tensor.to(device) for name, tensor in self.collator(examples).items()}
        labels, attended = batch.pop("labels"), batch["attention_mask"].bool()
        streams = self.model.streams
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            streams.frozen({**batch, "use_cache": False}, None)
        memory, streams.tap.memory = streams.tap.memory, None
        assert memory is not None
        labels, attended = labels.to(memory.device), attended.to(memory.device)
        boundary = answer_boundaries(labels, attended)
        query = pool_within(memory, attended, boundary)
        found = []
        for row in range(len(examples)):
            at = (labels[row, 1:] != IGNORED).nonzero()[:, 0]
            _, held = boundary[row, at].unique_consecutive(return_counts=True)
            first = at[held.cumsum(0) - held]
            found.append((self._kept(memory[row, at]), self._kept(query[row, first]), held.tolist()))
        return found

    def _kept(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).cpu()

    def _stored(self, x: Tensor) -> numpy.ndarray:
        return (x.view(torch.int16) if self.dtype == torch.bfloat16 else x).numpy().reshape(-1)


class Shard:
    """One file of a bank, read through the memory map.

    Args:
        path: the file.
        counts: supervised positions of its examples.
        hidden_size: width d of a memory.
        dtype: what it was written in.

    Raises:
        ValueError, OSError, KeyError, pyarrow.ArrowException: the file is damaged.
    """

    def __init__(self, path: Path, counts: numpy.ndarray, hidden_size: int, dtype: torch.dtype) -> None:
        table = datasets.Dataset.from_file(str(path)).data
        self.memory, memories = _values(table, "memory", STORED[dtype])
        self.query, queries = _values(table, "query", STORED[dtype])
        self.held, held = _values(table, "held", "int32")
        starts = _running(counts)
        fits = (
            numpy.array_equal(memories, starts * hidden_size)
            and numpy.array_equal(queries, held * hidden_size)
            and numpy.array_equal(_running(self.held)[held], starts)
        )
        if not fits:
            raise ValueError(f"{path} does not hold what it should")
        self.starts, self.query_starts = starts, held
        self.memory = self.memory.reshape(-1, hidden_size)
        self.query = self.query.reshape(-1, hidden_size)

    def read(self, row: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Memories, a view of the file, and queries of an example, both (S, d)."""
        memory = self.memory[self.starts[row] : self.starts[row + 1]]
        own = slice(self.query_starts[row], self.query_starts[row + 1])
        return memory, numpy.repeat(self.query[own], self.held[own], axis=0)


class RecallingCollator:
    """Adds to a collator's batches the frozen memories of the examples that have them.

    Args:
        collator: makes the batches.
    """

    def __init__(self, collator: AnswerCollator) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The collator's batch; of `Recalled` examples with `base_memory` and `base_query`, (N, d), row by row."""
        batch = self.collator(examples)
        recalled = [example for row in self.collator.rows(examples) for example in row if isinstance(example, Recalled)]
        if recalled:
            batch["base_memory"] = _joined([example.memory for example in recalled])
            batch["base_query"] = _joined([example.query for example in recalled])
        return batch


def _running(counts: Any) -> numpy.ndarray:
    """0 and the running sums."""
    return numpy.concatenate([[0], numpy.cumsum(counts, dtype=numpy.int64)])


def _joined(parts: list[numpy.ndarray]) -> Tensor:
    joined = torch.from_numpy(numpy.concatenate(parts))
    return joined.view(torch.bfloat16) if joined.dtype == torch.int16 else joined


def _values(table: Any, column: str, kind: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """All values of a column of lists, without a copy, and where each list starts and the last one ends."""
    chunks = table.column(column).chunks
    if len(chunks) != 1 or str(chunks[0].type.value_type) != {"float32": "float"}.get(kind, kind):
        raise ValueError(f"{column} is not one chunk of {kind}")
    return chunks[0].values.to_numpy(zero_copy_only=True), chunks[0].offsets.to_numpy(zero_copy_only=True).astype(int)


def _write(path: Path, columns: dict[str, list[numpy.ndarray]]) -> None:
    """Writes beside and renames.

    Raises:
        InputError: the disk is full or refuses.
    """
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=BESIDE, dir=path.parent)
        os.close(handle)
        table = pyarrow.table({name: _lists(values) for name, values in columns.items()})
        with ArrowWriter(path=beside) as writer:
            writer.write_table(table, writer_batch_size=max(table.num_rows, 1))
            writer.finalize()
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"the memory bank cannot be written to {path.parent}: {first_line(error)}; make room there, give another "
            "memory_bank_dir, or set memory_bank: off"
        ) from error
    finally:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)


def _lists(values: list[numpy.ndarray]) -> pyarrow.ListArray:
    offsets = _running([len(value) for value in values]).astype(numpy.int32)
    return pyarrow.ListArray.from_arrays(offsets, numpy.concatenate(values))

"""The tuned model's own answers as training data for its heads: every token's hidden states, computed once.

A row packs one or more requests' threads (`finetune/packing.py`), so one forward pass gives each token's states in its
thread context. They are what a head reads and, the final one through the base's unembedding, the distribution it must
match, so the base model runs once per answer however many epochs follow. `Store` keeps them on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.finetune.corpus import LOOPING, Drops, repeated_share
from medusa_apar.finetune.packing import PackedForest, TokenThread, join, pack_threads
from medusa_apar.job import replacing
from medusa_apar.json_files import numbered_lines, parse
from medusa_apar.models.fingerprint import fingerprint
from medusa_apar.reading import reading
from medusa_apar.runtimes.attention import current_forest, forest_attention
from medusa_apar.runtimes.capture import Captured
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.verify.control_processor import ban_control_tokens

SHARD_RECORDS = 64  # a killed run encodes at most so many again for each of its workers
ROW_TOKENS = 512  # short records share a forward pass up to here: products of few rows waste half of a core


@dataclass(slots=True)
class Answers:
    """T positions of many threads, a thread's positions in a row. Prompts count only by their last token."""

    hidden: Tensor  # float16 [T, H * (1 + aux_layers)] the states from which the base predicts the next token
    ids: Tensor  # [T] the token at this position
    next_ids: Tensor  # [T] the thread's next token, packing.IGNORED where the thread was cut
    threads: Tensor  # [T] distinct for every thread
    records: Tensor  # [T] which record it came from

    def __len__(self) -> int:
        return len(self.next_ids)

    def __getitem__(self, index: Tensor | slice) -> Answers:
        return Answers(*(getattr(self, name)[index] for name in self.__slots__))

    def to(self, device: torch.device) -> Answers:
        return Answers(*(getattr(self, name).to(device) for name in self.__slots__))

    def drafted(self, heads: int) -> Tensor:
        """long [T, heads]: tokens t+1+j of the position that predicts t+1; those beyond the thread mean nothing."""
        ahead = (
            torch.arange(1, heads + 1, device=self.ids.device)
            + torch.arange(len(self), device=self.ids.device)[:, None]
        )
        return self.ids[ahead.clamp_(max=len(self) - 1)]

    def same_thread(self, ahead: int) -> Tensor:
        """bool [T - ahead]: whether the position so far ahead is in this one's thread."""
        return self.threads[: max(len(self) - ahead, 0)] == self.threads[ahead:]

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(slots=True)
class AnswerFile:
    """Records of our engine: {"prompt_ids": [...], "threads": [{"parent", "fork_index", "token_ids"}...]}."""

    records: list[dict]
    own: int | None = None  # so many of the first are the model's own answers; None: all
    max_depth: int | None = None  # threads at this depth (the trunk has 0) do not fork; None: no limit
    places: list[str] = field(default_factory=list)  # file and line of each record, where they were read
    fork_id: int | None = field(init=False, default=None)  # None: nothing forks in this file
    child_id: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for record in self.records:
            for thread in record["threads"][1:]:
                self.child_id = thread["token_ids"][0]
                self.fork_id = record["threads"][thread["parent"]]["token_ids"][thread["fork_index"]]
                return

    @classmethod
    def read(cls, *paths: Path, drops: Drops | None = None) -> AnswerFile:
        """JSON Lines, file after file.

        drops: says what is done about a line that is no record; None raises BadCorpus with file and line.
        """
        drops = drops if drops is not None else Drops()
        records, places = [], []
        for path in paths:
            for number, line in numbered_lines(path):
                place = f"{path}:{number}"
                try:
                    records.append(_checked_record(line))
                except ValueError as error:
                    drops.bad(str(error), place)
                else:
                    places.append(place)
        return cls(records, places=places)

    def check_ids(self, vocab_size: int) -> None:
        """ValueError with file and line of the first record with an id that a model of this vocabulary lacks."""
        for index, record in enumerate(self.records):
            lists = [record["prompt_ids"], *(thread["token_ids"] for thread in record["threads"])]
            highest = max(max(ids, default=0) for ids in lists)
            if highest >= vocab_size:
                place = self.places[index] if self.places else f"answer {index}"
                raise ValueError(
                    f"{place}: id {highest} is beyond the model's vocabulary of {vocab_size}: are these its answers?"
                )

    def thread_depths(self, answers: Answers) -> Tensor:
        """[T] depth of the thread at each position, the trunk having 0; a record's positions begin with its first."""
        runs, lengths = torch.unique_consecutive(
            torch.stack([answers.records, answers.threads]), dim=1, return_counts=True
        )
        starts = (lengths.cumsum(0) - lengths).tolist()
        found: list[int] = []
        record = base = -1
        depths: list[int] = []
        for (owner, thread), start in zip(runs.T.tolist(), starts, strict=True):
            if owner != record:
                record, depths = owner, []
                if owner >= len(self.records):
                    raise ValueError("hidden states of other answers than these: start anew in another folder")
                for part in self.records[record]["threads"]:
                    depths.append(depths[part["parent"]] + 1 if depths else 0)
                # Threads are numbered in order. A trunk lacks positions only where an end token ends its prompt.
                base = thread - int(len(depths) > 1 and int(answers.ids[start]) == self.child_id)
            if thread - base >= len(depths):
                raise ValueError("hidden states of other answers than these: start anew in another folder")
            found.append(depths[thread - base])
        return torch.tensor(found, dtype=torch.long).repeat_interleave(lengths)

    def draft_vocabulary(self, size: int, vocab_size: int, eos_ids: list[int]) -> Tensor | None:
        """`size` ids, sorted: the answers' most frequent, then the prompts', then the lowest. Never `[Child]`. None for
        all ids, where there are no more or the size is 0."""
        if not 0 < size < vocab_size:
            return None
        answers = Counter(i for record in self.records for thread in record["threads"] for i in thread["token_ids"])
        prompts = Counter(i for record in self.records for i in record["prompt_ids"])
        needed = eos_ids if self.fork_id is None else [self.fork_id, *eos_ids]
        ranked = itertools.chain(needed, *([i for i, _ in count.most_common()] for count in (answers, prompts)))
        ids = dict.fromkeys(itertools.chain(ranked, range(vocab_size)))
        ids.pop(self.child_id, None)
        return torch.tensor(sorted(itertools.islice(ids, size)))

    def packed_threads(self, record: int) -> tuple[list[TokenThread], int]:
        """A record as `pack_threads` takes it: the prompt at the head of the trunk, and the prompt's length."""
        prompt, threads = self.records[record]["prompt_ids"], self.records[record]["threads"]
        packed: list[TokenThread] = [(prompt + threads[0]["token_ids"], -1, 0)]
        for thread in threads[1:]:
            shift = len(prompt) if thread["parent"] == 0 else 0
            packed.append((thread["token_ids"], thread["parent"], thread["fork_index"] + shift))
        return packed, len(prompt)


def loops(record: dict) -> bool:
    """Whether an answer mostly repeats itself, which is nothing to learn from or to measure."""
    return repeated_share([i for thread in record["threads"] for i in thread["token_ids"]]) > LOOPING


def _checked_record(line: bytes) -> dict[str, Any]:
    record: Any = parse(line)
    try:
        threads = record["threads"]
        lists = [record["prompt_ids"], *(thread["token_ids"] for thread in threads)]
        places = [thread[name] for thread in threads[1:] for name in ("parent", "fork_index")]
        sound = bool(threads and lists[0]) and all(type(ids) is list for ids in lists)
        sound &= all(type(i) is int and i >= 0 for ids in (*lists, places) for i in ids)
        for index, thread in enumerate(threads[1:], 1):
            parent = threads[thread["parent"]]["token_ids"]
            sound &= thread["parent"] < index and thread["fork_index"] < len(parent)
            sound &= len(thread["token_ids"]) > 0
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else "its fields have other types"
        raise ValueError(f"no answer record with prompt_ids and threads, {why}") from error
    if not sound:
        raise ValueError("an impossible answer record, by its ids, parents or fork indices")
    checked: dict[str, Any] = record
    return checked


@torch.no_grad()
def encode(
    model: PreTrainedModel, file: AnswerFile, record: int, eos_ids: list[int], aux_layers: tuple[int, ...] = ()
) -> Answers:
    """One record's positions. What follows an end-of-text token is nobody's prediction, so that position is dropped."""
    return encode_rows(model, file, [record], eos_ids, aux_layers)


@torch.no_grad()
def encode_rows(
    model: PreTrainedModel,
    file: AnswerFile,
    records: Sequence[int],
    eos_ids: list[int],
    aux_layers: tuple[int, ...] = (),
) -> Answers:
    """The positions of several records from one forward pass, in order; threads are numbered from 0."""
    rows = [pack_threads(*file.packed_threads(record)) for record in records]
    row = join(rows)
    owners = torch.cat([torch.full((len(r),), record) for r, record in zip(rows, records, strict=True)])
    placed = row.to(model.device)
    # The attention that decodes: paths narrowed by each layer's own window, soft caps and sinks included.
    attention = forest_attention(model, "sdpa"), current_forest(cast(Any, PackedForest(placed)))
    with attention[0], attention[1], Captured(model, aux_layers) as captured:
        output = model.base_model(
            input_ids=placed.input_ids[None],
            attention_mask=torch.ones_like(placed.input_ids)[None],  # without one, equal positions would split the row
            position_ids=placed.position_ids[None],
            use_cache=False,
        )
    keep = (row.trained & ~torch.isin(row.input_ids, torch.tensor(eos_ids))).nonzero()[:, 0]
    on_device = keep.to(model.device)
    hidden = captured.hidden_states(on_device, final=output.last_hidden_state[0][on_device])
    # float16 halves the cache; a final norm's output is far from its limits.
    return Answers(hidden.half().cpu(), row.input_ids[keep], row.labels()[keep], row.thread_ids[keep], owners[keep])


@torch.no_grad()
def greedy(model: PreTrainedModel, file: AnswerFile, answers: Answers) -> Tensor:
    """[T] the base's choice of next token by the fork rule, threads being `file.max_depth` deep at most."""
    lm_head, chosen = model.get_output_embeddings(), []
    hidden_size = lm_head.weight.shape[1]
    rule, depths = None, torch.zeros_like(answers.ids)
    if file.fork_id is not None and file.child_id is not None:
        rule = ForkRule(file.fork_id, file.child_id, sys.maxsize if file.max_depth is None else file.max_depth)
        depths = depths if file.max_depth is None else file.thread_depths(answers)
    parts = (column.split(256) for column in (answers.hidden, answers.ids, depths))  # 50 MB of logits
    for states, last_ids, own_depths in zip(*parts, strict=True):
        logits = lm_head(states[:, :hidden_size].to(model.device, model.dtype)).float().cpu()
        if rule is not None:
            ban_control_tokens(rule, logits, last_ids, own_depths)
        chosen.append(logits.argmax(-1))
    return torch.cat(chosen)


class Store:
    """Answers of many shards as one, the hidden states left in the files and read page by page.

    A million positions of 576 are 1.2 GB; only the four small columns are held in memory.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._hidden: list[Tensor] = []
        self.starts = [0]
        columns: list[list[Tensor]] = []
        threads = 0
        for path in shards:
            damaged = "is damaged: delete it, and the next run makes it anew"
            with reading(path, damaged), safe_open(path, framework="pt") as file:
                hidden, ids, next_ids, thread, record = (file.get_tensor(name) for name in Answers.__slots__)
            if not len(ids):
                continue
            self._hidden.append(hidden)
            columns.append([ids, next_ids, thread + threads, record])
            threads += int(thread.max()) + 1
            self.starts.append(self.starts[-1] + len(ids))
        if not columns:
            raise ValueError("no answers to train on: every thread of the data is empty.")
        self._columns = [torch.cat(column) for column in zip(*columns, strict=True)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: slice) -> Answers:
        """Contiguous positions, copied; beyond the end there are none."""
        start, stop, _ = index.indices(len(self))
        parts = []
        for shard in range(bisect_right(self.starts, start) - 1, len(self._hidden)):
            first = self.starts[shard]
            if first >= stop:
                break
            parts.append(self._hidden[shard][max(start - first, 0) : stop - first])
        columns = [column[start:stop] for column in self._columns]
        return Answers(torch.cat(parts) if parts else self._hidden[0][:0], *columns)


@dataclass(slots=True)
class Encoder:
    """Runs the base over records and keeps the shards in `folder`; what an earlier run left there is not done again.

    Workers are single-threaded and side by side: one forward pass split over cores waits for the slowest each time.
    A shard is named after its content: the model's fingerprint, the aux_layers and its records.
    """

    model: PreTrainedModel
    file: AnswerFile
    eos_ids: list[int]
    folder: Path
    aux_layers: tuple[int, ...] = ()
    threads: int = 1
    _model_key: str = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._model_key = f"windowed {fingerprint(self.model)} {self.model.dtype} {self.aux_layers} {self.eos_ids}"

    def run(
        self,
        records: Sequence[int],
        go_on: Callable[[], bool] = lambda: True,
        done: Callable[[int], Any] = lambda _: None,
    ) -> list[Path]:
        """The shards of `records`, in order, as many as there is time for: at least one, then while `go_on()`.

        done(records): told of each shard.
        """
        groups = [records[i : i + SHARD_RECORDS] for i in range(0, len(records), SHARD_RECORDS)]
        paths: list[Path] = []

        def work(group: Sequence[int]) -> Path | None:
            if (group is groups[0]) or go_on():
                return self._shard(group)
            path = self._path(group)
            return path if path.exists() else None

        with ThreadPoolExecutor(self.threads, initializer=_single_threaded(self.threads)) as workers:
            for group, path in zip(groups, workers.map(work, groups), strict=True):
                if path is None:
                    break
                paths.append(path)
                done(len(group))
        return paths

    def holds(self, records: Sequence[int]) -> bool:
        """Whether the first shard of `records` is there already."""
        return self._path(records[:SHARD_RECORDS]).exists()

    def _path(self, records: Sequence[int]) -> Path:
        content = json.dumps([self._model_key, list(records), [self.file.records[i] for i in records]], sort_keys=True)
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.safetensors"

    def _shard(self, records: Sequence[int]) -> Path:
        path = self._path(records)
        if path.exists():
            return path
        parts, threads = [], 0
        for row in self._rows(records):
            part = encode_rows(self.model, self.file, row, self.eos_ids, self.aux_layers)
            if len(part):
                part.threads += threads
                threads = int(part.threads.max()) + 1
                parts.append(part)
        if not parts:
            parts = [part]
        answers = Answers.join(parts)
        with replacing(path) as temporary:
            save_file({name: getattr(answers, name).contiguous() for name in Answers.__slots__}, temporary)
        return path

    def _rows(self, records: Sequence[int]) -> Iterable[list[int]]:
        """Records that share a forward pass."""
        row: list[int] = []
        tokens = 0
        for record in records:
            threads = self.file.records[record]["threads"]
            size = len(self.file.records[record]["prompt_ids"]) + sum(len(thread["token_ids"]) for thread in threads)
            if row and tokens + size > ROW_TOKENS:
                yield row
                row, tokens = [], 0
            row.append(record)
            tokens += size
        if row:
            yield row


def _single_threaded(workers: int) -> Callable[[], None]:
    def initialise() -> None:
        if workers > 1:
            torch.set_num_threads(1)

    return initialise


def data_fingerprint(file: AnswerFile) -> str:
    """A hash of the answers, whatever files they came from."""
    digest = hashlib.sha256()
    for record in file.records:
        digest.update(json.dumps([record["prompt_ids"], record["threads"]], sort_keys=True).encode())
    return digest.hexdigest()[:16]

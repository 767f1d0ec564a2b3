"""Encodes batches of records in a process, and finds those of a batch that cannot be used."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np

from data_prep.encode.blocks import Block, Names
from data_prep.encode.content import Context, refuse_untrainable_at
from data_prep.errors import OVERLONG, BadDataError, FatalDataError, UntrainableError, overlong_message
from data_prep.pipeline.work import Job
from data_prep.shapes.examples import Example
from data_prep.shapes.shape import Shape, says_untrained, to_example
from data_prep.sources.records import Record
from data_prep.tokenizer.backends import open_backend
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:  # with its template engine, which most data does without
    from data_prep.chat.format import ChatFormat


class Encoder:
    """A job with its tokenizer, backend and template opened, as each process holds it once."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None):
        """Open all but the template, which `open_chat` does."""
        self.job = job
        self.tokenizer = tokenizer or open_tokenizer(str(job.tokenizer_dir))
        self._chat: ChatFormat | None = None
        with ThreadPoolExecutor(1) as thread:
            if job.chats:
                thread.submit(import_module, "data_prep.chat.format")  # meanwhile: it brings the template engine
            self._backend = open_backend(job.config.backend, self.tokenizer, rendered=job.chats)

    def open_chat(self, plan: str) -> None:
        """Open the template, of which `plan` is what its proof found."""
        from data_prep.chat.child import read_plan
        from data_prep.chat.format import ChatFormat

        job, tokenizer = self.job, self.tokenizer
        if self._chat is None:
            assert job.chat_template is not None
            names = tokenizer.special_tokens, tokenizer.control_strings
            self._chat = ChatFormat(job.chat_template, *names, job.now, job.config.chat, read_plan(plan))

    def context(self, names: Names) -> Context:
        """The arguments of the encode functions, with a book for the names they meet."""
        config = self.job.config
        splits = self.job.task.splits and config.overlong == "split"
        cuts = not self.job.task.packs and (splits or config.overlong == "truncate")
        return Context(
            tokenizer=self.tokenizer,
            backend=self._backend,
            chat=self._chat,
            names=names,
            train_on_prompt=config.chat.train_on_prompt,
            allow_untrained_stop=config.chat.allow_untrained_stop,
            limit_tokens=config.row_tokens if cuts else None,
            splits=splits,
            target_limit_tokens=config.target_tokens or config.row_tokens,
            row_tokens=config.row_tokens,
            stride_tokens=config.stride_tokens,
            makes_windows=self.job.task.makes_windows(config.overlong),
            every_piece=config.tag_pieces == "every",
        )

    def encode(
        self, records: Sequence[Record], shape: Shape, context: Context, on_fault: Callable[[int, BadDataError], None]
    ) -> tuple[Block | None, Sequence[int]]:
        """A block of a batch of records (None if none can be used), and which of them it holds, by index.

        `on_fault` gets each of the others.
        """
        num_names = len(context.names.index)
        try:
            block = self._encode(records, [_example(shape, record) for record in records], context)
        except FatalDataError:
            raise
        except BadDataError:
            pass
        else:
            if not self._is_long(block):
                return block, range(len(records))
        context.names.forget(num_names)
        faults = self._faults(records, shape, context)
        for index in sorted(faults):
            on_fault(index, faults[index])
        kept = [index for index in range(len(records)) if index not in faults]
        chosen = [records[index] for index in kept]
        if not kept:
            return None, kept
        return self._encode(chosen, [_example(shape, record) for record in chosen], context), kept

    def _faults(self, records: Sequence[Record], shape: Shape, context: Context) -> dict[int, BadDataError]:
        """The fault of each record that cannot be used: batches that fail are tried in halves."""
        faults: dict[int, BadDataError] = {}
        examples: dict[int, Example] = {}
        for index, record in enumerate(records):
            try:
                examples[index] = _example(shape, record)
            except FatalDataError:
                raise
            except BadDataError as fault:
                faults[index] = fault
        pending = [list(examples)] if examples else []
        while pending:
            indices = pending.pop()
            theirs = [records[index] for index in indices]
            try:
                block = self._encode(theirs, [examples[index] for index in indices], replace(context, names=Names()))
            except UntrainableError as error:
                first = theirs[error.indices[0]].where
                for place in error.indices:
                    said = f"{theirs[place].where}{str(error).removeprefix(first)}"
                    faults[indices[place]] = BadDataError(said, error.reason)
                left = set(indices).difference(faults)
                pending += [[index for index in indices if index in left]] if left else []
            except FatalDataError:
                raise
            except BadDataError as fault:
                half = len(indices) // 2
                pending += [indices[half:], indices[:half]] if half else []
                faults |= {} if half else {indices[0]: fault}
            else:
                faults |= {indices[place]: fault for place, fault in self._long_ones(theirs, block)}
        return faults

    def _is_long(self, block: Block) -> bool:
        """True if a document of a block fits no row and `overlong` lets none go."""
        lengths = block.columns["lengths"]
        return self.job.config.overlong == "error" and int(lengths.max(initial=0)) > self.job.config.row_tokens

    def _long_ones(self, records: Sequence[Record], block: Block) -> Iterator[tuple[int, BadDataError]]:
        """The index and fault of each record of a block with a document that fits no row."""
        if not self._is_long(block):
            return
        lengths, row_tokens = block.columns["lengths"], self.job.config.row_tokens
        owners = self.job.task.records_of(block)
        for place in np.flatnonzero(lengths > row_tokens).tolist():
            index = int(owners[place])
            yield index, BadDataError(overlong_message(records[index].where, int(lengths[place]), row_tokens), OVERLONG)

    def _encode(self, records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
        return self.job.task.encode(records, examples, context)


def _example(shape: Shape, record: Record) -> Example:
    """`to_example`; UntrainableError where the record itself says that it is not trained."""
    if says_untrained(shape, record):
        refuse_untrainable_at([0], [record], "a field of the record says that it is not trained")
    return to_example(shape, record)

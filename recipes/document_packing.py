"""What becomes of documents that stay apart: how samples cut them, what their attention spans, and the padding that context parallelism adds.

A phase's sample is a piece of a stream of documents (training/documents.py). Its documents come in a random order, so a document begins
at every place of a sample with the same probability, and the averages below are sums over all places: exact for a stream without end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.job_options import Parallel, Precision

GRAIN_SHARE = 1 / 1024
"""Packed sequences of a phase differ in length by steps of about this share of a sample: a GPU plans attention and memory per shape, so few
shapes are worth a step, 0.1% of the tokens."""


def multiple_tokens(context: int) -> int:
    """What a document's room is a multiple of with `context` context-parallel ranks."""
    return 2 * context if context > 1 else 1


def grain_tokens(seq_length_tokens: int, *, context: int, sequence_parallel: int, fp8: str | None) -> int:
    """What the length of a packed sequence is a multiple of. `sequence_parallel`: tensor-parallel ranks that share its tokens, or 1."""
    per_rank = sequence_parallel * (1 if fp8 is None else 32 if fp8 == "mxfp8" else 16)
    unit = math.lcm(multiple_tokens(context), context * per_rank)
    # Without context parallelism nothing grows: a sample is as long as the linter has allowed.
    return unit if context == 1 else unit * max(1, math.floor(seq_length_tokens * GRAIN_SHARE / unit))


def layout_grain_tokens(seq_length_tokens: int, parallel: Parallel, precision: Precision) -> int:
    """grain_tokens of a layout and precision of a recipe."""
    sequence_parallel = parallel.tensor if parallel.sequence_parallel else 1
    return grain_tokens(seq_length_tokens, context=parallel.context, sequence_parallel=sequence_parallel, fp8=precision.fp8)


@dataclass(frozen=True)
class Packing:
    """Of an average token of a stage whose documents stay apart. In fine-tuning, whose packed sequences are as long as the stage says: of an
    average place, padding included."""

    attended_tokens: float
    """Length of its document's part in the sample: twice the tokens that it sees. Sums of squared lengths over sums of tokens."""
    padding_share: float
    """Tokens that are computed beside those of the samples, per token; of fine-tuning 0."""


@dataclass(frozen=True)
class DocumentLengths:
    """Lengths of the documents that a phase draws."""

    documents_per_token: tuple[tuple[float, float], ...]
    """(length in tokens, documents of that length per token of the phase); nearly equal lengths may stand together."""
    counted: int
    """Documents whose lengths were looked at."""
    documents: int
    """In the phase's views."""

    def packing(self, seq_length_tokens: int, parallel: Parallel, precision: Precision) -> Packing:
        """Averages for samples of `seq_length_tokens` in this layout."""
        length, multiple = seq_length_tokens, multiple_tokens(parallel.context)
        squares = padding = whole = 0.0
        for tokens, count in self.documents_per_token:
            squares += count * squares_of_parts(tokens, length)
            padding += count * padding_of_parts(tokens, length, multiple)
            whole += count * max(0.0, tokens - length + 1)  # samples that lie in one document, times their length
        if parallel.context > 1:
            grain = layout_grain_tokens(length, parallel, precision)
            samples = parallel.micro_batch_samples
            some = 1 - min(1.0, whole) ** samples  # micro batches in which a document ends
            # Rounded up from anywhere between two multiples of the grain; by nearly all of it where padding is less than that.
            padding = max(some * grain / (samples * length), padding + some * (grain - multiple) / (2 * samples * length))
        return Packing(squares, padding)


def squares_of_parts(tokens: float, seq_length_tokens: int) -> float:
    """Expected sum of the squared lengths of the parts into which samples cut a document of `tokens` tokens.

    Two of its tokens that are d apart are in one sample with probability 1 - d / length.
    """
    length, far = seq_length_tokens, min(tokens, seq_length_tokens) - 1
    pairs = far * tokens * length - (tokens + length) * far * (far + 1) / 2 + far * (far + 1) * (2 * far + 1) / 6
    return tokens + 2 * pairs / length


def padding_of_parts(tokens: float, seq_length_tokens: int, multiple: int) -> float:
    """Expected padding of a document's parts to multiples of `multiple`, which divides the sample's length.

    A length that is not whole is the mean of several, whose parts are padded by (multiple - 1) / 2 on average.
    """
    if multiple == 1:
        return 0.0
    if tokens >= seq_length_tokens:
        return multiple - 1.0  # its first and its last part, each of any length; those between fill their samples
    cut = (tokens - 1) / seq_length_tokens
    if tokens != int(tokens):
        return (1 + cut) * (multiple - 1) / 2
    times, rest = divmod(int(tokens) - 1, multiple)
    # Where it is cut, each of its two parts has 1 to tokens - 1 tokens, all as often.
    of_parts = times * multiple * (multiple - 1) / 2 + rest * multiple - rest * (rest + 1) / 2
    return (1 - cut) * (-int(tokens) % multiple) + 2 * of_parts / seq_length_tokens


Known = DocumentLengths | Packing | str
"""What is known of a stage's documents: their lengths, what became of them where they are packed already (fine-tuning), or why nothing is."""

"""Rows beyond the vocabulary: what Megatron's embedding and output layer may have more than Hugging Face's."""

import math

import numpy as np

from qwen3vl_convert.model import EMBEDDING, OUTPUT, MegatronModel
from qwen3vl_convert.reader import is_padding, read_box, rows
from qwen3vl_convert.storage import StoredTensor
from qwen3vl_convert.verify.result import Difference
from qwen3vl_convert.verify.weights.tally import Tally


def check_padding(ours: MegatronModel) -> tuple[list[Difference], list[str]]:
    """(tensors whose rows beyond the vocabulary are no padding, notes on those where they are).

    Padding is the same row over and over, of zeros for example. A difference's `shape`, `count` and `first` are those
    of Megatron's tensor against zeros.
    """
    found, notes = [], []
    vocab = ours.model.dims.vocab
    for name, tensor in ((OUTPUT[1], ours.tensors.get(OUTPUT[0]) or ours.surplus_head), (EMBEDDING[1], _table(ours))):
        if tensor is None or tensor.shape[0] == vocab:
            continue
        if is_padding(tensor, vocab):
            notes.append(_note(tensor, vocab))
        else:
            found.append(_difference(name, tensor, vocab))
    return found[::-1], notes[::-1]


def _table(ours: MegatronModel) -> StoredTensor:
    return ours.tensors[EMBEDDING[0]]


def _note(tensor: StoredTensor, vocab: int) -> str:
    count, width = tensor.shape[0] - vocab, tensor.shape[1]
    row = read_box(tensor, ((vocab, 0), (1, width)))
    what = "one and the same row of numbers, not zeros" if row.any() else "zeros"
    return f"{tensor.name}: {count} rows of padding are left out of the comparison; they are {what}."


def _difference(name: str, tensor: StoredTensor, vocab: int) -> Difference:
    tally, first = Tally(), vocab
    for block in rows(tensor, vocab, tensor.shape[0]):
        tally.add((first, 0), np.zeros_like(block), block, tensor.dtype)
        first += block.shape[0]
    guess = (
        f"padding not zero: rows {vocab}:{tensor.shape[0]} of {tensor.name} lie beyond the vocabulary and hold numbers "
        f"that differ from row to row; in training they take part in the softmax"
    )
    return Difference(
        name, tensor.name, tensor.shape, tally.count, tally.first, tally.max_abs, tally.max_ulp, math.nan, guess
    )

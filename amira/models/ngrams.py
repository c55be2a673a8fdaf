"""Build n-gram language models from token sequences, and convert them from and to ARPA files.

Probabilities are interpolated with modified Kneser-Ney discounts (Chen & Goodman 1999), as KenLM's ``lmplz`` does (Heafield et
al. 2013). Models of pieces have no end of text: a transducer says by blanks where its text ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from amira.models.configs import ModelError
from amira.models.language_model import LanguageModel, vocabulary_digest

ORDERS = range(2, 11)
"""Allowed orders."""

BEGIN, END = "<s>", "</s>"
NEVER = -99.0
"""Logarithm of a probability of 0 in ARPA files."""

NEMO_OFFSET = 100
"""NeMo's n-gram models over subwords write token t as the character of code t + 100."""

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Discounts where the counts are too few to estimate them (``lmplz --discount_fallback``)."""

Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


class _Order(NamedTuple):
    """The n-grams of one order, sorted by their tokens.

    Attributes:
        parents: index of each n-gram without its last token, among the n-grams of the lower order.
        tokens: last token of each n-gram.
        suffixes: index of each n-gram without its first token.
        counts: how often the n-gram occurs.
        at_start: whether the n-gram is at the start of a text.
    """

    parents: Integers
    tokens: Integers
    suffixes: Integers
    counts: Integers
    at_start: npt.NDArray[np.bool_]


def estimate(texts: Iterable[Sequence[int]], order: int, pieces: Sequence[str]) -> LanguageModel:
    """Estimate a model from texts as token ids.

    Args:
        texts: tokens of each text.
        order: length of the longest n-grams.
        pieces: pieces by token id, without the blank.

    Raises:
        ModelError: there is no text.
    """
    orders = _count(texts, order, len(pieces))
    vocabulary = len(pieces)
    probabilities: list[Doubles] = []
    weights: list[Doubles] = []  # back-off weights of the n-grams of each order but the last; of the empty one first
    lower: Doubles = np.full(1, 1 / vocabulary)
    for i, grams in enumerate(orders):
        counts = grams.counts if i + 1 == len(orders) else _continuations(grams, orders[i + 1])
        contexts = 1 if i == 0 else len(orders[i - 1].tokens)
        if i == 0:
            counts = np.where(grams.tokens == vocabulary, 0, counts)
        discounts = _discounts(counts)
        totals = np.bincount(grams.parents, counts, contexts)
        taken = np.bincount(grams.parents, discounts, contexts)
        weight = np.divide(taken, totals, out=np.ones(contexts), where=totals > 0)
        rest = weight[grams.parents] * lower[grams.suffixes]
        kept = np.divide(counts - discounts, totals[grams.parents], out=np.zeros(len(counts)), where=counts > 0)
        probability = kept + rest
        if i == 0:
            probability[vocabulary] = 0.0
        weights.append(weight)
        probabilities.append(probability)
        lower = probability
    backoffs = [np.zeros(1), *(np.log(weight) for weight in weights[1:])]
    with np.errstate(divide="ignore"):
        log_probs = [np.maximum(np.log(probability), NEVER) for probability in probabilities]
    return _pack(pieces, [(grams.parents, grams.tokens) for grams in orders], log_probs, backoffs)


def _count(texts: Iterable[Sequence[int]], order: int, vocabulary: int) -> list[_Order]:
    """Count the n-grams of all orders. Each text begins with the token V, and no n-gram crosses the start of a text."""
    columns = [np.array([vocabulary, *text], np.int64) for text in texts if len(text)]
    if not columns:
        raise ModelError("the texts have no words that the model's pieces can spell")
    tokens = np.concatenate(columns)
    places = np.concatenate([np.arange(len(column)) for column in columns])
    width = vocabulary + 1
    everything = np.arange(width)
    counts = np.bincount(tokens, minlength=width)
    zeros = np.zeros(width, np.int64)
    orders = [_Order(zeros, everything, zeros, counts, everything == vocabulary)]
    ids = tokens.copy()  # of the n-gram that ends at each place
    for length in range(2, order + 1):
        ends = np.flatnonzero(places >= length - 1)
        if not len(ends):  # no text is that long
            break
        keys = ids[ends - 1] * width + tokens[ends]
        unique, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        longer = np.full(len(tokens), -1, np.int64)
        longer[ends] = inverse.reshape(-1)
        at_start = places[ends[first]] == length - 1
        orders.append(_Order(unique // width, unique % width, ids[ends[first]], counts, at_start))
        ids = longer
    return orders


def _continuations(grams: _Order, longer: _Order) -> Integers:
    """Return in how many contexts each n-gram occurs; how often, at the start of a text, since nothing stands before."""
    contexts = np.bincount(longer.suffixes, minlength=len(grams.tokens))
    return np.where(grams.at_start, grams.counts, contexts)


def _discounts(counts: Integers) -> Doubles:
    """Return the modified Kneser-Ney discount of each count (Chen & Goodman 1999, equation 26)."""
    n = [int(np.count_nonzero(counts == count)) for count in range(1, 5)]
    by_count = [0.0, *FALLBACK_DISCOUNTS]
    if all(n):
        share = n[0] / (n[0] + 2 * n[1])
        found = [count - (count + 1) * share * n[count] / n[count - 1] for count in (1, 2, 3)]
        if all(0 < discount < count for count, discount in enumerate(found, 1)):
            by_count = [0.0, *found]
    return np.minimum(np.array(by_count)[np.minimum(counts, 3)], counts)


def _pack(
    pieces: Sequence[str],
    grams: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    log_probs: Sequence[Doubles],
    backoffs: Sequence[Doubles],
) -> LanguageModel:
    """Return a model.

    Args:
        pieces: by token id.
        grams: parents and last tokens of the n-grams of each order, sorted.
        log_probs: of each order.
        backoffs: of the empty context, and of the n-grams of each order but the last.
    """
    sizes = [len(tokens) for _, tokens in grams]
    below = [1, *sizes[:-1]]
    children = [np.bincount(parents, minlength=size) for (parents, _), size in zip(grams, below, strict=True)]
    return LanguageModel(
        vocabulary_digest(pieces),
        tuple(sizes),
        np.concatenate([tokens for _, tokens in grams]).astype(np.uint16 if len(pieces) < 2**16 else np.uint32),
        np.concatenate(log_probs).astype(np.float16),
        np.concatenate(backoffs).astype(np.float16),
        np.concatenate(children).astype(np.uint32 if max(map(np.max, children)) >= 2**16 else np.uint16),
    )


def write_arpa(model: LanguageModel, pieces: Sequence[str], path: Path) -> None:
    """Write a model as an ARPA file over pieces."""
    names = [*_names(pieces), BEGIN]
    with path.open("w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        for order, size in enumerate(model.sizes, 1):
            file.write(f"ngram {order}={size + (order == 1)}\n")
        for order, lines in enumerate(_arpa_lines(model, names), 1):
            file.write(f"\n\\{order}-grams:\n")
            if order == 1:
                file.write(f"{NEVER:g}\t{END}\n")
            file.writelines(lines)
        file.write("\n\\end\\\n")


def _arpa_lines(model: LanguageModel, names: Sequence[str]) -> Iterator[Iterator[str]]:
    parents = np.repeat(np.arange(model.states), model.children)
    texts = [""]  # of each node
    begin = 0

    def lines(ngrams: range) -> Iterator[str]:
        for i in ngrams:
            text = f"{texts[parents[i]]} {names[model.tokens[i]]}".lstrip()
            log_prob = NEVER if model.log_probs[i] <= NEVER else float(model.log_probs[i]) / math.log(10)
            if i + 1 < model.states:
                texts.append(text)
                yield f"{log_prob:.5g}\t{text}\t{float(model.backoffs[i + 1]) / math.log(10):.5g}\n"
            else:
                yield f"{log_prob:.5g}\t{text}\n"

    for size in model.sizes:
        yield lines(range(begin, begin + size))
        begin += size


def read_arpa(path: Path, pieces: Sequence[str]) -> LanguageModel:
    """Read an ARPA file over pieces, or one of NeMo's n-gram models over subwords. Unknown words and ``</s>`` are left out.

    Raises:
        OSError: the file cannot be read.
        ModelError: it is malformed, or an n-gram's context is missing.
    """
    width = len(pieces) + 1
    tokens = {**{name: token for token, name in enumerate(_names(pieces))}, BEGIN: len(pieces)}
    nemo = {chr(token + NEMO_OFFSET): token for token in range(len(pieces))} | {BEGIN: len(pieces)}
    found: list[dict[tuple[int, ...], tuple[float, float]]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.startswith("\\") and line.rstrip().endswith("-grams:"):
                found.append({})
                continue
            if not found or line.startswith("\\") or not line.strip():
                continue
            log_prob, *rest = line.rstrip("\n").replace("\t", " ").split(" ")
            words, backoff = rest[: len(found)], "".join(rest[len(found) :]) or "0"
            if len(found) == 1 and words[0] in nemo and words[0] not in tokens:
                tokens = nemo
            try:
                gram = tuple(tokens[word] for word in words if word in tokens)
                scores = max(float(log_prob) * math.log(10), NEVER), float(backoff) * math.log(10)
            except ValueError as error:
                raise ModelError(f"{path} line {number} is no n-gram: {line.rstrip()!r}") from error
            if len(gram) == len(found) and width - 1 not in gram[1:]:
                found[-1][gram] = scores
    while found and not found[-1]:
        found.pop()
    if not found:
        raise ModelError(f"{path} has no n-grams of the model's pieces")
    for token in range(width):
        found[0].setdefault((token,), (NEVER, 0.0))
    return _from_ngrams(found, pieces, path)


def _from_ngrams(
    found: Sequence[dict[tuple[int, ...], tuple[float, float]]], pieces: Sequence[str], path: Path
) -> LanguageModel:
    """Return a model from log probability and back-off weight of each n-gram by order."""
    indices: dict[tuple[int, ...], int] = {(): 0}
    grams, log_probs, backoffs = [], [], [np.zeros(1)]
    for order, scores in enumerate(found, 1):
        ordered = sorted(scores)
        try:
            parents = np.array([indices[gram[:-1]] for gram in ordered], np.int64)
        except KeyError as error:
            raise ModelError(f"{path} has an n-gram after the tokens {error.args[0]}, but not those as an n-gram") from error
        indices = {gram: i for i, gram in enumerate(ordered)}
        grams.append((parents, np.array([gram[-1] for gram in ordered], np.int64)))
        log_probs.append(np.array([scores[gram][0] for gram in ordered]))
        if order < len(found):
            backoffs.append(np.array([scores[gram][1] for gram in ordered]))
    return _pack(pieces, grams, log_probs, backoffs)


def _names(pieces: Sequence[str]) -> list[str]:
    """Return the word that stands for each piece in an ARPA file: the piece, or its id if it is no word or not the only one."""
    names: list[str] = []
    seen: set[str] = {BEGIN, END, "<unk>"}
    for token, piece in enumerate(pieces):
        names.append(piece if piece and piece not in seen and not any(map(str.isspace, piece)) else f"<{token}>")
        seen.add(piece)
    return names

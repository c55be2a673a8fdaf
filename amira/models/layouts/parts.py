"""What a layout makes of a source: a model's parts in the repository's convention, not written yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amira.models.graphs import TransducerGraphs
from amira.models.surgery import EditedGraph

Floats = npt.NDArray[np.float32]

GraphSource = Path | EditedGraph
"""A graph to copy as it is, or one in memory to write."""

LATENCIES = {"balanced": "encoder", "low": "encoder_low", "throughput": "encoder_throughput"}
"""The part of a model that is the encoder of each latency."""


@dataclass(frozen=True)
class CachedEncoder:
    """An encoder that carries its context in a cache from call to call, in the repository's convention.

    Attributes:
        graph: inputs ``audio_signal`` [B, F, W], ``length`` [B], ``cache`` [B, S] and perhaps ``prompt_index`` [B]; outputs
            ``outputs`` [B, D, T'], ``encoded_lengths`` [B], ``cache_next`` [B, S].
        window_features: feature frames of a call, W.
        chunk_features: feature frames by which the next call's window begins later.
        cache_size: values of a stream's cache, S.
        fixed_batch: whether the graph takes one stream a call only.
        prompts: number of each language for ``prompt_index``, by name; empty if the graph has no such input.
        default_prompt: the language of a stream that names none; empty without prompts.
        published: encodes consecutive windows [1, F, W] with the graph as it was published, if the cache has keys and values
            instead of the published frames.
    """

    graph: EditedGraph
    window_features: int
    chunk_features: int
    cache_size: int
    fixed_batch: bool = False
    prompts: Mapping[str, int] = field(default_factory=dict)
    default_prompt: str = ""
    published: Callable[[Sequence[Floats]], list[Floats]] | None = None


@dataclass(frozen=True)
class Parts:
    """A model in the repository's convention.

    Attributes:
        preprocessor, decoder_joint: its graphs.
        encoder: the encoder's graph, or the cached encoder.
        pieces: the vocabulary, the blank last; empty if ``vocabulary`` is a file in the convention.
        vocabulary: the source's file.
        features: values of a feature frame.
        max_symbols: number of tokens on one frame after which decoding moves on.
        fresh_features: what stands before the first feature frame of a fresh cache: ``zeros``, or ``none`` if nothing does.
        final_padding_ms: silence behind a stream's end that the encoder needs to emit its last tokens.
        endpoint_tokens: ids of tokens that end a segment.
        transducer: the model's sizes where they were read from the source.
    """

    preprocessor: GraphSource
    encoder: GraphSource | CachedEncoder
    decoder_joint: GraphSource
    vocabulary: Path
    features: int
    pieces: Sequence[str] = ()
    max_symbols: int = 10
    fresh_features: str = "zeros"
    final_padding_ms: int = 0
    endpoint_tokens: Sequence[int] = ()
    transducer: TransducerGraphs | None = None

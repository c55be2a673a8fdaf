"""Parameters of the decoder, from ``config.pbtxt``, and options of a stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

SAMPLE_RATE = 16000
"""Samples per second of all audio."""


class ParameterError(ValueError):
    """A parameter is missing or has a value that is not allowed; the message names it, the value and what is allowed."""


class Geometry(NamedTuple):
    """The parts of a stream's windows, in encoder frames.

    Attributes:
        left_frames: context before the chunk.
        chunk_frames: frames that the window decodes for good.
        right_frames: context after the chunk; the chunk is decoded when this audio has arrived.
    """

    left_frames: int
    chunk_frames: int
    right_frames: int


ASSUMED_BYTES_PER_SEC = 10_000_000
ASSUMED_BYTES_PER_SEC_SQUARED = 500_000
"""Assumed growth for an encoder that was not measured. It exceeds that of the bundled model, which attends over frames of 24
ms, and includes the convolutions of a large FastConformer."""

MAX_ENCODE_BYTES = 3 * 2**29
"""Default limit for the memory of one encoder call: 1.5 GiB. Each encoder process may keep this much."""


@dataclass(frozen=True)
class WindowMemory:
    """Memory of one window in preprocessor and encoder, and its limit.

    A window of s seconds takes ``bytes_per_sec`` s + ``bytes_per_sec_squared`` s²: attention compares all pairs of frames.

    Attributes:
        bytes_per_sec, bytes_per_sec_squared: measured growth, or the assumed one.
        max_bytes: limit for one encoder call.
        measured: whether the growth was measured.
    """

    bytes_per_sec: int = ASSUMED_BYTES_PER_SEC
    bytes_per_sec_squared: int = ASSUMED_BYTES_PER_SEC_SQUARED
    max_bytes: int = MAX_ENCODE_BYTES
    measured: bool = False

    def window_bytes(self, secs: float) -> float:
        """Return the memory of a window of this length in bytes."""
        return self.bytes_per_sec * secs + self.bytes_per_sec_squared * secs**2

    @property
    def longest_secs(self) -> float:
        """Length of the longest window that fits into one call; infinite without growth."""
        linear, square = self.bytes_per_sec, self.bytes_per_sec_squared
        divisor = linear + math.sqrt(linear**2 + 4 * square * self.max_bytes)
        return 2 * self.max_bytes / divisor if divisor else math.inf

    def windows_per_call(self, secs: float) -> int | float:
        """Return the number of windows of this length that fit into one call; infinite without growth."""
        size = self.window_bytes(secs)
        return self.max_bytes // size if size else math.inf

    def check(self, name: str, value: object, secs: float) -> None:
        """Raise ParameterError unless a window fits.

        Args:
            name: the parameter that determines the length of the window.
            value: its value.
            secs: length of the window.
        """
        if secs <= self.longest_secs:
            return
        remedy = "" if self.measured else "; the growth is assumed: run amira models check to measure it"
        raise ParameterError(
            f"{name} is {value}: the encoder takes {self.window_bytes(secs) / 1e9:.2f} GB for a window of {secs:g} s, but "
            f"max_encode_bytes is {self.max_bytes}, which allows {math.floor(self.longest_secs * 10) / 10:g} s; lower {name}, "
            f"or raise max_encode_bytes if every encoder process may take that much{remedy}"
        )


class CachedWindows(NamedTuple):
    """A cached encoder, and the sizes of its windows in feature frames.

    Attributes:
        model: its name.
        window_features: feature frames of a call.
        chunk_features: feature frames by which the next window begins later.
        cache_size: values of a stream's cache.
    """

    model: str
    window_features: int
    chunk_features: int
    cache_size: int


@dataclass(frozen=True)
class CachedEncoders:
    """Encoders that carry their context in a cache; ``windows.Cached`` uses them.

    Attributes:
        encoders: by latency; that of ``balanced`` where the model has no other.
        hop_samples: samples between two feature frames.
        edge_features: feature frames around a window whose audio its features need.
        right_features: feature frames of look-ahead at the end of each window; the next window encodes them again.
        max_cache_features: feature frames that a cache covers at most; then it begins afresh; 0: no limit.
        warm_up_features: feature frames that fill such a cache before its first decoded chunk.
        zeros_before: whether feature frames of zeros stand before a fresh cache; else the encoder begins with the chunk.
        final_padding_samples: silence behind a stream's end that the encoder needs to emit its last tokens.
        reset_at_endpoint: whether an endpoint begins a fresh cache.
        element: numpy type of a cache's values: float16 or float32.
        languages: number of each language, by name; empty if the encoder takes none.
        default_language: of streams that name none.
    """

    encoders: Mapping[str, CachedWindows]
    hop_samples: int
    edge_features: int
    right_features: int
    warm_up_features: int
    max_cache_features: int
    zeros_before: bool
    final_padding_samples: int
    reset_at_endpoint: bool
    element: str
    languages: Mapping[str, int]
    default_language: str

    def cache_size(self, model: str) -> int:
        """Return the number of values in a cache of this encoder."""
        return next(encoder.cache_size for encoder in self.encoders.values() if encoder.model == model)

    def prompt(self, language: str) -> int | None:
        """Return the number of a stream's language, or None if the encoder takes none.

        A language without a region, such as ``de``, stands for its first region.

        Raises:
            ParameterError: the encoder does not know the language.
        """
        if not self.languages:
            return None
        wanted = language or self.default_language
        for name, number in self.languages.items():
            if name.casefold() == wanted.casefold():
                return number
        for name, number in self.languages.items():
            if name.casefold().split("-")[0] == wanted.casefold().split("-")[0]:
                return number
        raise ParameterError(f"language is {language!r}; allowed are {', '.join(self.languages)}")


GEOMETRY_RANGES = {"left_frames": (0, 100_000), "chunk_frames": (1, 100_000), "right_frames": (0, 100_000)}
GEOMETRY_PARAMETERS = {"low": "low_latency_frames", "throughput": "high_throughput_frames"}
"""Parameters with the geometries of latencies; ``balanced`` has one parameter for each part."""

CACHED_PARAMETERS = {
    "low": ("low_latency_encoder_model", "low_latency_features"),
    "throughput": ("high_throughput_encoder_model", "high_throughput_features"),
}
"""Parameters with the cached encoder of a latency, and with its sizes."""

ELEMENTS = {"fp16": "float16", "fp32": "float32"}
"""numpy's names of a cache's types."""

RENAMED_PARAMETERS = {"lone_encoder_model": "exclusive_encoder_model"}
"""New names by old names. Old names are refused, so that the gateway and ``amira models`` need not support them."""

LATENCIES = ("low", "balanced", "throughput")

MAX_BEAM = 16
"""Maximum number of hypotheses."""

MAX_ALTERNATIVES = 10
"""Maximum number of texts for a segment."""


@dataclass(frozen=True)
class Options:
    """Options of a stream, from the request parameters of its first request. The defaults are the model's.

    Attributes:
        context: ``window`` decodes window by window as audio arrives, ``whole`` in one window when the stream ends.
        latency: geometry of the windows: ``low``, ``balanced`` or ``throughput``.
        max_symbols_per_step: maximum number of tokens on one frame, 1 … 1000.
        max_total_tokens: number of tokens after which a segment ends, 1 … 100,000.
        endpoint_silence_ms: silence after a token that ends a segment, 0 … 60,000 ms; 0: silence ends no segment.
        save_state: 1 adds the stream's state to every response; another sequence can continue from it.
        language: language of the speech, for an encoder that takes one; empty: the model's default.
        beam: number of hypotheses for recordings that are decoded whole, 1 … 16; 1: greedy. A request's ``beam`` is that of its
            stream or recording, whichever it is.
        stream_beam: the same for streams.
        language_model: use of the language model: ``on``, ``off``, or ``auto``: for recordings that are decoded whole, and with
            a beam. Greedy decoding of streams gains nothing by it.
        alternatives: maximum number of texts for a final segment, 1 … 10; only a beam has several.
        phrases: phrases to boost: one per line, at most ``MAX_PHRASES``; behind a tab, the factor of their bonus.
    """

    context: str = "window"
    latency: str = "balanced"
    max_symbols_per_step: int = 10
    max_total_tokens: int = 200
    endpoint_silence_ms: int = 1200
    save_state: int = 0
    language: str = ""
    beam: int = 1
    stream_beam: int = 1
    language_model: str = "auto"
    alternatives: int = 1
    phrases: str = ""

    @property
    def width(self) -> int:
        """Number of hypotheses; 1: greedy."""
        return self.beam if self.context == "whole" else self.stream_beam

    def override(self, given: Mapping[str, Any]) -> Options:
        """Return the options with the values of a request's parameters; other parameters are ignored.

        Raises:
            ParameterError: a value is not allowed.
        """
        names = {field.name for field in fields(Options)}
        chosen: dict[str, Any] = {}
        for name, value in given.items():
            if name in ("context", "latency", "language_model"):
                chosen[name] = value
            elif name in ("language", "phrases"):
                chosen[name] = str(value)
            elif name in names:
                chosen[name] = _integer(name, value)
        if "beam" in chosen:
            chosen["stream_beam"] = chosen["beam"]
        return replace(self, **chosen).checked()

    def checked(self) -> Options:
        """Return these options if all are within their ranges.

        Raises:
            ParameterError: an option is not.
        """
        if self.context not in ("window", "whole"):
            raise ParameterError(f"context is {self.context!r}; allowed are 'window' and 'whole'")
        if self.latency not in LATENCIES:
            raise ParameterError(f"latency is {self.latency!r}; allowed are 'low', 'balanced' and 'throughput'")
        if self.language_model not in ("on", "off", "auto"):
            raise ParameterError(f"language_model is {self.language_model!r}; allowed are 'on', 'off' and 'auto'")
        _within("max_symbols_per_step", self.max_symbols_per_step, 1, 1000)
        _within("max_total_tokens", self.max_total_tokens, 1, 100_000)
        _within("endpoint_silence_ms", self.endpoint_silence_ms, 0, 60_000)
        _within("save_state", self.save_state, 0, 1)
        _within("beam", self.beam, 1, MAX_BEAM)
        _within("stream_beam", self.stream_beam, 1, MAX_BEAM)
        _within("alternatives", self.alternatives, 1, MAX_ALTERNATIVES)
        if self.alternatives > 1 and self.width == 1:
            raise ParameterError(
                f"alternatives is {self.alternatives}, but only a beam has several; set beam to 2 … {MAX_BEAM}"
            )
        if self.save_state and self.context == "whole":
            raise ParameterError("save_state is 1, but context=whole has no state before its end")
        return self


@dataclass(frozen=True)
class Parameters:
    """Parameters of the decoder. Frames are encoder frames.

    Attributes:
        preprocessor_model, encoder_model, decoder_joint_model: names of the models that the decoder calls.
        exclusive_encoder_model: encoder for a window that is alone and has no cache: the same graph with more threads.
        kind: ``rnnt`` or ``tdt``.
        blank: index of the blank in the joint network's logits.
        durations: jumps of a TDT in frames.
        blank_penalty: subtracted from the blank's logit.
        predictor_layers, predictor_hidden: the predictor's states are [layers, batch, hidden].
        frame_samples: number of 16 kHz samples per encoder frame.
        geometries: geometries of windows by latency; ``balanced`` for a latency without its own.
        block_frames: frames scored by one decoder call.
        encoder_calls: maximum number of encoder calls at once; the number of encoder instances keeps all of them busy.
        encoder_batch: maximum number of windows in one encoder call; ``memory`` may lower it.
        max_segment_secs: length at which a segment ends, with its current window or word.
        max_whole_secs: length of the longest recording with ``context=whole``.
        memory: memory of a window, and its limit.
        vocabulary: path of the vocabulary, relative to the decoder's directory.
        continuations: ids of the tokens that continue a word. A segment does not end before one of them.
        options: defaults of the options of a stream.
        cached: the encoders, if they carry their context in a cache; ``geometries`` is empty then.
        endpoint_tokens: ids of tokens that end a segment.
        whole_encoder_model: name of the encoder for ``context=whole`` if streams have cached ones; empty: such recordings are
            fast streams of ``throughput``.
        language_model: path of the n-gram model, relative to the decoder's directory; empty: none.
        language_model_weight: factor of its log probabilities.
        internal_lm_weight: factor of the transducer's own language model's log probabilities, which are subtracted.
        language_model_bonus: added per token in a beam with a language model, which makes each token cost more.
        insertion_bonus: added per token in a beam.
        phrase_bonus: added per token of a phrase.
        phrases_file: path of phrases for all streams, relative to the decoder's directory; empty: none.
        piece_scores: path of the tokenizer's scores, relative to the decoder's directory; empty: phrases are segmented into the
            longest pieces.
    """

    preprocessor_model: str
    encoder_model: str
    exclusive_encoder_model: str
    decoder_joint_model: str
    kind: str
    blank: int
    durations: tuple[int, ...]
    blank_penalty: float
    predictor_layers: int
    predictor_hidden: int
    frame_samples: int
    geometries: Mapping[str, Geometry]
    block_frames: int
    encoder_calls: int
    encoder_batch: int
    max_segment_secs: float
    max_whole_secs: float
    memory: WindowMemory
    vocabulary: str
    options: Options
    continuations: frozenset[int] = frozenset()
    cached: CachedEncoders | None = None
    endpoint_tokens: frozenset[int] = frozenset()
    whole_encoder_model: str = ""
    language_model: str = ""
    language_model_weight: float = 0.5
    internal_lm_weight: float = 0.2
    language_model_bonus: float = 1.1
    insertion_bonus: float = 0.5
    phrase_bonus: float = 1.5
    phrases_file: str = ""
    piece_scores: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Parameters:
        """Read the ``parameters`` of a model configuration.

        Raises:
            ParameterError: a parameter is missing, unknown or not allowed, or the configuration has a ``CORRID`` control.
        """
        _refuse_corrid(config)
        given = _Reader({name: entry.get("string_value", "") for name, entry in config.get("parameters", {}).items()})
        kind = given.choice("encoder_kind", ("windowed", "cached"), "windowed")
        whole = given.optional("whole_encoder_model") if kind == "cached" else ""
        parameters = cls(
            preprocessor_model=given.text("preprocessor_model"),
            encoder_model=given.text("encoder_model"),
            exclusive_encoder_model=given.text("exclusive_encoder_model", whole or given.text("encoder_model")),
            decoder_joint_model=given.text("decoder_joint_model"),
            kind=given.text("kind"),
            blank=given.integer("blank", 1, 1_000_000),
            durations=given.integers("durations"),
            blank_penalty=given.number("blank_penalty", -20.0, 20.0, 0.0),
            predictor_layers=given.integer("predictor_layers", 1, 64),
            predictor_hidden=given.integer("predictor_hidden", 1, 65_536),
            frame_samples=given.integer("frame_samples", 1, 160_000),
            geometries=given.geometries() if kind == "windowed" else {},
            block_frames=given.integer("block_frames", 1, 100_000, 32),
            encoder_calls=given.integer("encoder_calls", 1, 64, 2),
            encoder_batch=given.integer("encoder_batch", 1, 4096, 4),
            max_segment_secs=given.number("max_segment_secs", 1.0, 3600.0, 20.0),
            max_whole_secs=given.number("max_whole_secs", 1.0, 3600.0),
            memory=given.memory(),
            vocabulary=given.text("vocabulary"),
            options=Options(
                max_symbols_per_step=given.integer("max_symbols_per_step", 1, 1000, 10),
                max_total_tokens=given.integer("max_total_tokens", 1, 100_000, 200),
                endpoint_silence_ms=given.integer("endpoint_silence_ms", 0, 60_000, 1200),
                beam=given.integer("beam", 1, MAX_BEAM, 1),
                stream_beam=given.integer("stream_beam", 1, MAX_BEAM, 1),
            ),
            cached=given.cached() if kind == "cached" else None,
            endpoint_tokens=frozenset(given.integers("endpoint_tokens")),
            whole_encoder_model=whole,
            language_model=given.optional("language_model"),
            language_model_weight=given.number("language_model_weight", 0.0, 10.0, 0.5),
            internal_lm_weight=given.number("internal_lm_weight", 0.0, 10.0, 0.2),
            language_model_bonus=given.number("language_model_bonus", -20.0, 20.0, 1.1),
            insertion_bonus=given.number("insertion_bonus", -20.0, 20.0, 0.5),
            phrase_bonus=given.number("phrase_bonus", 0.0, 20.0, 1.5),
            phrases_file=given.optional("phrases_file"),
            piece_scores=given.optional("piece_scores"),
        )
        given.finish()
        if parameters.kind not in ("rnnt", "tdt"):
            raise ParameterError(f"kind is {parameters.kind!r}; allowed are 'rnnt' and 'tdt'")
        if (parameters.kind == "tdt") != bool(parameters.durations):
            raise ParameterError(f"durations is {list(parameters.durations)}; a tdt needs them and an rnnt has none")
        if any(duration < 0 for duration in parameters.durations):
            raise ParameterError(f"durations is {list(parameters.durations)}; none may be negative")
        if wrong := [token for token in parameters.endpoint_tokens if not 0 <= token < parameters.blank]:
            raise ParameterError(f"endpoint_tokens has {wrong}; they must be within 0 … {parameters.blank - 1}")
        parameters.check_windows()
        return parameters

    def windows_per_call(self, samples: int) -> int:
        """Return the maximum number of windows of this length in samples in one encoder call; at least 1."""
        if self.cached and not self.whole_encoder_model:
            return self.encoder_batch
        return int(max(1, min(self.encoder_batch, self.memory.windows_per_call(samples / SAMPLE_RATE))))

    def check_windows(self) -> None:
        """Raise ParameterError if a window may take more memory than one encoder call is allowed, or has a part of a frame.

        The last window of a stream is not longer than its others, and ``stream.py`` refuses whole recordings longer than
        ``max_whole_secs``, so no request can take more.
        """
        if self.cached:
            for latency, encoder in self.cached.encoders.items():
                if encoder.chunk_features * self.cached.hop_samples % self.frame_samples:
                    raise ParameterError(
                        f"chunk_features of {latency} is {encoder.chunk_features}; times {self.cached.hop_samples} samples "
                        f"it must be a multiple of frame_samples, {self.frame_samples}"
                    )
            if not self.whole_encoder_model:
                return
        self.memory.check("max_whole_secs", f"{self.max_whole_secs:g}", self.max_whole_secs)
        for latency, geometry in self.geometries.items():
            name = GEOMETRY_PARAMETERS.get(latency, "left_frames + chunk_frames + right_frames")
            frames = sum(geometry)
            self.memory.check(name, frames, frames * self.frame_samples / SAMPLE_RATE)


def _refuse_corrid(config: Mapping[str, Any]) -> None:
    """Raise ParameterError if the configuration has an input for sequence ids: string ids overrun it (``model.py``)."""
    for control_input in config.get("sequence_batching", {}).get("control_input", []):
        if any(control.get("kind") == "CONTROL_SEQUENCE_CORRID" for control in control_input["control"]):
            raise ParameterError(
                f"control_input {control_input['name']} is CONTROL_SEQUENCE_CORRID, which mixes string sequence ids; remove it"
            )


class _Reader:
    """Reads typed values from string parameters, and records which names were read."""

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values
        self._known: set[str] = set()

    def text(self, name: str, default: str | None = None) -> str:
        self._known.add(name)
        value = self._values.get(name, default)
        if not value:
            raise ParameterError(f"parameter {name} is missing")
        return value

    def optional(self, name: str) -> str:
        self._known.add(name)
        return self._values.get(name, "")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = _integer(name, self.text(name, None if default is None else str(default)))
        _within(name, value, low, high)
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        text = self.text(name, None if default is None else str(default))
        try:
            value = float(text)
        except ValueError:
            raise ParameterError(f"{name} is {text!r}; it must be a number") from None
        _within(name, value, low, high)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        self._known.add(name)
        return tuple(_integer(name, part.strip()) for part in self._values.get(name, "").split(",") if part.strip())

    def geometries(self) -> dict[str, Geometry]:
        ranges = GEOMETRY_RANGES.items()
        balanced = Geometry(*(self.integer(part, low, high) for part, (low, high) in ranges))
        geometries = {"balanced": balanced}
        for latency, name in GEOMETRY_PARAMETERS.items():
            frames = self.integers(name) or balanced
            if len(frames) != len(balanced):
                raise ParameterError(f"{name} is {list(frames)}; it must be three whole numbers: left, chunk, right")
            for (part, (low, high)), value in zip(ranges, frames, strict=True):
                _within(f"{name}: {part}", value, low, high)
            geometries[latency] = Geometry(*frames)
        return geometries

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise ParameterError(f"{name} is {value!r}; allowed are {' and '.join(map(repr, allowed))}")
        return value

    def cached(self) -> CachedEncoders:
        balanced = CachedWindows(
            self.text("encoder_model"),
            self.integer("window_features", 1, 100_000),
            self.integer("chunk_features", 1, 100_000),
            self.integer("cache_size", 1, 10**9),
        )
        encoders = {"balanced": balanced}
        for latency, (model, features) in CACHED_PARAMETERS.items():
            sizes = self.integers(features)
            self._known.add(model)
            encoders[latency] = balanced
            if sizes or self._values.get(model):
                if len(sizes) != len(balanced) - 1 or min(sizes) < 1:
                    raise ParameterError(
                        f"{features} is {list(sizes)}; it must be three whole numbers from 1 on: window, chunk, cache"
                    )
                encoders[latency] = CachedWindows(self.text(model), *sizes)
        right = self.integer("right_features", 0, 100_000, 0)
        for latency, encoder in encoders.items():
            if encoder.chunk_features + right > encoder.window_features:
                raise ParameterError(
                    f"chunk_features of {latency} is {encoder.chunk_features}; it must be at most window_features"
                    f"{' - right_features' if right else ''}, {encoder.window_features - right}"
                )
        warm_up = self.integer("warm_up_features", 0, 100_000, 0)
        max_cache = self.integer("max_cache_features", 0, 10_000_000, 0)
        for latency, encoder in encoders.items():
            shortest = (-(-warm_up // encoder.chunk_features) + 1) * encoder.chunk_features
            if 0 < max_cache < shortest:
                raise ParameterError(
                    f"max_cache_features is {max_cache}; it must be 0 or at least {shortest}: "
                    f"the chunks of {latency} that warm_up_features need, and one more"
                )
        languages = self.languages()
        default = self.text("default_language") if languages else ""
        if languages and default not in languages:
            raise ParameterError(f"default_language is {default!r}; allowed are {', '.join(languages)}")
        return CachedEncoders(
            encoders=encoders,
            hop_samples=self.integer("hop_samples", 1, SAMPLE_RATE),
            edge_features=self.integer("edge_features", 0, 100),
            right_features=right,
            warm_up_features=warm_up,
            max_cache_features=max_cache,
            zeros_before=self.choice("fresh_features", ("zeros", "none"), "zeros") == "zeros",
            final_padding_samples=self.integer("final_padding_ms", 0, 10_000, 0) * SAMPLE_RATE // 1000,
            reset_at_endpoint=self.choice("cache_reset", ("endpoint", "never"), "endpoint") == "endpoint",
            element=ELEMENTS[self.choice("cache_type", tuple(ELEMENTS), "fp16")],
            languages=languages,
            default_language=default,
        )

    def languages(self) -> dict[str, int]:
        self._known.add("languages")
        found = {}
        for part in filter(None, (part.strip() for part in self._values.get("languages", "").split(","))):
            name, _, number = part.partition("=")
            found[name] = _integer(f"languages: {name}", number)
        return found

    def memory(self) -> WindowMemory:
        max_bytes = self.integer("max_encode_bytes", 1_000_000, 10**18, MAX_ENCODE_BYTES)
        names = "window_bytes_per_sec", "window_bytes_per_sec_squared"
        given = [name for name in names if self._values.get(name)]
        if len(given) == 1:
            raise ParameterError(f"only {given[0]} is set; {names[0]} and {names[1]} are measured together")
        linear = self.integer(names[0], 0, 10**15, ASSUMED_BYTES_PER_SEC)
        square = self.integer(names[1], 0, 10**15, ASSUMED_BYTES_PER_SEC_SQUARED)
        return WindowMemory(linear, square, max_bytes, measured=bool(given))

    def finish(self) -> None:
        for old, new in RENAMED_PARAMETERS.items():
            if old in self._values:
                raise ParameterError(f"parameter {old} is now called {new}; rename it")
        unknown = sorted(set(self._values) - self._known)
        if unknown:
            raise ParameterError(f"unknown parameters {unknown}; known are {sorted(self._known)}")


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        return int(value)
    except (TypeError, ValueError):
        raise ParameterError(f"{name} is {value!r}; it must be a whole number") from None


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ParameterError(f"{name} is {value}; it must be within {low} … {high}")

"""Read the configuration of a Riva request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.api.phrases import MAX_ALTERNATIVES, phrase_options
from gateway.api.riva_schema import ENCODINGS
from gateway.audio.convert import MAX_CHANNELS, MAX_RATE, MIN_RATE
from gateway.audio.media_types import OCTETS
from gateway.audio.raw import DEFAULT, Encoding, RawFormat
from gateway.errors import ApiError, ErrorKind
from gateway.languages import base_of
from gateway.service import Service

G711_RATE = 8_000
"""Default sample rate of µ-law and A-law, in Hz: that of ITU-T G.711."""

MAX_SILENCE_MS = 60_000
"""Maximum of the decoder's ``endpoint_silence_ms``."""

ANY_LANGUAGE = "multi"
"""Language code by which Riva's clients leave the language to the model."""

RAW_ENCODINGS = {"LINEAR_PCM": Encoding.LINEAR16, "MULAW": Encoding.MULAW, "ALAW": Encoding.ALAW}
"""Encodings of raw audio. A file is recognised by its content whichever of them is declared."""

CONTAINERS = {"FLAC": "audio/flac", "OGGOPUS": "audio/ogg"}
"""Encodings that need a file, with its media type. Any file that is known is taken, but no raw audio."""


@dataclass(frozen=True)
class Options:
    """What a request asks for.

    Attributes:
        model: public name of the model.
        encoding: Riva's name of the encoding.
        raw: format of the audio if it is raw.
        content_type: media type of a recording.
        is_file: whether the audio must be a file.
        separate: whether each channel of a recording gets a transcript of its own.
        words: whether results list words with times.
        interim: whether a stream gets results before the end of a segment.
        decoder: options of the decoder.
        ignored: names of fields that are set and have no effect.
    """

    model: str
    encoding: str
    raw: RawFormat
    content_type: str
    is_file: bool
    separate: bool
    words: bool
    interim: bool
    decoder: Mapping[str, str | int]
    ignored: tuple[str, ...]


def read_config(config: Any, service: Service, *, live: bool, interim: bool = False) -> Options:
    """Read a ``RecognitionConfig``.

    Args:
        config: the message.
        service: the gateway's models.
        live: whether it is of a stream.
        interim: whether the stream asks for interim results.

    Raises:
        ApiError: a value is not allowed, or asks for what this server cannot do.
    """
    model = service.resolve_model(config.model or next(iter(service.settings.models)))
    language = _language_options(config.language_code, model, service)
    if config.max_alternatives < 0:
        raise _refused("max_alternatives", f"is {config.max_alternatives}; it must be 0 or more")
    if config.diarization_config.enable_speaker_diarization:
        raise _refused("diarization_config", "asks for speakers, whom this server does not tell apart; leave it out")
    raw = _read_format(config)
    separate = config.enable_separate_recognition_per_channel and raw.channels > 1
    if live and separate:
        name = "enable_separate_recognition_per_channel"
        raise _refused(name, "is true, but channels of a stream are mixed; use Recognize, or a stream for each channel")
    encoding = ENCODINGS[config.encoding]
    has_beam = config.max_alternatives > 1 and service.beam(model, live=live) > 1
    return Options(
        model=model,
        encoding=encoding,
        raw=raw,
        content_type=CONTAINERS.get(encoding, OCTETS),
        is_file=encoding in CONTAINERS,
        separate=separate,
        words=config.enable_word_time_offsets,
        interim=interim,
        decoder={**_decoder_options(config, live=live, has_beam=has_beam), **language},
        ignored=tuple(_ignored(config, live=live, has_beam=has_beam)),
    )


def _decoder_options(config: Any, *, live: bool, has_beam: bool) -> dict[str, str | int]:
    """Return the options of the decoder.

    Raises:
        ApiError: ``UNACCEPTABLE``, a value is not allowed.
    """
    silence_ms = config.endpointing_config.stop_history if live else 0  # a recording is decoded whole
    if not 0 <= silence_ms <= MAX_SILENCE_MS:
        raise _refused("endpointing_config.stop_history", f"is {silence_ms}; it must be from 1 to {MAX_SILENCE_MS} ms")
    # A context with a negative boost names what is not to be favoured.
    phrases = [phrase for context in config.speech_contexts if context.boost >= 0 for phrase in context.phrases]
    silence: dict[str, str | int] = {"endpoint_silence_ms": silence_ms} if silence_ms else {}
    several = has_beam and config.max_alternatives > 1
    alternatives: dict[str, str | int] = {"alternatives": min(config.max_alternatives, MAX_ALTERNATIVES)} if several else {}
    return {**silence, **alternatives, **phrase_options(phrases, "speech_contexts")}


def _ignored(config: Any, *, live: bool, has_beam: bool) -> list[str]:
    """Return the names of fields that are set and have no effect."""
    names = ["profanity_filter", "enable_automatic_punctuation", "custom_configuration"]
    ignored = [name for name in names if getattr(config, name)]
    if any(context.boost for context in config.speech_contexts):
        ignored.append("speech_contexts.boost")
    if config.max_alternatives > 1 and not has_beam:
        ignored.append("max_alternatives")
    honoured = {"stop_history"} if live else set()
    ignored += [
        f"endpointing_config.{field.name}" for field, _ in config.endpointing_config.ListFields() if field.name not in honoured
    ]
    return ignored


def _read_format(config: Any) -> RawFormat:
    """Return the format of raw audio.

    Raises:
        ApiError: ``UNACCEPTABLE``, a value is not allowed.
    """
    if config.encoding not in ENCODINGS:
        raise _refused("encoding", f"is {config.encoding}; known: {', '.join(ENCODINGS.values())}")
    encoding = RAW_ENCODINGS.get(ENCODINGS[config.encoding], DEFAULT.encoding)
    rate, channels = config.sample_rate_hertz, config.audio_channel_count
    if rate and not MIN_RATE <= rate <= MAX_RATE:
        raise _refused("sample_rate_hertz", f"is {rate}; it must be from {MIN_RATE} to {MAX_RATE} Hz")
    if not 0 <= channels <= MAX_CHANNELS:
        raise _refused("audio_channel_count", f"is {channels}; it must be from 1 to {MAX_CHANNELS}")
    default_rate = DEFAULT.rate if encoding is DEFAULT.encoding else G711_RATE
    return RawFormat(encoding, rate or default_rate, channels or DEFAULT.channels)


def _language_options(code: str, model: str, service: Service) -> dict[str, str | int]:
    """Return the options of the decoder for a language.

    Args:
        code: BCP-47 code of the request; empty for none.
        model: name of the model.
        service: the gateway's models.

    Raises:
        ApiError: the model does not know the language, or no Triton can serve it now.
    """
    if not code or code == ANY_LANGUAGE:
        return {}
    spoken = service.settings.model_languages.get(model)
    if spoken is None or service.languages(model):
        return service.language_options(model, [code])
    if base_of(code) != spoken:
        raise _refused("language_code", f"is {code[:40]!r}, but model {model!r} knows {spoken!r} alone")
    return {}


def _refused(name: str, problem: str) -> ApiError:
    return ApiError(ErrorKind.UNACCEPTABLE, f"{name} {problem}", name)

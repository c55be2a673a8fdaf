"""The ensemble by Triton's own client libraries, without the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from tritonclient.grpc import InferInput
from tritonclient.grpc import aio as grpcclient
from tritonclient.http import aio as httpclient
from tritonclient.utils import InferenceServerException

from amira.engine.errors import EngineError
from amira.paths import MODEL_REPOSITORY
from amira.ports import Ports
from tests.support.clients import decoder_metric
from tests.support.commands import edit, triton_with
from tests.support.repositories import copy_repository
from tests.support.servers import Recordings, Samples

SEQUENCE_IDS = itertools.count(1)
SILENCE = np.zeros(0, np.int16)

pytestmark = pytest.mark.usefixtures("no_sequence_left")


class Ensemble:
    """``asr_ensemble`` by one of Triton's client libraries: ``tritonclient.grpc.aio`` or ``tritonclient.http.aio``."""

    def __init__(self, library: Any, target: str) -> None:
        self.library = library
        self.client = library.InferenceServerClient(target)

    async def __call__(
        self, sequence: int | str, samples: Samples, *, start: bool, end: bool, **options: Any
    ) -> dict[str, Any]:
        audio = self.library.InferInput("AUDIO", [1, len(samples)], "INT16")
        audio.set_data_from_numpy(samples[None])
        result = await self.client.infer(
            "asr_ensemble", [audio], sequence_id=sequence, sequence_start=start, sequence_end=end, parameters=options or None
        )
        response = result.get_response()
        names = (
            [output["name"] for output in response["outputs"]]
            if isinstance(response, dict)
            else [output.name for output in response.outputs]
        )
        outputs = {name: result.as_numpy(name) for name in names}
        outputs["TEXT"] = outputs["TEXT"][0, 0].decode()
        outputs["WORDS"] = orjson.loads(outputs["WORDS"][0, 0])
        return outputs

    async def whole(self, samples: Samples, **options: Any) -> dict[str, Any]:
        return await self(next(SEQUENCE_IDS), samples, start=True, end=True, **options)


@pytest.fixture
async def ensemble(triton: Ports) -> AsyncIterator[Ensemble]:
    by_grpc = Ensemble(grpcclient, f"{triton.host}:{triton.grpc}")
    yield by_grpc
    await by_grpc.client.close()


@pytest.fixture
async def http_ensemble(triton: Ports) -> AsyncIterator[Ensemble]:
    by_http = Ensemble(httpclient, f"{triton.host}:{triton.http}")
    yield by_http
    await by_http.client.close()


async def test_shapes_and_types_of_outputs(ensemble: Ensemble, recordings: Recordings) -> None:
    answer = await ensemble.whole(recordings["jfk"], context="whole")
    tokens = answer["TOKENS"].shape[1]
    assert tokens > 10
    assert answer["TOKENS"].shape == (1, tokens)
    assert answer["TOKENS"].dtype == np.int32
    assert answer["CONFIDENCE"].shape == (1, 1)
    assert answer["CONFIDENCE"].dtype == np.float32
    assert answer["STABLE"].tolist() == [[tokens]]
    assert answer["STABLE_CHARS"].tolist() == [[len(answer["TEXT"])]]
    assert answer["SEGMENT"].tolist() == [[0, 1]]
    assert answer["LENGTHS"].tolist() == [[176000, 459, 115]]
    assert answer["LENGTHS"].dtype == np.int64
    assert " ".join(word["word"] for word in answer["WORDS"]) == answer["TEXT"]


async def test_silence_has_no_tokens_and_nan_confidence(ensemble: Ensemble) -> None:
    answer = await ensemble.whole(np.zeros(32000, np.int16))
    assert answer["TOKENS"].shape == (1, 0)
    assert np.isnan(answer["CONFIDENCE"]).all()
    assert (answer["TEXT"], answer["WORDS"]) == ("", [])


async def test_whole_and_window_use_different_contexts(ensemble: Ensemble, recordings: Recordings) -> None:
    whole = await ensemble.whole(recordings["jfk"], context="whole")
    window = await ensemble.whole(recordings["jfk"], context="window")
    assert (await ensemble.whole(recordings["jfk"]))["TEXT"] == window["TEXT"], "window is the default"
    assert whole["TEXT"] != window["TEXT"]


async def test_one_request_equals_many(ensemble: Ensemble, recordings: Recordings) -> None:
    samples = recordings["jfk"]
    for context in ("window", "whole"):
        at_once = await ensemble.whole(samples, context=context)
        sequence = next(SEQUENCE_IDS)
        await ensemble(sequence, samples[:7], start=True, end=False, context=context)
        for piece in np.array_split(samples[7:], 9):
            answer = await ensemble(sequence, piece, start=False, end=False)
            assert answer["SEGMENT"].tolist() == [[0, 0]]
        answer = await ensemble(sequence, SILENCE, start=False, end=True)
        assert answer["TOKENS"].tolist() == at_once["TOKENS"].tolist()
        assert answer["WORDS"] == at_once["WORDS"]
        assert answer["LENGTHS"].tolist() == at_once["LENGTHS"].tolist()


WORD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_total_tokens": 5, "endpoint_silence_ms": 0},
    {"max_total_tokens": 1, "latency": "low"},
    {"max_total_tokens": 12, "endpoint_silence_ms": 200, "latency": "throughput"},
    {"context": "whole"},
]


@pytest.mark.parametrize("options", WORD_OPTIONS)
@pytest.mark.parametrize(
    "lengths",
    [
        (4 * 16_000 + 5, 9 * 16_000 + 700),
        pytest.param((None, 21 * 16_000 + 1000), marks=pytest.mark.slow),
    ],
    ids=["some", "more"],
)
async def test_words_match_text_in_order_within_audio(
    ensemble: Ensemble, recordings: Recordings, lengths: tuple[int | None, ...], options: dict[str, Any]
) -> None:
    """Segments end amid speech, and the end of the audio cuts the last word off."""
    samples = np.concatenate(list(recordings.values()))
    for audio in (samples[:length] for length in lengths):
        sequence, words, segments = next(SEQUENCE_IDS), list[dict[str, Any]](), list[dict[str, Any]]()
        pieces = np.array_split(audio, 1 + len(audio) // 12000)
        for i, piece in enumerate(pieces):
            flags = {"start": i == 0, "end": i == len(pieces) - 1}
            answer = await ensemble(sequence, piece, **flags, **(options if i == 0 else {}))
            said = [*words, *answer["WORDS"]]
            assert answer["TEXT"].strip() == " ".join(word["word"] for word in answer["WORDS"])
            assert answer["TEXT"].startswith(" ") == (bool(answer["WORDS"]) and answer["SEGMENT"][0, 0] > 0)
            assert all(word["start"] < word["end"] for word in said)
            assert all(word["end"] <= following["start"] for word, following in itertools.pairwise(said))
            assert not said or said[-1]["end"] <= len(audio) / 16000
            if answer["SEGMENT"][0, 1]:
                words = said
                segments.append(answer)
        assert words
        assert_no_word_is_split(segments)


def assert_no_word_is_split(segments: list[dict[str, Any]]) -> None:
    """Check that no segment begins with a piece that continues a word, unless a pause precedes it."""
    pieces = (MODEL_REPOSITORY / "vocab.txt").read_text(encoding="utf-8").split("\n")
    spoken = [answer for answer in segments if answer["WORDS"]]
    for before, answer in itertools.pairwise(spoken):
        pause = answer["WORDS"][0]["start"] - before["WORDS"][-1]["end"]
        assert pieces[answer["TOKENS"][0, 0]].startswith("▁") or pause >= 0.5, answer["TEXT"]


async def test_batched_streams_keep_their_options(ensemble: Ensemble, recordings: Recordings) -> None:
    samples = recordings["jfk"][: 8 * 16_000]
    options: list[dict[str, Any]] = [{}, {"context": "whole"}, {"max_symbols_per_step": 1}, {"endpoint_silence_ms": 300}] * 2
    solo = [await ensemble.whole(samples, **chosen) for chosen in options[:4]]
    together = await asyncio.gather(*(ensemble.whole(samples, **chosen) for chosen in options))
    assert [answer["TOKENS"].tolist() for answer in together] == [answer["TOKENS"].tolist() for answer in solo] * 2
    assert len({str(answer["TOKENS"].tolist()) for answer in solo}) >= 3, "the options have no effect"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": "sideways"}, "'sideways'; allowed are 'window' and 'whole'"),
        ({"max_symbols_per_step": 0}, "max_symbols_per_step is 0; it must be within 1 … 1000"),
        ({"endpoint_silence_ms": "soon"}, "endpoint_silence_ms is 'soon'; it must be a whole number"),
    ],
)
async def test_bad_option_fails_only_its_request(
    ensemble: Ensemble, recordings: Recordings, options: dict[str, Any], named: str
) -> None:
    samples = recordings["jfk"][:80000]
    expected = (await ensemble.whole(samples))["TOKENS"].tolist()
    good, bad = [ensemble.whole(samples) for _ in range(4)], [ensemble.whole(samples, **options) for _ in range(4)]
    answers = await asyncio.gather(*itertools.chain(*zip(good, bad, strict=True)), return_exceptions=True)
    for answer in answers[0::2]:
        assert not isinstance(answer, BaseException)
        assert answer["TOKENS"].tolist() == expected
    for error in answers[1::2]:
        assert isinstance(error, InferenceServerException)
        assert named in error.message()


async def test_too_long_whole_recording_is_invalid_argument(ensemble: Ensemble) -> None:
    with pytest.raises(InferenceServerException, match=r"at most 60 s of audio; this has 61\.00 s; cut it") as raised:
        await ensemble.whole(np.zeros(61 * 16000, np.int16), context="whole")
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_oversized_window_is_refused_at_load(tmp_path: Path) -> None:
    """One recording of 300 s in one window took 14 GB, and the kernel killed the process."""
    model_repository = copy_repository(tmp_path / "models", warm=False)
    edit(
        model_repository / "rnnt_greedy_bls" / "config.pbtxt",
        '"max_whole_secs" value: { string_value: "60" }',
        '"max_whole_secs" value: { string_value: "300" }',
    )
    refused = r"rnnt_greedy_bls failed to load: .*max_whole_secs is 300: .* GB .* which allows 65\.\d s; lower max_whole_secs"
    with pytest.raises(EngineError, match=refused):
        async with triton_with(model_repository):
            pass


async def test_equal_recordings_share_calls_within_memory(ensemble: Ensemble, triton: Ports) -> None:
    """Two windows of 50 s would take 1.9 GB in one encoder call; eight of 4 s share calls."""
    calls = {}
    for secs, windows in ((50, 2), (4, 8)):
        before = await decoder_metric(triton, "asr_decoder_encode_calls_total")
        quiet = np.zeros(secs * 16000, np.int16)
        await asyncio.gather(*(ensemble.whole(quiet, context="whole") for _ in range(windows)))
        calls[secs] = await decoder_metric(triton, "asr_decoder_encode_calls_total") - before
    assert calls[50] == 2
    assert calls[4] < 8


async def test_unstarted_sequence_is_refused(ensemble: Ensemble) -> None:
    with pytest.raises(InferenceServerException, match="START"):
        await ensemble(next(SEQUENCE_IDS), np.zeros(100, np.int16), start=False, end=False)


async def test_start_on_live_sequence_replaces_it(ensemble: Ensemble, recordings: Recordings, triton: Ports) -> None:
    samples = recordings["jfk"][:64000]
    expected = (await ensemble.whole(samples))["TOKENS"].tolist()
    sequence = next(SEQUENCE_IDS)
    await ensemble(sequence, recordings["jfk"], start=True, end=False)
    await ensemble(sequence, samples, start=True, end=False)
    assert await decoder_metric(triton, "asr_decoder_sequences") == 1
    assert (await ensemble(sequence, SILENCE, start=False, end=True))["TOKENS"].tolist() == expected


async def test_concurrent_starts_leave_one_sequence(ensemble: Ensemble, recordings: Recordings, triton: Ports) -> None:
    """The last start has the sequence; the decoder holds one sequence, and none after its end."""
    samples = recordings["jfk"][:64000]
    sequence = next(SEQUENCE_IDS)
    answers = await asyncio.gather(*(ensemble(sequence, samples, start=True, end=False) for _ in range(6)))
    assert len({str(answer["TOKENS"].tolist()) for answer in answers}) == 1
    assert await decoder_metric(triton, "asr_decoder_sequences") == 1
    ended = await ensemble(sequence, SILENCE, start=False, end=True)
    assert ended["LENGTHS"][0, 0] == len(samples)
    assert ended["TOKENS"].tolist() == (await ensemble.whole(samples))["TOKENS"].tolist()


async def test_id_is_free_after_the_end_of_its_sequence(ensemble: Ensemble, recordings: Recordings) -> None:
    samples = recordings["jfk"][:64000]
    sequence = next(SEQUENCE_IDS)
    first = await ensemble(sequence, samples, start=True, end=True)
    with pytest.raises(InferenceServerException, match="START"):
        await ensemble(sequence, samples, start=False, end=False)
    assert (await ensemble(sequence, samples, start=True, end=True))["TOKENS"].tolist() == first["TOKENS"].tolist()


SEQUENCE_KINDS: dict[str, Callable[[int], int | str]] = {
    "uuid": lambda _: str(uuid.uuid4()),
    "equal_prefix": lambda i: f"call-{i:03}",
    "longest": lambda i: f"{'caller-' * 17}{i:09}",  # 128 characters
    "short": lambda i: chr(ord("a") + i),
    "not_ascii": lambda i: f"Anruf-{i:03}-ä語😀",
    "decimal": lambda i: str(900_000 + i),
    "integer": lambda i: 900_000 + i,
    "large_integer": lambda i: 2**62 + i,
}
"""The i-th sequence id of each kind. A decimal string and the integer of the same digits are two sequences."""


async def test_sequence_ids_of_every_kind_are_kept_apart(
    ensemble: Ensemble, http_ensemble: Ensemble, recordings: Recordings
) -> None:
    """32 concurrent sequences, four of each kind of id, by both client libraries, with different speech."""
    samples = np.concatenate(list(recordings.values()))
    speech = [samples[i * 8000 : i * 8000 + 32000 + 700 * i] for i in range(4 * len(SEQUENCE_KINDS))]
    options: dict[str, Any] = {"endpoint_silence_ms": 0}  # one segment each, all of it in the last answer
    expected = [await ensemble.whole(one, **options) for one in speech]
    ids = [make(i) for i in range(4) for make in SEQUENCE_KINDS.values()]
    clients = [(ensemble, http_ensemble)[(i + i // len(SEQUENCE_KINDS)) % 2] for i in range(len(ids))]

    async def send(turn: int, turns: int) -> list[dict[str, Any]]:
        """Send the next piece of every sequence, all at once."""
        flags: dict[str, Any] = {"start": turn == 0, "end": turn == turns - 1, **(options if turn == 0 else {})}
        pieces = [np.array_split(one, turns)[turn] for one in speech]
        return await asyncio.gather(
            *(client(name, piece, **flags) for client, name, piece in zip(clients, ids, pieces, strict=True))
        )

    answers = [await send(turn, 4) for turn in range(4)][-1]
    for name, answer, own in zip(ids, answers, expected, strict=True):
        assert answer["LENGTHS"].tolist() == own["LENGTHS"].tolist(), name
        assert (answer["TEXT"], answer["TOKENS"].tolist()) == (own["TEXT"], own["TOKENS"].tolist()), name
    assert len({answer["TEXT"] for answer in answers}) > len(ids) // 2, "the sequences have too little different speech"


async def test_non_utf8_id_fails_only_its_request(ensemble: Ensemble, recordings: Recordings, triton: Ports) -> None:
    samples = recordings["jfk"][:48000]
    expected = (await ensemble.whole(samples))["TOKENS"].tolist()
    header = (
        b'{"inputs":[{"name":"AUDIO","shape":[1,1600],"datatype":"INT16","parameters":{"binary_data_size":3200}}],'
        b'"parameters":{"sequence_id":"call-\xff\xfe","sequence_start":true,"sequence_end":true}}'
    )
    async with httpx.AsyncClient() as client:
        refused = asyncio.create_task(
            client.post(
                f"http://{triton.host}:{triton.http}/v2/models/asr_ensemble/infer",
                content=header + bytes(3200),
                headers={"Inference-Header-Content-Length": str(len(header))},
            )
        )
        answers = await asyncio.gather(*(ensemble.whole(samples) for _ in range(4)))
        response = await refused
    assert [answer["TOKENS"].tolist() for answer in answers] == [expected] * 4
    assert response.status_code == 400
    assert "sequence id is not UTF-8" in response.text


async def test_correlation_id_control_is_refused_at_load(tmp_path: Path) -> None:
    """Older repositories have the control; with it, string ids overrun an input."""
    model_repository = copy_repository(tmp_path / "models", warm=False)
    edit(
        model_repository / "rnnt_greedy_bls" / "config.pbtxt",
        "control_input [\n",
        'control_input [\n{ name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] },\n',
    )
    with pytest.raises(EngineError, match=r"rnnt_greedy_bls failed to load: .*control_input CORRID is .*; remove it"):
        async with triton_with(model_repository):
            pass


async def test_unended_sequence_is_replaced_by_its_id(ensemble: Ensemble, triton: Ports) -> None:
    """The decoder holds the sequence until it is idle for too long, or until its id starts and ends again."""
    sequence = next(SEQUENCE_IDS)
    for start in (True, False):
        await ensemble(sequence, np.zeros(1600, np.int16), start=start, end=False)
    assert await decoder_metric(triton, "asr_decoder_sequences") == 1
    await ensemble(sequence, SILENCE, start=True, end=True)
    assert await decoder_metric(triton, "asr_decoder_sequences") == 0


@pytest.mark.parametrize("begun", [False, True])
async def test_cancelled_waiting_request_disturbs_no_other(ensemble: Ensemble, recordings: Recordings, begun: bool) -> None:
    """Triton drops the request without informing the decoder; an END then frees its sequence and no other."""
    samples = recordings["jfk"][:96_000]
    expected = (await ensemble.whole(samples))["TOKENS"].tolist()
    sequence = next(SEQUENCE_IDS)
    if begun:
        await ensemble(sequence, samples, start=True, end=False)
    others = [asyncio.create_task(ensemble.whole(samples)) for _ in range(6)]
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(ensemble(sequence, samples, start=not begun, end=False))
    await asyncio.sleep(0.05)
    assert not any(other.done() for other in others), "no request is queued"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    with contextlib.suppress(InferenceServerException):
        await ensemble(sequence, SILENCE, start=False, end=True)
    assert [answer["TOKENS"].tolist() for answer in await asyncio.gather(*others)] == [expected] * 6


async def test_graph_error_names_model_and_tensors(ensemble: Ensemble) -> None:
    """The feeds have two rows of frames and one row of everything else."""
    state = np.zeros((1, 1, 256), np.float32)
    feeds = {
        "encoder_outputs": np.zeros((2, 256, 4), np.float32),
        "targets": np.zeros((1, 1), np.int32),
        "target_length": np.ones(1, np.int32),
        "input_states_1": state,
        "input_states_2": state[:, [0, 0, 0]],
    }
    inputs = []
    for name, array in feeds.items():
        inputs.append(InferInput(name, array.shape, "FP32" if array.dtype == np.float32 else "INT32"))
        inputs[-1].set_data_from_numpy(array)
    with pytest.raises(InferenceServerException) as raised:
        await ensemble.client.infer("decoder_joint", inputs)
    assert "decoder_joint: inference failed" in raised.value.message()
    assert "'encoder_outputs': [2, 256, 4]" in raised.value.message()


async def test_decoder_calls_are_bounded_by_tokens_and_blocks(
    ensemble: Ensemble, recordings: Recordings, triton: Ports
) -> None:
    """A whole recording costs its tokens + 1 calls, and one for every block that the walk crosses."""
    before = await decoder_metric(triton, "asr_decoder_calls_total")
    answer = await ensemble.whole(recordings["jfk"], context="whole", beam=1)
    calls = await decoder_metric(triton, "asr_decoder_calls_total") - before
    tokens, frames, block_frames = answer["TOKENS"].shape[1], answer["LENGTHS"][0, 2], 8
    assert tokens < calls <= tokens + 1 + frames // block_frames


async def test_decoder_metrics_count_audio_tokens_rows(ensemble: Ensemble, recordings: Recordings, triton: Ports) -> None:
    names = ("asr_decoder_audio_seconds_total", "asr_decoder_tokens_total", "asr_decoder_rows_total")
    before = [await decoder_metric(triton, name) for name in names]
    answers = await asyncio.gather(*(ensemble.whole(recordings["jfk"]) for _ in range(4)))
    after = [await decoder_metric(triton, name) for name in names]
    seconds, tokens, rows = np.subtract(after, before)
    assert seconds == pytest.approx(44)
    assert tokens == sum(answer["TOKENS"].shape[1] for answer in answers)
    assert rows >= tokens

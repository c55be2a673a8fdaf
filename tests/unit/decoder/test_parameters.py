from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parameters import GEOMETRY_PARAMETERS, Geometry, Options, ParameterError, Parameters, WindowMemory

MODELS = Path(__file__).parents[3] / "model-repo"

REQUIRED = {
    "preprocessor_model": "preprocessor",
    "encoder_model": "encoder",
    "decoder_joint_model": "decoder_joint",
    "kind": "rnnt",
    "blank": "512",
    "predictor_layers": "1",
    "predictor_hidden": "256",
    "frame_samples": "1536",
    "left_frames": "42",
    "chunk_frames": "10",
    "right_frames": "5",
    "max_whole_secs": "45.0",
    "vocabulary": "../vocab.txt",
}
GROWTH = {"window_bytes_per_sec": "1000000", "window_bytes_per_sec_squared": "300000"}
UNBOUNDED = dict.fromkeys(GROWTH, "0")
TDT = {**REQUIRED, "kind": "tdt", "durations": "0,1, 2,3,4"}

OPTION_RANGES = [
    ("max_symbols_per_step", 1, 1000),
    ("max_total_tokens", 1, 100_000),
    ("endpoint_silence_ms", 0, 60_000),
    ("beam", 1, 16),
    ("stream_beam", 1, 16),
]
INTEGER_RANGES = [
    ("blank", 1, 1_000_000),
    ("predictor_layers", 1, 64),
    ("predictor_hidden", 1, 65_536),
    ("frame_samples", 1, 160_000),
    ("left_frames", 0, 100_000),
    ("chunk_frames", 1, 100_000),
    ("right_frames", 0, 100_000),
    ("block_frames", 1, 100_000),
    ("encoder_batch", 1, 4096),
    *OPTION_RANGES,
]
MEMORY_RANGES = [
    ("max_bytes", "max_encode_bytes", 1_000_000, 10**18),
    ("bytes_per_sec", "window_bytes_per_sec", 0, 10**15),
    ("bytes_per_sec_squared", "window_bytes_per_sec_squared", 0, 10**15),
]
NUMBER_RANGES = [
    ("blank_penalty", -20.0, 20.0),
    ("max_segment_secs", 1.0, 3600.0),
    ("max_whole_secs", 1.0, 3600.0),
]


def read(values: dict[str, str]) -> Parameters:
    return Parameters.from_config({"parameters": {name: {"string_value": value} for name, value in values.items()}})


def value_of(parameters: Parameters, name: str) -> Any:
    places = (parameters, parameters.options, parameters.geometries["balanced"])
    return next(getattr(place, name) for place in places if hasattr(place, name))


def assert_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ParameterError) as error:
        read(values)
    assert str(error.value) == message


def test_defaults() -> None:
    parameters = read(REQUIRED)
    assert (parameters.kind, parameters.durations, parameters.blank_penalty) == ("rnnt", (), 0.0)
    assert parameters.preprocessor_model == "preprocessor"
    assert parameters.encoder_model == "encoder"
    assert parameters.decoder_joint_model == "decoder_joint"
    assert (parameters.block_frames, parameters.encoder_batch) == (32, 4)
    assert (parameters.max_segment_secs, parameters.max_whole_secs) == (20.0, 45.0)
    assert parameters.options == Options("window", "balanced", 10, 200, 1200) == Options()
    assert parameters.geometries == dict.fromkeys(("low", "balanced", "throughput"), Geometry(42, 10, 5))


def test_shipped_configuration_is_allowed() -> None:
    text = (MODELS / "rnnt_greedy_bls" / "config.pbtxt").read_text(encoding="utf-8")
    given = dict(re.findall(r'parameters \{ key: "(\w+)" value: \{ string_value: "([^"]*)" \} \}', text))
    assert CACHED.keys() <= given.keys()
    parameters = read(given)
    assert (parameters.blank, parameters.frame_samples, parameters.max_whole_secs) == (512, 1536, 60.0)
    assert parameters.options.max_symbols_per_step == int(given["max_symbols_per_step"])


def test_tdt_has_durations() -> None:
    assert read(TDT).durations == (0, 1, 2, 3, 4)


def test_models_can_be_named() -> None:
    names = {"preprocessor_model": "mel", "encoder_model": "conformer", "decoder_joint_model": "joint"}
    parameters = read({**REQUIRED, **names})
    assert {name: value_of(parameters, name) for name in names} == names


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_parameter_is_named(name: str) -> None:
    assert_refused({key: value for key, value in REQUIRED.items() if key != name}, f"parameter {name} is missing")
    assert_refused({**REQUIRED, name: ""}, f"parameter {name} is missing")


def test_configuration_without_parameters_is_refused() -> None:
    with pytest.raises(ParameterError, match="preprocessor_model is missing"):
        Parameters.from_config({})


def test_correlation_id_control_is_refused() -> None:
    start = {"name": "START", "control": [{"kind": "CONTROL_SEQUENCE_START", "int32_false_true": [0, 1]}]}
    corrid = {"name": "CORRID", "control": [{"kind": "CONTROL_SEQUENCE_CORRID", "data_type": "TYPE_UINT64"}]}
    given = {"parameters": {name: {"string_value": value} for name, value in REQUIRED.items()}}
    Parameters.from_config({**given, "sequence_batching": {"control_input": [start]}})
    with pytest.raises(ParameterError, match=r"control_input CORRID is CONTROL_SEQUENCE_CORRID, .*; remove it$"):
        Parameters.from_config({**given, "sequence_batching": {"control_input": [start, corrid]}})


@pytest.mark.parametrize(("name", "low", "high"), [*INTEGER_RANGES, *NUMBER_RANGES])
def test_ranges_include_their_ends_and_end_there(name: str, low: float, high: float) -> None:
    for value in (low, high):
        assert value_of(read({**REQUIRED, **UNBOUNDED, name: str(value)}), name) == value
    for value in (low - 1, high + 1):
        assert_refused({**REQUIRED, **UNBOUNDED, name: str(value)}, f"{name} is {value}; it must be within {low} … {high}")


@pytest.mark.parametrize(("name", "low", "high"), INTEGER_RANGES)
@pytest.mark.parametrize("value", ["ten", "1.5", "1e3", "0x10"])
def test_whole_numbers_are_whole(name: str, low: int, high: int, value: str) -> None:
    del low, high
    assert_refused({**REQUIRED, name: value}, f"{name} is '{value}'; it must be a whole number")


@pytest.mark.parametrize(("name", "low", "high"), NUMBER_RANGES)
def test_numbers_are_numbers(name: str, low: float, high: float) -> None:
    assert_refused({**REQUIRED, name: "long"}, f"{name} is 'long'; it must be a number")
    assert_refused({**REQUIRED, name: "nan"}, f"{name} is nan; it must be within {low} … {high}")
    assert_refused({**REQUIRED, name: "inf"}, f"{name} is inf; it must be within {low} … {high}")


def test_kinds_are_known() -> None:
    assert_refused({**REQUIRED, "kind": "ctc"}, "kind is 'ctc'; allowed are 'rnnt' and 'tdt'")


def test_durations_are_whole_and_not_negative() -> None:
    assert_refused({**TDT, "durations": "0,one"}, "durations is 'one'; it must be a whole number")
    assert_refused({**TDT, "durations": "0,-1"}, "durations is [0, -1]; none may be negative")


def test_durations_belong_to_a_tdt() -> None:
    rule = "a tdt needs them and an rnnt has none"
    assert_refused({**REQUIRED, "kind": "tdt"}, f"durations is []; {rule}")
    assert_refused({**TDT, "durations": ""}, f"durations is []; {rule}")
    assert_refused({**REQUIRED, "durations": "0,1"}, f"durations is [0, 1]; {rule}")


@pytest.mark.parametrize(("latency", "name"), GEOMETRY_PARAMETERS.items())
def test_latency_may_have_its_own_windows(latency: str, name: str) -> None:
    geometries = read({**REQUIRED, **UNBOUNDED, name: "0, 1,100000"}).geometries
    assert geometries[latency] == Geometry(0, 1, 100_000)
    assert sorted(geometries.values()) == [Geometry(0, 1, 100_000), Geometry(42, 10, 5), Geometry(42, 10, 5)]


@pytest.mark.parametrize("name", GEOMETRY_PARAMETERS.values())
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("42,4", " is [42, 4]; it must be three whole numbers: left, chunk, right"),
        ("42,4,2,1", " is [42, 4, 2, 1]; it must be three whole numbers: left, chunk, right"),
        ("42,four,2", " is 'four'; it must be a whole number"),
        ("-1,4,2", ": left_frames is -1; it must be within 0 … 100000"),
        ("42,0,2", ": chunk_frames is 0; it must be within 1 … 100000"),
        ("42,4,100001", ": right_frames is 100001; it must be within 0 … 100000"),
    ],
)
def test_windows_of_a_latency_are_checked(name: str, value: str, problem: str) -> None:
    assert_refused({**REQUIRED, name: value}, f"{name}{problem}")


@pytest.mark.parametrize("latency", ["high", "", 1, None])
def test_unknown_latency_is_refused(latency: Any) -> None:
    with pytest.raises(ParameterError) as error:
        Options().override({"latency": latency})
    assert str(error.value) == f"latency is {latency!r}; allowed are 'low', 'balanced' and 'throughput'"


@pytest.mark.parametrize(("attribute", "name", "low", "high"), MEMORY_RANGES)
def test_memory_parameters_have_ranges(attribute: str, name: str, low: int, high: int) -> None:
    given = {**REQUIRED, **UNBOUNDED, "max_encode_bytes": str(10**18), "max_whole_secs": "1", "chunk_frames": "1"}
    for value in (low, high):
        assert getattr(read({**given, "right_frames": "0", "left_frames": "0", name: str(value)}).memory, attribute) == value
    for value in (low - 1, high + 1):
        assert_refused({**given, name: str(value)}, f"{name} is {value}; it must be within {low} … {high}")


@pytest.mark.parametrize("missing", GROWTH)
def test_half_declared_growth_is_refused(missing: str) -> None:
    (other,) = GROWTH.keys() - {missing}
    with pytest.raises(ParameterError, match=f"only {other} is set; .* are measured together"):
        read({**REQUIRED, other: "1"})


def test_max_whole_secs_is_bounded_by_memory() -> None:
    assert read({**REQUIRED, **GROWTH, "max_whole_secs": "71"}).max_whole_secs == 71
    assert_refused(
        {**REQUIRED, **GROWTH, "max_whole_secs": "300"},
        "max_whole_secs is 300: the encoder takes 27.30 GB for a window of 300 s, but max_encode_bytes is 1610612736, which "
        "allows 71.6 s; lower max_whole_secs, or raise max_encode_bytes if every encoder process may take that much",
    )
    raised = read({**REQUIRED, **GROWTH, "max_whole_secs": "300", "max_encode_bytes": str(28 * 10**9)})
    assert raised.max_whole_secs == 300


def test_unmeasured_growth_lowers_the_bound() -> None:
    assert read({**REQUIRED, "max_whole_secs": "47"}).memory.measured is False
    with pytest.raises(ParameterError, match=r"allows 47\.6 s; .*the growth is assumed: run amira models check to measure it$"):
        read({**REQUIRED, "max_whole_secs": "60"})


@pytest.mark.parametrize("name", GEOMETRY_PARAMETERS.values())
def test_stream_windows_are_bounded_by_memory(name: str) -> None:
    with pytest.raises(
        ParameterError, match=rf"^{name} is 1000: the encoder takes 2.86 GB for a window of 96 s, .*lower {name}, "
    ):
        read({**REQUIRED, **GROWTH, name: "100,800,100"})
    with pytest.raises(ParameterError, match=r"^left_frames \+ chunk_frames \+ right_frames is 1000: .* allows 71\.6 s"):
        read({**REQUIRED, **GROWTH, "left_frames": "985"})


@given(st.integers(0, 10**8), st.integers(0, 10**7), st.integers(10**6, 10**12), st.floats(0.01, 3600))
def test_windows_of_a_call_fit_its_memory(linear: int, square: int, max_bytes: int, secs: float) -> None:
    memory = WindowMemory(linear, square, max_bytes)
    windows = memory.windows_per_call(secs)
    assert (windows >= 1) == (secs <= memory.longest_secs) or secs == pytest.approx(memory.longest_secs)
    if windows != np.inf:
        assert windows * memory.window_bytes(secs) <= max_bytes * (1 + 1e-9)
        assert (windows + 1) * memory.window_bytes(secs) >= max_bytes * (1 - 1e-9)


def test_long_windows_share_fewer_calls() -> None:
    parameters = read({**REQUIRED, **GROWTH, "max_whole_secs": "71", "encoder_batch": "8"})
    shares = {secs: parameters.windows_per_call(secs * 16000) for secs in (4, 20, 30, 50, 60, 71)}
    assert shares == {4: 8, 20: 8, 30: 5, 50: 2, 60: 1, 71: 1}


def test_unknown_parameters_are_named() -> None:
    with pytest.raises(
        ParameterError,
        match=r"unknown parameters \['chunk_frame', 'zeal'\]; known are \['beam', 'blank', .*'window_bytes_per_sec_squared'\]",
    ):
        read({**REQUIRED, "zeal": "1", "chunk_frame": "10"})


def test_renamed_parameter_is_refused_with_its_new_name() -> None:
    renamed = "parameter lone_encoder_model is now called exclusive_encoder_model; rename it"
    assert_refused({**REQUIRED, "lone_encoder_model": "encoder_lone"}, renamed)


def test_options_are_overridden_from_json() -> None:
    options = Options(max_symbols_per_step=5)
    assert options.override({}) == options
    given = {"context": "whole", "max_total_tokens": 7, "endpoint_silence_ms": "0", "priority": 1.5}
    assert options.override(given) == Options("whole", "balanced", 5, 7, 0)
    assert options == Options(max_symbols_per_step=5)


@pytest.mark.parametrize("context", ["all", "", 1, None, ["whole"]])
def test_unknown_context_is_refused(context: Any) -> None:
    with pytest.raises(ParameterError) as error:
        Options().override({"context": context})
    assert str(error.value) == f"context is {context!r}; allowed are 'window' and 'whole'"


@pytest.mark.parametrize(("name", "low", "high"), OPTION_RANGES)
def test_options_have_ranges(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(Options().override({name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ParameterError) as error:
            Options().override({name: value})
        assert str(error.value) == f"{name} is {value}; it must be within {low} … {high}"
    for bad in ("many", 1.5, True, None, [1]):
        with pytest.raises(ParameterError) as error:
            Options().override({name: bad})
        assert str(error.value) == f"{name} is {bad!r}; it must be a whole number"


CACHED = {
    **{name: value for name, value in REQUIRED.items() if name not in ("left_frames", "chunk_frames", "right_frames")},
    "encoder_kind": "cached",
    "frame_samples": "1280",
    "hop_samples": "160",
    "edge_features": "2",
    "window_features": "65",
    "chunk_features": "56",
    "cache_size": "4737",
}


def cached(**changes: str) -> Parameters:
    return read({**CACHED, **changes})


def test_cached_encoder_of_each_latency() -> None:
    p = cached(
        low_latency_encoder_model="fast", low_latency_features="17,8,4737", languages="auto=5,en-US=0", default_language="auto"
    )
    assert p.cached is not None
    assert p.cached.encoders["low"] == ("fast", 17, 8, 4737)
    assert p.cached.encoders["balanced"] == p.cached.encoders["throughput"] == ("encoder", 65, 56, 4737)
    assert (p.cached.zeros_before, p.cached.reset_at_endpoint, p.cached.element) == (True, True, "float16")
    assert p.cached.languages == {"auto": 5, "en-US": 0}
    assert p.windows_per_call(10**9) == p.encoder_batch, "its windows do not grow"
    assert cached().cached != p.cached


def test_cached_encoder_with_look_ahead_and_another_for_recordings() -> None:
    p = cached(right_features="9", warm_up_features="57", max_cache_features="168", whole_encoder_model="whole")
    assert p.cached is not None
    assert (p.cached.right_features, p.cached.warm_up_features, p.cached.max_cache_features) == (9, 57, 168)
    assert p.whole_encoder_model == p.exclusive_encoder_model == "whole"
    assert p.windows_per_call(60 * 16_000) < p.windows_per_call(16_000) == p.encoder_batch, "whole recordings grow"
    with pytest.raises(ParameterError, match=r"^max_whole_secs is 3600: "):
        cached(whole_encoder_model="whole", max_whole_secs="3600")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder_kind": "other"}, "encoder_kind is 'other'; allowed are 'windowed' and 'cached'"),
        ({"chunk_features": ""}, "parameter chunk_features is missing"),
        ({"chunk_features": "66"}, "chunk_features of balanced is 66; it must be at most window_features, 65"),
        ({"right_features": "10"}, "chunk_features of balanced is 56; it must be at most window_features - right_features, 55"),
        (
            {"warm_up_features": "57", "max_cache_features": "167"},
            "max_cache_features is 167; it must be 0 or at least 168: the chunks of balanced that warm_up_features need",
        ),
        ({"chunk_features": "55"}, "times 160 samples it must be a multiple of frame_samples, 1280"),
        ({"left_frames": "10"}, "unknown parameters ['left_frames']"),
        ({"low_latency_features": "17,8"}, "low_latency_features is [17, 8]; it must be three whole numbers"),
        ({"low_latency_features": "17,8,4737"}, "parameter low_latency_encoder_model is missing"),
        ({"cache_type": "int8"}, "cache_type is 'int8'; allowed are 'fp16' and 'fp32'"),
        ({"fresh_features": "ones"}, "fresh_features is 'ones'; allowed are 'zeros' and 'none'"),
        ({"cache_reset": "daily"}, "cache_reset is 'daily'; allowed are 'endpoint' and 'never'"),
        ({"languages": "en"}, "languages: en is ''; it must be a whole number"),
        ({"languages": "en=0"}, "parameter default_language is missing"),
        ({"languages": "en=0", "default_language": "de"}, "default_language is 'de'; allowed are en"),
        ({"endpoint_tokens": "512"}, "endpoint_tokens has [512]; they must be within 0 … 511"),
    ],
)
def test_invalid_parameters_of_a_cached_encoder_are_named(changes: dict[str, str], named: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(named)):
        cached(**changes)


@pytest.mark.parametrize("context", ["window", "whole"])
def test_beam_of_a_request_is_that_of_its_stream_or_recording(context: str) -> None:
    defaults = Options(beam=4, stream_beam=2)
    assert defaults.override({"context": context}).width == (2 if context == "window" else 4)
    assert defaults.override({"context": context, "beam": 1}).width == 1


def test_alternatives_need_a_beam() -> None:
    defaults = Options(beam=4)
    assert defaults.override({"context": "whole", "alternatives": 10}).alternatives == 10
    for options in ({"alternatives": 2}, {"context": "whole", "beam": 1, "alternatives": 2}):
        with pytest.raises(ParameterError, match="alternatives is 2, but only a beam has several; set beam to 2 … 16"):
            defaults.override(options)
    with pytest.raises(ParameterError, match="alternatives is 11; it must be within 1 … 10"):
        defaults.override({"context": "whole", "alternatives": 11})

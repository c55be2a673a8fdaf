"""Published layouts in small and what they are imported to, each made once, for tests of cached and icefall models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import sherpa_onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from amira import models
from amira.models.front_ends import Fbank, fbank
from amira.models.importing import ImportOptions, import_model
from tests.support import streaming_models
from tests.support.cache import cached
from tests.support.commands import edit
from tests.support.streaming_models import IcefallShape, NemoShape, build_icefall, build_nemo_cached
from windows import Samples

NEMO = NemoShape(seed=2, blank_bias=6.0)
NEMO_560 = NemoShape(seed=0, blank_bias=6.0, right=6, context=70, features=128)
NEMO_80 = replace(NEMO_560, right=0)
NEMO_PROMPTED = NemoShape(seed=2, blank_bias=7.0, prompted=True)
NEMOTRON = NemoShape(seed=2, blank_bias=5.0, prompted=True, features=128)
EOU = NemoShape(seed=2, blank_bias=6.0, features=128, context=70, kernel=8)
ZIPFORMER = IcefallShape(seed=1, blank_bias=8.0)
ZIPFORMER_640 = IcefallShape(seed=4, blank_bias=8.0, chunk=32, left=64)
OFFLINE = IcefallShape(seed=2, blank_bias=8.0)


def quantised(build: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what builds a source in int8 alone, but for the decoder, as sherpa-onnx publishes some."""

    def make(directory: Path) -> None:
        build(directory)
        for part in ("encoder", "joiner"):
            plain = directory / f"{part}.onnx"
            quantize_dynamic(plain, directory / f"{part}-epoch-99-avg-1.int8.onnx", weight_type=QuantType.QInt8)
            plain.unlink()
        (directory / "decoder.onnx").rename(directory / "decoder-epoch-99-avg-1.onnx")

    return make


SOURCES: dict[str, Callable[[Path], None]] = {
    "nemo": lambda directory: build_nemo_cached(directory, NEMO),
    "nemo560": lambda directory: build_nemo_cached(directory, NEMO_560, external=True),
    "several": lambda directory: build_nemo_cached(directory, NEMO_560),
    "nemo-int8": quantised(lambda directory: build_nemo_cached(directory, NEMO)),
    "zipformer-int8": quantised(lambda directory: build_icefall(directory, ZIPFORMER)),
    "prompted": lambda directory: build_nemo_cached(directory, NEMO_PROMPTED),
    "nemotron": lambda directory: build_nemo_cached(directory, NEMOTRON, layout="nemotron", external=True),
    "eou": lambda directory: build_nemo_cached(directory, EOU, layout="eou"),
    "zipformer": lambda directory: build_icefall(directory, ZIPFORMER),
    "zipformer640": lambda directory: build_icefall(directory, ZIPFORMER_640),
    "offline": lambda directory: build_icefall(directory, OFFLINE, streaming=False),
}
BUILDERS = (Path(__file__), Path(streaming_models.__file__))
"""Files that the sources depend on."""

IMPORTERS = (*BUILDERS, *sorted(Path(models.__file__).parent.rglob("*.py")))
"""Files that the imported models depend on."""

STREAMING = ("nemo", "nemo560", "prompted", "zipformer", "zipformer640")
"""Those that sherpa-onnx streams."""

TAIL = np.zeros(12_800, np.int16)
"""Silence that makes sherpa-onnx decode what precedes it, since it does not flush the encoder at the end."""


def published(name: str) -> Path:
    """Return the directory of a source. Tests must not change it."""
    return cached(f"published-{name}", SOURCES[name], BUILDERS)


def imported(name: str, cache_type: str = "fp16") -> Path:
    """Return a repository with an imported source under its own name. Tests must not change it."""

    def make(repository: Path) -> None:
        latencies = {}
        if name == "several":
            latencies["low"] = str(cached("published-several-80", lambda source: build_nemo_cached(source, NEMO_80), BUILDERS))
        import_model(str(published(name)), name, repository, ImportOptions(cache_type=cache_type, latencies=latencies))

    return cached(f"imported-{cache_type}-{name}", make, IMPORTERS)


def as_sherpa_onnx(name: str) -> Path:
    """Return a repository with an imported source that differs from sherpa-onnx in nothing. Tests must not change it.

    sherpa-onnx begins a stream without zeros before it, so it loses NeMo's first encoder frames; its NeMo features are Kaldi's
    with Slaney's filters; it knows no segments unless it is asked; and its caches are FP32 and of frames.
    """
    directory = published(name)

    def make(repository: Path) -> None:
        import_model(str(directory), name, repository, ImportOptions(cache_type="fp32", projected=False))
        config = repository / f"{name}_decoder" / "config.pbtxt"
        text = config.read_text(encoding="utf-8").replace('string_value: "zeros"', 'string_value: "none"')
        config.write_text(text, encoding="utf-8")
        for old, new in (('"1200"', '"0"'), ('"200"', '"100000"'), ('"20"', '"3600"')):
            edit(config, f"string_value: {old}", f"string_value: {new}")
        if "zipformer" not in name and name != "offline":
            (encoder,) = directory.glob("encoder*.onnx")
            bins = next(iter(onnx.load(encoder, load_external_data=False).graph.input)).type.tensor_type.shape
            front_end = fbank(Fbank(bins.dim[1].dim_value, 0.0, 8000.0, remove_mean=False, window="hann", slaney=True))
            onnx.save(front_end.proto, repository / f"{name}_preprocessor" / "1" / "model.onnx")

    return cached(f"as-sherpa-onnx-{name}", make, IMPORTERS)


def sherpa_streamed(directory: Path, samples: Samples, language: str = "") -> tuple[list[str], list[float]]:
    """Return the tokens and their times that sherpa-onnx streams."""
    parts = {part: str(next(directory.glob(f"{part}*.onnx"))) for part in ("encoder", "decoder", "joiner")}
    recogniser = sherpa_onnx.OnlineRecognizer.from_transducer(
        tokens=str(directory / "tokens.txt"), num_threads=1, decoding_method="greedy_search", **parts
    )
    stream = recogniser.create_stream()
    if language:
        stream.set_option("language", language)
    stream.accept_waveform(16_000, samples.astype(np.float32) / 32768)
    while recogniser.is_ready(stream):
        recogniser.decode_stream(stream)
    result = recogniser.get_result_all(stream)
    return list(result.tokens), list(result.timestamps)


def sherpa_at_once(directory: Path, samples: Samples) -> tuple[list[str], list[float]]:
    """Return the tokens and their times of sherpa-onnx's recogniser of whole recordings."""
    parts = {part: str(directory / f"{part}.onnx") for part in ("encoder", "decoder", "joiner")}
    recogniser = sherpa_onnx.OfflineRecognizer.from_transducer(tokens=str(directory / "tokens.txt"), num_threads=1, **parts)
    stream = recogniser.create_stream()
    stream.accept_waveform(16_000, samples.astype(np.float32) / 32768)
    recogniser.decode_stream(stream)
    return list(stream.result.tokens), list(stream.result.timestamps)

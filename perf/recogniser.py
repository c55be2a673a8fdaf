"""The recogniser under measurement: its names in Triton, its parameters, its windows, its decoder_joint without a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amira.models.configs import ModelError
from amira.models.repository import Recogniser, recognisers
from gateway.triton.geometry import Windows, read_windows

if TYPE_CHECKING:  # it is the model repository's, which most of the benchmark knows from outside only
    from greedy import Floats, States, Step

MODEL = "asr_ensemble"
DECODER = "rnnt_greedy_bls"


def windows_of(repository: Path) -> Windows:
    """Return the windows of streams that a model repository configures, for ``balanced``."""
    return read_windows(parameters(repository))["balanced"]


def choose(repository: Path, name: str | None = None) -> Recogniser:
    """Return a recogniser of a model repository.

    Args:
        repository: the model repository.
        name: an ensemble of it; None for the bundled one's name, or for the only one.

    Raises:
        ModelError: it can't be used, or has no such ensemble.
    """
    found = {recogniser.name: recogniser for recogniser in recognisers(repository)}
    chosen = name or (MODEL if MODEL in found or len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise ModelError(f"{repository} has no ensemble {chosen}; it has {', '.join(found)}: choose one by --model")
    return found[chosen]


def parameters(repository: Path) -> Mapping[str, str]:
    """Return the parameters of the bundled recogniser's decoder, as ``config.pbtxt`` has them."""
    return choose(repository, MODEL).parameters


def joint_step(session: Any) -> Step:
    """An ONNX Runtime session of decoder_joint as the decoder calls it: a ``greedy.Step``."""

    def step(frames: Floats, last_tokens: NDArray[np.int32], states: States) -> tuple[Floats, States]:
        inputs = {
            "encoder_outputs": frames,
            "targets": last_tokens[:, None],
            "target_length": np.ones(len(last_tokens), np.int32),
            "input_states_1": states[0],
            "input_states_2": states[1],
        }
        logits, *after = session.run(["outputs", "output_states_1", "output_states_2"], inputs)
        return logits[:, :, 0], tuple(after)

    return step

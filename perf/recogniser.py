"""Names, parameters and windows of the measured recogniser, and its decoder_joint without a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from amira.models.configs import ModelError
from amira.models.repository import Recogniser, recognisers
from gateway.triton.geometry import Windows, read_windows

if TYPE_CHECKING:  # a module of the model repository, which is not on the path at run time
    from greedy import Floats, States, Step

MODEL = "asr_ensemble"
DECODER = "rnnt_greedy_bls"


def windows_of(repository: Path) -> Windows:
    """Return the geometry of the bundled recogniser's windows for ``balanced``."""
    return read_windows(parameters(repository))["balanced"]


def choose(repository: Path, name: str | None = None) -> Recogniser:
    """Return a recogniser of a model repository.

    Args:
        repository: the model repository.
        name: name of an ensemble; None: the bundled one's name, or the only ensemble.

    Raises:
        ModelError: the repository is not usable, or has no such ensemble.
    """
    found = {recogniser.name: recogniser for recogniser in recognisers(repository)}
    chosen = name or (MODEL if MODEL in found or len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise ModelError(f"{repository} has no ensemble {chosen}; it has {', '.join(found)}: choose one by --model")
    return found[chosen]


def parameters(repository: Path) -> Mapping[str, str]:
    """Return the parameters of the bundled recogniser's decoder from ``config.pbtxt``."""
    return choose(repository, MODEL).parameters


def joint_step(session: Any) -> Step:
    """Return a ``greedy.Step`` that calls an ONNX Runtime session of decoder_joint."""

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

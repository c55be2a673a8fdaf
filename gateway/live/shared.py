"""Objects that all live sessions of a gateway share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.audio.vad_batch import VoiceBatch
from gateway.config.settings import Settings
from gateway.limits.priority import Priority
from gateway.live.buffer import BufferUsage
from gateway.live.resume import SessionTokens

if TYPE_CHECKING:
    from gateway.live.session import Session


@dataclass(frozen=True)
class Shared:
    """Objects that all sessions of a gateway share.

    Attributes:
        running: sessions that hold something: a sequence at Triton, audio, a task.
        voices: computes voice activity for all.
    """

    settings: Settings
    priority: Priority
    tokens: SessionTokens
    usage: BufferUsage
    running: set[Session] = field(default_factory=set)
    voices: VoiceBatch = field(default_factory=VoiceBatch)

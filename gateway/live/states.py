"""States of a live session, and its endings."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """State of a session. It only moves down this list."""

    CONNECTING = "no audio was taken yet; the session may be resumed"
    OPEN = "audio is taken"
    ENDING = "no more audio is taken; the rest is decoded"
    ENDED = "no more events are published"


class Ending(Enum):
    """Reason why no more audio is taken."""

    CLIENT = "the client has sent all of it"
    DRAIN = "the server shuts down"
    ABANDONED = "the transcript is no longer awaited"
    FAILED = "the session failed"

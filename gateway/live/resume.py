"""Tickets: what a client of ``amira.v2`` holds so that its stream goes on after a lost connection, on any gateway.

A ticket carries the decoder's state. It is signed, so that the decoder is given no state but its own, and it is not secret: it
holds nothing but what the client's own audio made.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass

from itsdangerous import BadData, URLSafeTimedSerializer

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind

MAX_AGE_SECS = 3600

MAX_STREAMS = 10_000
"""Of so many the last resumption is remembered."""


@dataclass(frozen=True)
class Ticket:
    """Where a stream is.

    Attributes:
        model: its public model name.
        latency: which of the model's windows it has; it keeps them, whatever the settings of the gateway that goes on with it.
        samples: audio from here on is still needed, in samples since the start of the stream.
        state: the decoder's; empty before the first window.
        chars, tokens, words: how much of the transcript is settled; what a later connection says comes behind it.
        stream: tells it from others.
    """

    model: str
    latency: str
    samples: int = 0
    state: str = ""
    chars: int = 0
    tokens: int = 0
    words: int = 0
    stream: str = ""


class Tickets:
    """Issues and redeems tickets."""

    def __init__(self, settings: Settings) -> None:
        key = settings.session_key.get_secret_value() if settings.session_key else secrets.token_hex()
        self._serializer = URLSafeTimedSerializer(key, salt="amira.v2")
        self._redeemed_at: OrderedDict[str, float] = OrderedDict()  # by stream

    def issue(self, ticket: Ticket) -> str:
        """The ticket as text."""
        text = self._serializer.dumps(asdict(ticket))
        return text if isinstance(text, str) else text.decode()

    def redeem(self, text: str, model: str) -> tuple[Ticket, float]:
        """The ticket that the text is, and the seconds since it was issued, or since its stream last went on here.

        Raises:
            ApiError: it is none of this service's, too old, or another model's.
        """
        try:
            # Not by its own limit of age: it takes no ticket of a gateway whose clock goes a little before this one's.
            payload, issued_at = self._serializer.loads(text, return_timestamp=True)
            ticket = Ticket(**payload)
        except (BadData, TypeError):
            raise ApiError(ErrorKind.INVALID_SESSION, "the session is not known here; begin a new stream") from None
        age_secs = time.time() - issued_at.timestamp()
        if age_secs > MAX_AGE_SECS:
            raise ApiError(
                ErrorKind.INVALID_SESSION, f"the session is {age_secs:.0f} s old, of at most {MAX_AGE_SECS}; begin a new stream"
            )
        if ticket.model != model:
            raise ApiError(ErrorKind.INVALID_SESSION, f"the session is of model {ticket.model!r}, not {model!r}")
        now = time.monotonic()
        since_secs = now - self._redeemed_at.pop(ticket.stream, -math.inf)
        self._redeemed_at[ticket.stream] = now
        if len(self._redeemed_at) > MAX_STREAMS:
            self._redeemed_at.popitem(last=False)
        return ticket, max(0.0, min(age_secs, since_secs))

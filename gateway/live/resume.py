"""Session tokens: with a token, a client can continue its stream on any gateway after a lost connection.

A token contains the decoder's state. It is signed, so the decoder only gets state that it produced. It is not encrypted, since
the state depends only on the client's own audio.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from itsdangerous import BadData, URLSafeTimedSerializer

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.transcript.transcript import Counts

MAX_AGE_SECS = 3600
"""Maximum age of a token, in seconds."""

MAX_STREAMS = 10_000
"""Maximum number of streams whose last resumption is tracked (LRU)."""


@dataclass(frozen=True)
class SessionToken:
    """A position in a stream. The names are part of the signed text, which other versions of the gateway read.

    Attributes:
        model: public name of the model.
        latency: name of the stream's windows, which it keeps whatever the settings of the gateway that continues it.
        samples: position from which audio is still needed, in samples since the start of the stream.
        state: the decoder's state; empty before the first window.
        chars, tokens, words, segments: length of the settled transcript; a later connection continues after it.
        stream: identifies the stream.
    """

    model: str
    latency: str
    samples: int = 0
    state: str = ""
    chars: int = 0
    tokens: int = 0
    words: int = 0
    stream: str = ""
    segments: int = 0

    @property
    def settled(self) -> Counts:
        """Length of the settled transcript."""
        return Counts(self.chars, self.tokens, self.words, self.segments)


class SessionTokens:
    """Issues and redeems session tokens.

    Args:
        settings: settings of the gateway; ``session_key`` is the key of the signature.
        clock: returns monotonic seconds.
        wall_clock: returns Unix time in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        key = settings.session_key.get_secret_value() if settings.session_key else secrets.token_hex()
        self._serializer = URLSafeTimedSerializer(key, salt="amira.v2")
        self._clock = clock
        self._wall_clock = wall_clock
        self._redeemed_at: OrderedDict[str, float] = OrderedDict()  # by stream

    def issue(self, token: SessionToken) -> str:
        """Return the signed text of a token."""
        text = self._serializer.dumps(asdict(token))
        return text if isinstance(text, str) else text.decode()

    def redeem(self, text: str, model: str) -> tuple[SessionToken, float]:
        """Verify a token's text.

        Args:
            text: text from the client.
            model: public name of the model that the client requests.

        Returns:
            The token, and the smaller of its age and the time since its stream was last resumed here, in seconds.

        Raises:
            ApiError: the text is not a token of this service, is too old, or belongs to another model.
        """
        try:
            # The serializer's own age limit would refuse a token from a gateway whose clock is slightly ahead.
            payload, issued_at = self._serializer.loads(text, return_timestamp=True)
            known = {each.name for each in fields(SessionToken)}  # later versions may have more
            token = SessionToken(**{name: value for name, value in payload.items() if name in known})
        except (BadData, TypeError, AttributeError):
            raise ApiError(ErrorKind.INVALID_SESSION, "the session token is not valid here; begin a new stream") from None
        age_secs = self._wall_clock() - issued_at.timestamp()
        if age_secs > MAX_AGE_SECS:
            raise ApiError(
                ErrorKind.INVALID_SESSION, f"the session is {age_secs:.0f} s old, of at most {MAX_AGE_SECS}; begin a new stream"
            )
        if token.model != model:
            raise ApiError(ErrorKind.INVALID_SESSION, f"the session is of model {token.model!r}, not {model!r}")
        now = self._clock()
        since_secs = now - self._redeemed_at.pop(token.stream, -math.inf)
        self._redeemed_at[token.stream] = now
        if len(self._redeemed_at) > MAX_STREAMS:
            self._redeemed_at.popitem(last=False)
        return token, max(0.0, min(age_secs, since_secs))

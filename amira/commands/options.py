"""Options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from amira.client.exchange import API_KEY_VARIABLE, BASE_URL_VARIABLE

Url = Annotated[str, typer.Option(envvar=BASE_URL_VARIABLE, help="Base URL of the server.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar=API_KEY_VARIABLE, help="API key, if the server requires one.", show_default=False)
]
Model = Annotated[str, typer.Option(help="Public name of the model.")]

"""The gateway's logs: one JSON object per line with ids and without transcripts, or lines for a console."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

import httpx
import orjson
import pytest
import structlog

from amira.paths import ROOT
from gateway.config.settings import Settings
from gateway.logs import configure_logging
from tests.support.clients import transcribe
from tests.support.servers import Gateway, Recordings

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]
KEY = "a-key-that-nobody-else-has"


async def test_each_event_is_one_line_without_the_transcript(
    make_gateway: MakeGateway, http: httpx.AsyncClient, recordings: Recordings, capsys: pytest.CaptureFixture[str]
) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    async with make_gateway(api_keys=[KEY], log_level="debug") as gateway:
        conversation = await transcribe(gateway.stream_url(), recordings["jfk"], additional_headers=key)
        await http.post(gateway.batch_url(), content=bytes(3), headers={**key, "X-Request-ID": "mine"})
    printed = capsys.readouterr().err
    lines = [orjson.loads(line) for line in printed.splitlines()]
    assert all({"event", "level", "timestamp"} <= set(line) for line in lines)
    by_event = {line["event"]: line for line in lines}
    assert (by_event["request"]["status"], by_event["request"]["request_id"]) == (400, "mine")
    assert (by_event["stream closed"]["code"], by_event["stream closed"]["audio_secs"]) == (1000, 11)
    assert by_event["stream closed"]["request_id"]
    assert KEY not in printed
    assert not [word for word in conversation.final["text"].split() if len(word) > 5 and word in printed]


def events(module: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Return the events that a module logs, or yields to the module that logs them, each with its fields."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and re.fullmatch(r"log\.\w+|log_request", ast.unparse(node.func)):
            match node.args:
                case [ast.Constant(str(event)), *_]:
                    yield event, {keyword.arg for keyword in node.keywords if keyword.arg} - {"exc_info"}
                case [ast.Name("event")]:
                    pass  # yielded by another module
                case _:
                    pytest.fail(f"unknown event: {ast.unparse(node)}")
        elif isinstance(node, ast.Yield):
            match node.value:
                case ast.Tuple([ast.Constant(str(event)), ast.Dict(keys)]):
                    yield event, {str(key.value) for key in keys if isinstance(key, ast.Constant)}


def test_every_event_is_documented() -> None:
    """With its fields, except fields that are named after a model."""
    _, _, section = (ROOT / "docs/Monitoring.md").read_text().partition("\n## Logs\n")
    lines = re.findall(r"^- (.*)\n", section.partition("\n## ")[0], re.MULTILINE)
    rows = {event: line for line in lines for event in re.findall(r"`([^`]+)`", line.partition("`: ")[0] + "`")}
    logged = set()
    for path in (*(ROOT / "gateway").rglob("*.py"), *(ROOT / "amira").rglob("*.py")):
        for event, named in events(ast.parse(path.read_text())):
            logged.add(event)
            assert not [name for name in named if f"`{name}`" not in rows[event]], event
    assert logged == set(rows)


async def test_levels_are_a_setting(
    make_gateway: MakeGateway, http: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    async with make_gateway(log_level="warning") as gateway:
        await http.post(gateway.batch_url(), content=bytes(3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_has_its_trace(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Settings.model_validate({"log_format": form}))
    try:
        _ = 1 / 0
    except ZeroDivisionError as error:
        structlog.get_logger().error("stream failed", exc_info=error)
    printed = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in printed
    if form == "json":
        assert orjson.loads(printed)["event"] == "stream failed"
    else:
        assert printed.count("\n") > 3, "people read it line by line"

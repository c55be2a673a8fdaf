"""Choose and check ports to listen on."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"


class PortError(RuntimeError):
    """The server cannot listen on a configured address. The message is one line and says what to do."""


@dataclass(frozen=True)
class Ports:
    """Triton's ports, all on one address.

    Attributes:
        host: IPv4 address.
        grpc: port of gRPC.
        metrics: port of the metrics.
        http: port of HTTP; None: no HTTP listener. The gateway does not use HTTP.
    """

    host: str
    grpc: int
    metrics: int
    http: int | None = None

    def listeners(self) -> list[Listener]:
        """Return the addresses that Triton listens on.

        Raises:
            PortError: the host is not an IPv4 address.
        """
        try:
            ipaddress.IPv4Address(self.host)
        except ValueError:
            raise PortError(f"AMIRA_TRITON_HOST is {self.host!r}; it must be an IPv4 address") from None
        ports = {"GRPC": self.grpc, "METRICS": self.metrics, **({"HTTP": self.http} if self.http else {})}
        return [Listener(self.host, port, f"AMIRA_TRITON_{name}_PORT") for name, port in ports.items()]


@dataclass(frozen=True)
class Listener:
    """An address to listen on.

    Attributes:
        host: name or address.
        port: port number; 0 is always free.
        setting: environment variable of the port.
    """

    host: str
    port: int
    setting: str

    def obstacle(self) -> str | None:
        """Return the reason for which this process cannot listen on the address; None if it can."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                return error.strerror or str(error)
        return None


def gateway_listeners(host: str, port: int, riva_port: int | None) -> list[Listener]:
    """Return the addresses that the gateway listens on."""
    ports = {"AMIRA_SERVER_PORT": port, "AMIRA_RIVA_PORT": riva_port}
    return [Listener(host, number, setting) for setting, number in ports.items() if number is not None]


def check_free(listeners: Iterable[Listener]) -> None:
    """Check that this process can listen on all addresses.

    Raises:
        PortError: it cannot. The message names every address that is not available.
    """
    faults = [(listener, reason) for listener in listeners if (reason := listener.obstacle())]
    if faults:
        reasons = ", ".join(f"{listener.host}:{listener.port} ({reason})" for listener, reason in faults)
        settings = " and ".join(listener.setting for listener, _ in faults)
        raise PortError(f"can't listen on {reasons}; set {settings} to other ports")


def free_ports(host: str, count: int) -> list[int]:
    """Return `count` ports of `host` that are free now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]

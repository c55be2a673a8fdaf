"""Probes and metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway import __version__
from gateway.service import Service
from gateway.triton.breaker import BreakerState
from gateway.triton.canary import Health
from gateway.triton.endpoint import Endpoint

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Is the process alive?")
async def health(request: Request) -> dict[str, str]:
    """Return 200 while the process is alive; this does not depend on Triton."""
    service: Service = request.app.state.service
    return {"status": "healthy", "service": service.settings.service_name, "version": __version__}


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", summary="Liveness probe")
async def live() -> dict[str, str]:
    """Return 200 while the process is alive; this does not depend on Triton."""
    return {"status": "live"}


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready", summary="Readiness probe", responses={503: {"description": "starting, draining, or Triton is not ready"}}
)
async def ready(request: Request) -> Response:
    """Return 200 if new work is accepted, even at full capacity, and 503 otherwise."""
    service: Service = request.app.state.service
    status = _status(service)
    body = {
        "status": status,
        "models": {name: service.triton.ready(ensemble) for name, ensemble in service.settings.models.items()},
    }
    return Response(orjson.dumps(body), 200 if service.ready() else 503, media_type="application/json")


@router.head("/health/detailed", include_in_schema=False)
@router.get("/health/detailed", summary="Every dependency", responses={503: {"description": "critical"}})
async def detailed(request: Request) -> Response:
    """Return the state of each Triton and model, and the number of streams and recordings in flight."""
    service: Service = request.app.state.service
    places, settings = service.places, service.settings
    status = _status(service)
    body: dict[str, Any] = {
        "status": status,
        "service": settings.service_name,
        "version": __version__,
        "uptime_secs": round(time.time() - service.started_at, 1),
        "dependencies": {
            "triton": [_describe(endpoint) for endpoint in service.triton.endpoints],
        },
        "streams": {"active": places.streams, "capacity": settings.max_concurrent_streams},
        "batches": {
            "active": places.batches,
            "capacity": settings.max_concurrent_batches,
            "queue": settings.inference_queue_size,
        },
    }
    return Response(orjson.dumps(body), 503 if status == "critical" else 200, media_type="application/json")


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics_page() -> Response:
    """Return all metrics of this process."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _status(service: Service) -> str:
    endpoints = service.triton.endpoints
    if service.places.draining:
        return "draining"
    if all(_well(endpoint, service.settings.models.values()) for endpoint in endpoints):
        return "ready"
    if service.ready():
        return "degraded"
    return "critical" if any(endpoint.monitor.was_ready for endpoint in endpoints) else "initializing"


def _well(endpoint: Endpoint, ensembles: Iterable[str]) -> bool:
    return all(map(endpoint.ready, ensembles)) and endpoint.breaker.state is BreakerState.CLOSED


def _recognition(health: Health) -> dict[str, Any]:
    """Return the health of one ensemble, from its canaries."""
    return {"ok": health.well, "last": health.last.value if health.last else None, "failures": health.failures}


def _describe(endpoint: Endpoint) -> dict[str, Any]:
    latency_secs = endpoint.monitor.latency_secs
    return {
        "endpoint": endpoint.address,
        "reachable": latency_secs is not None,
        "latency_ms": None if latency_secs is None else round(latency_secs * 1000, 2),
        "breaker": endpoint.breaker.state.name.lower(),
        "sequences": endpoint.sequences,
        "models": {name: state.value for name, state in endpoint.monitor.models.items()},
        "recognition": {name: _recognition(health) for name, health in endpoint.monitor.health.items()},
    }

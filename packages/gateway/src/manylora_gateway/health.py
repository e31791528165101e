"""What a probe asks: whether this gateway lives, and whether it wants requests.

GET /health   200 while new requests are wanted, else 503
GET /live     200 as soon as and as long as the process answers at all
"""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

HEALTH_PATH = "/health"
LIVE_PATH = "/live"


def health_route(healthy: Callable[[], bool]) -> Route:
    """Answers `HEALTH_PATH` by what `healthy` says."""

    async def health(_request: Request) -> Response:
        serving = healthy()
        status = "serving" if serving else "not serving"
        return JSONResponse({"status": status}, 200 if serving else 503)

    return Route(HEALTH_PATH, health, methods=["GET"])


def probes(healthy: Callable[[], bool]) -> ASGIApp:
    """The application of a port for probes alone."""

    async def live(_request: Request) -> Response:
        return JSONResponse({"status": "live"})

    return Starlette(routes=[health_route(healthy), Route(LIVE_PATH, live, methods=["GET"])])

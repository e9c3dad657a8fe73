"""Faults in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from idlm_kernels.serve.metrics import Metrics
from idlm_kernels.serve.protocol import BODIES, NOT_SUPPORTED
from idlm_kernels.serve.worker import RequestFailed, ServerStops, TooBusy

_FIELDS = {name for model in BODIES for name in model.model_fields}
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_MAX_NAME_CHARS = 120


class BadRequest(Exception):
    """What the library refused of a request, in its words."""


class NoSuchModel(Exception):
    """A request for a model that is not served."""


class NoSuchAdapter(Exception):
    """A name that no adapter of the folder has."""


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status, dict(headers or {}))


def response_to(error: Exception) -> JSONResponse:
    """The answer to a fault. What is not known here is a bug, and raised."""
    if isinstance(error, RequestValidationError):
        param, message = _first(error.errors())
        return error_response(400, message, param)
    if isinstance(error, TooBusy):
        return error_response(429, str(error), code="too_busy", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ServerStops):
        return error_response(503, str(error), code="server_stops", headers={"Connection": "close"})
    if isinstance(error, RequestFailed):
        return error_response(500, str(error), code="decode_failed")
    if isinstance(error, NoSuchModel):
        return error_response(404, str(error), "model", "model_not_found")
    if isinstance(error, NoSuchAdapter):
        return error_response(404, str(error), "adapter", "adapter_not_found")
    if isinstance(error, HTTPException):
        message = str(error.detail)
        return error_response(error.status_code, message, headers=error.headers)
    if isinstance(error, BadRequest):
        message = str(error)
        name = re.match(r"(\w+) (?:is|must|holds)\b", message)
        code = "context_length_exceeded" if "but the context is" in message else None
        return error_response(400, message, name[1] if name else None, code)
    raise error


def add_handlers(app: FastAPI, metrics: Metrics) -> None:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        response = response_to(error)
        metrics.refused(response.status_code)
        return response

    async def handle_bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again once this is sent, and uvicorn logs it.
        metrics.refused(500)
        return error_response(500, f"the server failed on this request: {type(error).__name__}")

    unknown = (NoSuchModel, NoSuchAdapter)
    for kind in (RequestValidationError, TooBusy, ServerStops, RequestFailed, *unknown, HTTPException, BadRequest):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(Exception, handle_bug)


def _first(errors: Sequence[Any]) -> tuple[str | None, str]:
    """The field, as a path, and what is wrong with it."""
    error = errors[0]
    kind, path = error["type"], error["loc"][1:]
    if kind == "json_invalid":
        return None, f"the body is not JSON: {error.get('ctx', {}).get('error', '')}"
    if kind == "missing" and not path:
        return None, "the body is empty, wanted a JSON object"
    param = ""
    for part in path:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in _FIELDS or kind == "extra_forbidden":
            name = part[:_MAX_NAME_CHARS]
            param += f".{name}" if param else name
        # The others are pydantic's names for the members of a union.
    if kind == "extra_forbidden":
        return param, f"{param} is not supported by this server"
    said = error["msg"].removeprefix("Value error, ")
    named = re.match(r"(\w+) is not supported", said)
    if not param and named and named[1] in NOT_SUPPORTED:
        param = named[1]
    elif param:
        said = f"{param}: {said}"
    return param or None, said

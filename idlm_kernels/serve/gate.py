"""What is looked at before a body is read: who asks, and how much they mean to send."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from idlm_kernels.serve.errors import error_response
from idlm_kernels.serve.metrics import Metrics

OPEN_PATHS = ("/health", "/")  # without a key: for whoever watches the server; the page, which asks for the key


class Gate:
    """ASGI middleware. A body without a Content-Length is bounded by Starlette's, which counts what comes."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_size: int, metrics: Metrics) -> None:
        self._app, self._max_body_size, self._metrics = app, max_body_size, metrics
        self._digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            length = headers.get("content-length", "0")
            if not self._admits(scope["path"], headers):
                status = 401
                headers_of_answer = {"WWW-Authenticate": "Bearer"}
                response = error_response(
                    status,
                    "wanted the header Authorization: Bearer KEY with the server's API key",
                    code="invalid_api_key",
                    headers=headers_of_answer,
                )
            elif length.isascii() and length.isdigit() and int(length[:20]) > self._max_body_size:
                status = 413
                message = f"the body has {length[:20]} bytes, wanted at most {self._max_body_size}"
                response = error_response(status, message)
            else:
                return await self._app(scope, receive, send)
            self._metrics.refused(status)
            return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _admits(self, path: str, headers: Headers) -> bool:
        if self._digest is None or path in OPEN_PATHS:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Of digests, so that the time does not tell the length either.
        return scheme.lower() == "bearer" and hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._digest)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""The FastAPI application around an engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from idlm_kernels._version import __version__
from idlm_kernels.generate.engine import Engine
from idlm_kernels.generate.params import SamplingParams, draw_seed, mixed_seed
from idlm_kernels.learning.adapters import AdapterFolder
from idlm_kernels.serve.answers import Answer, EventStream, Kind
from idlm_kernels.serve.errors import BadRequest, NoSuchAdapter, NoSuchModel, add_handlers, error_response
from idlm_kernels.serve.gate import Gate
from idlm_kernels.serve.metrics import Metrics
from idlm_kernels.serve.page import PAGE, PAGE_HEADERS
from idlm_kernels.serve.protocol import (
    MAX_CHOICES,
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    Message,
    TokenizeRequest,
)
from idlm_kernels.serve.worker import Asked, ServerStops, Worker

_T = TypeVar("_T")
_CLIENT_GONE = 499  # nginx's number; nobody reads it
_LOOK_SECONDS = 5.0  # from one look at what an adapter's drafts are worth to the next
_log = logging.getLogger(__name__)


class Server:
    """An engine with its worker, and what it is called by its clients.

    max_waiting: texts that may wait beside those that are decoded, before requests are refused with 429.
    max_body_size: bytes of a request. adapters: what /v1/adapters takes; with watch_seconds the newest of them is
    taken by itself, looked for so often.
    """

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        *,
        max_waiting: int = 64,
        max_body_size: int = 4 << 20,
        api_key: str | None = None,
        adapters: AdapterFolder | None = None,
        watch_seconds: float | None = None,
    ):
        if engine.tokenizer is None:
            raise ValueError("the engine has no tokenizer, which a server needs for text")
        if adapters is not None and engine.model.adapter is None:
            raise ValueError("the model has no adapter, so it takes no other one: load it with an adapter")
        self.adapters, self._watch_seconds = adapters, watch_seconds
        self.engine, self.tokenizer, self.model_name = engine, engine.tokenizer, model_name
        self.metrics = Metrics(engine)
        self.worker = Worker(engine, max_waiting, self.metrics)
        self.created = int(time.time())
        self.app = self._application(max_body_size, api_key)

    def _application(self, max_body_size: int, api_key: str | None) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            self.worker.start()
            watching = asyncio.create_task(self._watch()) if self.adapters is not None else None
            yield
            if watching is not None:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
            await self.worker.close()

        # Swagger's pages load their code from the network; the description itself is at /openapi.json.
        app = FastAPI(title="idlm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
        add_handlers(app, self.metrics)
        app.add_middleware(RequestBodyLimitMiddleware, max_body_size=max_body_size)
        app.add_middleware(Gate, api_key=api_key, max_body_size=max_body_size, metrics=self.metrics)
        # What the description says of them; answers are made by the functions themselves.
        sent: dict[str, list[str]] = {
            "/": ["text/html"],
            "/metrics": [CONTENT_TYPE_LATEST.partition(";")[0]],
            "/v1/completions": ["application/json", "text/event-stream"],
            "/v1/chat/completions": ["application/json", "text/event-stream"],
        }
        errors: dict[int | str, dict[str, Any]] = {
            status: {"description": "an error", "model": ErrorBody} for status in ("4XX", "5XX")
        }
        get: dict[str, Callable[..., Any]] = {
            "/": self.page,
            "/health": self.health,
            "/version": self.version,
            "/metrics": self.show_metrics,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
        }
        post: dict[str, Callable[..., Any]] = {
            "/v1/completions": self.complete,
            "/v1/chat/completions": self.chat,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        if self.adapters is not None:
            get["/v1/adapters"], post["/v1/adapters"] = self.show_adapters, self.take_adapter
        for method, routes in (("GET", get), ("POST", post)):
            for path, function in routes.items():
                kinds: dict[str, Any] = {kind: {} for kind in sent.get(path, ["application/json"])}
                app.add_api_route(
                    path,
                    function,
                    methods=[method],
                    response_model=None,
                    response_class=Response if path in sent else JSONResponse,  # the first has no type to describe
                    responses={**errors, 200: {"description": "OK", "content": kinds}},
                )
        return app

    async def page(self) -> Response:
        """A page to talk with the model."""
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def health(self) -> Response:
        """Whether requests are answered."""
        if self.worker.is_alive:
            return JSONResponse({"status": "ok"})
        return error_response(503, "the server ends", code="server_stops")

    async def version(self) -> dict[str, str]:
        return {"version": __version__}

    async def show_metrics(self) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model()

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        params = _checked(lambda: body.sampling(body.max_tokens))
        copies, given = body.n or 1, body.prompts
        if len(given) * copies > MAX_CHOICES:
            raise BadRequest(f"{len(given)} prompts with n = {copies} are more than {MAX_CHOICES} texts")
        _checked(lambda: self.worker.check_room(len(given) * copies))

        def encode() -> list[list[int]]:
            if not given or not all(given):
                raise ValueError("prompt is empty, wanted text or token ids")
            return [
                self.tokenizer.encode(one, add_special_tokens=body.add_special_tokens) if isinstance(one, str) else one
                for one in given
            ]

        prompts = await self._encoded(encode)
        return await self._answer("text_completion", request, body, prompts, params)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check_model(body.model)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        params = _checked(lambda: body.sampling(limit))
        _checked(lambda: self.worker.check_room(body.n or 1))
        prompt = await self._encoded(
            lambda: self._conversation(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        )
        return await self._answer("chat.completion", request, body, [prompt], params)

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self._check_model(body.model)

        def encode() -> list[int]:
            if body.messages is not None:
                return self._conversation(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
            return self.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)

        tokens = await self._encoded(encode)
        return {"count": len(tokens), "max_model_len": self.engine.options.max_model_len, "tokens": tokens}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        self._check_model(body.model)
        return {"prompt": await self._encoded(lambda: self.tokenizer.decode(body.tokens, skip_special_tokens=False))}

    async def show_adapters(self) -> dict[str, Any]:
        """The adapters that may be taken, the one in use, and what became of its drafts and of those before."""
        assert self.adapters is not None
        names = await run_in_threadpool(self.adapters.names)
        counts, before = self.engine.draft_counts, self.engine.replaced
        in_use = {"id": self.engine.adapter_name, "verified": counts.verified, "accepted": counts.accepted}
        return {
            "object": "list",
            "data": [{"id": name, "object": "adapter", "refused": self.adapters.refused.get(name)} for name in names],
            "in_use": in_use,
            "replaced": None
            if before is None
            else {"id": before.adapter.name, "verified": before.counts.verified, "accepted": before.counts.accepted},
        }

    async def take_adapter(self, body: AdapterRequest) -> dict[str, Any]:
        """Draft with another adapter from the next scheduling window on; running requests go on."""
        folder = self.adapters
        assert folder is not None
        try:
            await run_in_threadpool(lambda: folder.take(self.engine, body.adapter))
        except KeyError:
            raise NoSuchAdapter(f"there is no adapter {body.adapter[:80]!r} in {folder.path.name}") from None
        except (ValueError, OSError) as error:  # CheckpointError is one
            raise BadRequest(f"adapter cannot be used: {error}") from None
        return await self.show_adapters()

    # Behind the routes

    async def _watch(self) -> None:
        """Look at the folder, and at what the adapter in use is worth, for as long as the server lives."""
        folder, watched = self.adapters, self._watch_seconds is not None
        assert folder is not None
        while True:
            try:
                await run_in_threadpool(lambda: folder.look(self.engine, take_newest=watched))
            except OSError as error:  # the folder may be gone for a while
                _log.error("%s cannot be looked at: %s", folder.path, error)
            await asyncio.sleep(self._watch_seconds or _LOOK_SECONDS)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "idlm_kernels",
            "max_model_len": self.engine.options.max_model_len,
            "rule": self.engine.options.rule,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise NoSuchModel(f"there is no model {name[:80]!r} here, only {self.model_name!r}")

    def _conversation(
        self, messages: Sequence[Message], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> list[int]:
        if taken := variables.keys() & {"messages", "add_generation_prompt"}:
            raise ValueError(f"chat_template_kwargs holds {min(taken)}, which is a field of the request")
        text = self.tokenizer.apply_chat_template(
            [message.for_template() for message in messages], add_generation_prompt=add_generation_prompt, **variables
        )
        return self.tokenizer.encode(text, add_special_tokens=False)  # a template writes its special tokens itself

    async def _encoded(self, encode: Callable[[], _T]) -> _T:
        """The result of something that may take long, from another thread."""
        try:
            return await run_in_threadpool(encode)
        except (ValueError, TypeError) as error:
            raise BadRequest(str(error)) from None
        except OSError as error:  # no process for the chat template, or it was ended from outside
            self.worker.fail(error)
            raise ServerStops("the machine has failed, and the server ends") from error

    async def _answer(
        self,
        kind: Kind,
        request: Request,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
    ) -> Response:
        logprobs = params.logprobs is not None
        if logprobs and not self.engine.options.logprobs:
            raise BadRequest("logprobs is not supported by this server: start it with --logprobs")
        copies, seed = body.n or 1, draw_seed() if params.seed is None else params.seed
        each = [prompt for prompt in prompts for _ in range(copies)]
        try:
            drafts = body.plan == "auto"
            call = await self.worker.submit(
                [Asked(ids, params, mixed_seed(seed, i), drafts) for i, ids in enumerate(each)]
            )
        except (ValueError, TypeError) as error:
            raise BadRequest(str(error)) from None
        answer = Answer(
            kind,
            self.model_name,
            call,
            self.tokenizer,
            seed=seed,
            logprobs=params.logprobs,
            stream=body.stream_options,
            copies=copies,
        )
        if body.stream:
            return EventStream(answer, self.worker)
        try:
            whole = await _unless_gone(request, answer.whole())
        finally:
            self.worker.end(call)
        return Response(status_code=_CLIENT_GONE) if whole is None else JSONResponse(whole)


def _checked(make: Callable[[], _T]) -> _T:
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise BadRequest(str(error)) from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The result, or None where the client closes the connection first."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()

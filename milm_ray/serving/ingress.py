"""The HTTP face of the model endpoints: checks a request, finds its model, passes it on.

It holds no model and imports no engine. What it does not know it refuses, so that a misspelt
parameter is an error and not a silent default.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from milm_ray.serving.access import Gate
from milm_ray.serving.adapters import Adapter, AdapterStore, split_id
from milm_ray.serving.errors import error_body
from milm_ray.serving.models import GC_THRESHOLD, IngressArgs


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class SamplingBody(BaseModel):
    """What a chat and a completion request have in common; OpenAI's names and bounds."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, gt=0, le=4)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, max_length=256)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)


class ChatBody(SamplingBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionBody(SamplingBody):
    prompt: str | list[int] = Field(min_length=1)


async def _streamed(
    handle: DeploymentHandle, kind: str, body: dict[str, Any], adapter: Adapter | None
) -> Response:
    """The reply as server-sent events; an error before the first piece keeps its status."""
    pieces: Any = handle.options(stream=True).stream.remote(kind, body, adapter)
    try:
        status, first = await anext(pieces)
    except StopAsyncIteration:
        raise Refused(500, "the engine gave no reply") from None
    if status != 200:
        return Response(first, status, media_type="application/json")

    async def events() -> AsyncIterator[str]:
        ended = False
        try:
            yield first
            async for status, text in pieces:
                yield text if status == 200 else f"data: {text}\n\ndata: [DONE]\n\n"
            ended = True
        except Exception as error:
            # The status line has gone out: the only way left to say it is in the stream.
            message = json.loads(error_body(500, f"the reply broke off ({type(error).__name__})"))
            yield f"data: {json.dumps(message)}\n\ndata: [DONE]\n\n"
        finally:
            if not ended:
                pieces.cancel()  # a client that left must not keep the engine busy

    return StreamingResponse(events(), media_type="text/event-stream")


async def _refuse(_request: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    body = error_body(refused.status, refused.message)
    return Response(body, refused.status, refused.headers, "application/json")


class Ingress:
    """A Serve deployment: the routes below, behind the gate that asks for keys."""

    def __init__(
        self,
        args: dict[str, Any],
        adapters_root: str | None,
        models: dict[str, DeploymentHandle],
    ) -> None:
        self._args = IngressArgs.model_validate(args)
        self._store = AdapterStore(adapters_root) if adapters_root is not None else None
        self._models = models
        self._started = int(time.time())
        gc.set_threshold(GC_THRESHOLD)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = FastAPI(title="milm_ray model endpoints", docs_url=None, redoc_url=None)
        app.add_exception_handler(Refused, _refuse)
        app.get("/health")(self.health)
        app.get("/v1/models")(self.list_models)
        app.get("/v1/models/{model_id}")(self.get_model)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.completions)
        return Gate(
            app,
            self._args.keys_file,
            replicas=self._args.replicas,
            max_body_bytes=self._args.max_body_bytes,
        )

    async def health(self) -> dict[str, str]:
        """Whether the ingress answers; Serve replaces replicas that do not."""
        return {"status": "ok"}

    async def list_models(self) -> JSONResponse:
        """Every base and every adapter that can be asked for now."""
        ids: list[str] = []
        for name in self._models:
            ids.append(name)
            if self._store is not None:
                found = await run_in_threadpool(self._store.list, name)
                ids += [adapter.public_id for adapter in found]
        return JSONResponse({"object": "list", "data": [self._card(model_id) for model_id in ids]})

    async def get_model(self, model_id: str) -> JSONResponse:
        await self._find(model_id)
        return JSONResponse(self._card(model_id))

    async def chat(self, request: Request) -> Response:
        return await self._answer("chat", ChatBody, request)

    async def completions(self, request: Request) -> Response:
        return await self._answer("completions", CompletionBody, request)

    async def _answer(self, kind: str, schema: type[SamplingBody], request: Request) -> Response:
        body = self._parse(schema, await request.body())
        handle, adapter = await self._find(body["model"])
        if adapter is not None:
            # The router prefers a replica that has the adapter already.
            handle = handle.options(multiplexed_model_id=adapter.key)
        try:
            if body.get("stream"):
                return await _streamed(handle, kind, body, adapter)
            status, text = await handle.complete.remote(kind, body, adapter)
        except BackPressureError:
            raise Refused(
                503, "the model is busy; try again in a moment", {"Retry-After": "1"}
            ) from None
        except (DeploymentUnavailableError, RayActorError):
            raise Refused(
                503, "the model is not up at the moment; try again later", {"Retry-After": "10"}
            ) from None
        return Response(text, status, media_type="application/json")

    def _parse(self, schema: type[SamplingBody], raw: bytes) -> dict[str, Any]:
        try:
            body = schema.model_validate_json(raw)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}"
                for item in error.errors(include_input=False, include_url=False)[:5]
            ]
            raise Refused(400, "; ".join(problems)) from None
        known = body.model_dump(exclude_none=True)
        wanted = known.pop("max_completion_tokens", None) or known.get("max_tokens")
        if wanted is not None and wanted > self._args.max_tokens:
            raise Refused(400, f"max_tokens: at most {self._args.max_tokens} here")
        return {**known, "max_tokens": wanted or self._args.default_max_tokens}

    async def _find(self, model_id: str) -> tuple[DeploymentHandle, Adapter | None]:
        """The model's handle and its adapter; 404 where there is no such model or adapter."""
        model, name = split_id(model_id)
        handle = self._models.get(model)
        adapter = None
        if handle is not None and name is not None and self._store is not None:
            adapter = await run_in_threadpool(self._store.find, model, name)
        if handle is None or (name is not None and adapter is None):
            raise Refused(
                404, f"there is no model {model_id!r}; GET /v1/models lists what there is"
            )
        return handle, adapter

    def _card(self, model_id: str) -> dict[str, Any]:
        return {
            "id": model_id,
            "object": "model",
            "created": self._started,
            "owned_by": "milm_ray",
            "parent": split_id(model_id)[0] if ":" in model_id else None,
        }

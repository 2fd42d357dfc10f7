"""One replica of one model: ray.serve.llm's server around a vLLM engine, adapters loaded on use.

Requests arrive as plain dictionaries and leave as JSON text, so the ingress needs no vLLM.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from milm_ray.models.checkpoint import prepare_base
from milm_ray.serving.adapters import CHAT_FORMAT, Adapter, AdapterStore
from milm_ray.serving.errors import error_body
from milm_ray.serving.models import GC_THRESHOLD, ModelArgs

_GIB = 1 << 30


class ModelReplica:
    """A Serve deployment of one base model and whatever adapters its requests name."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: dict[str, Any], adapters_root: str | None
    ) -> None:
        self._args = ModelArgs.model_validate(model)
        if self._args.num_gpus == 0:
            # vLLM logs that there is no Triton while it is imported, before any level is set.
            logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
        from ray.serve.llm import LLMConfig, LLMServer

        await asyncio.to_thread(_prepare, self._args)
        self._store = AdapterStore(adapters_root) if adapters_root is not None else None
        self._adapters: dict[str, _Loaded] = {}
        config = LLMConfig(**_llm_config(self._args, self._store is not None))
        loader: Any = self._loader
        self._server = LLMServer.sync_init(
            config, engine_cls=_engine_cls(self._args), model_downloader=loader
        )
        await self._server.start()
        _load_one_at_a_time(self._server.engine)
        gc.set_threshold(GC_THRESHOLD)

    async def check_health(self) -> None:
        await self._server.check_health()

    async def complete(
        self, kind: str, body: dict[str, Any], adapter: Adapter | None
    ) -> tuple[int, str]:
        """Answer one request whole: (HTTP status, JSON). kind: "chat" or "completions"."""
        async for status, text in self.stream(kind, body, adapter):
            return status, text
        return 500, error_body(500, "the engine gave no reply")

    async def stream(
        self, kind: str, body: dict[str, Any], adapter: Adapter | None
    ) -> AsyncIterator[tuple[int, str]]:
        """Answer one request: (200, server-sent events) piece by piece, or one (status, JSON)."""
        from pydantic import ValidationError
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

        public_id = body["model"]
        engine_id = adapter.key if adapter else public_id
        request_cls = ChatCompletionRequest if kind == "chat" else CompletionRequest
        try:
            request = request_cls.model_validate({**body, "model": engine_id})
            if adapter:
                loaded = await self._load(adapter)
                loaded.shape(request, chat=kind == "chat")
            replies = await getattr(self._server, kind)(request)
            async for reply in replies:
                # A stream comes as lists of the pieces that were ready together.
                pieces = reply if isinstance(reply, list) else [reply]
                for piece in pieces:
                    yield _reply(piece, engine_id, public_id)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
            )
            yield 400, error_body(400, problems)
        except ValueError as error:
            yield 400, error_body(400, str(error))

    async def _load(self, adapter: Adapter) -> _Loaded:
        """The adapter's files on this node, fetched once."""
        if self._store is None:
            raise ValueError("this app was deployed without adapters_root")
        if adapter.key not in self._adapters:
            path = await asyncio.to_thread(self._store.fetch, adapter)
            self._adapters[adapter.key] = _Loaded.read(path)
        return self._adapters[adapter.key]

    def _loader(self, **_limits: Any) -> _Loader:
        return _Loader(self._adapters)


def _prepare(args: ModelArgs) -> None:
    """Make the base's directory on this node, where only others have it so far."""
    source, place = args.source, Path(args.path)
    if source is not None and not place.is_dir():
        prepare_base(source.name_or_path, source.revision, place.parent, source.chat_format)


def _reply(piece: Any, engine_id: str, public_id: str) -> tuple[int, str]:
    """One thing the engine said as (HTTP status, text), under the name the client knows."""
    if isinstance(piece, str):
        return 200, piece.replace(f'"model":"{engine_id}"', f'"model":"{public_id}"')
    if hasattr(piece, "error"):
        status = int(piece.error.code or 500)
        return status, error_body(status, piece.error.message)
    piece.model = public_id
    return 200, piece.model_dump_json()


class _Loaded:
    """An adapter on this node, with the chat format and stop tokens that lie beside it."""

    def __init__(self, path: str, chat_template: str | None, stop_token_ids: list[int]) -> None:
        self.path = path
        self.chat_template = chat_template
        self.stop_token_ids = stop_token_ids

    @classmethod
    def read(cls, path: str) -> _Loaded:
        template = Path(path, CHAT_FORMAT)
        generation = Path(path, "generation_config.json")
        stops = (
            json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
        )
        return cls(
            path,
            template.read_text(encoding="utf-8") if template.exists() else None,
            [stops] if isinstance(stops, int) else list(stops or []),
        )

    def shape(self, request: Any, *, chat: bool) -> None:
        """Put the adapter's own format and stops into a request; its base's are the defaults."""
        if chat and self.chat_template is not None:
            request.chat_template = self.chat_template
        if self.stop_token_ids:
            request.stop_token_ids = [*(request.stop_token_ids or []), *self.stop_token_ids]


class _Loader:
    """What LLMServer asks for an adapter it has not seen: where its files are.

    Takes the place of ray.serve.llm's own loader, which reads cloud URIs only.
    """

    def __init__(self, adapters: dict[str, _Loaded]) -> None:
        self._adapters = adapters

    async def load_model_from_config(self, lora_model_id: str, llm_config: Any) -> Any:
        from ray.llm._internal.common.models import global_id_manager
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig

        return DiskMultiplexConfig(
            model_id=lora_model_id,
            max_total_tokens=None,
            local_path=self._adapters[lora_model_id].path,
            lora_assigned_int_id=global_id_manager.next(),
        )


def _load_one_at_a_time(engine: Any) -> None:
    """The engine looks whether it has an adapter, then loads it; of two first requests that look
    at the same moment, the second would be refused for an adapter that is loaded already."""
    resolve, lock = engine.resolve_lora, asyncio.Lock()

    async def resolve_lora(adapter: Any) -> None:
        async with lock:
            await resolve(adapter)

    engine.resolve_lora = resolve_lora


def _engine_cls(args: ModelArgs) -> Any:
    """The engine for the CPU, or None: the library's own."""
    if args.num_gpus:
        return None
    from milm_ray.serving.cpu_engine import CpuEngine

    return CpuEngine


def _llm_config(args: ModelArgs, adapters: bool) -> dict[str, Any]:
    """Arguments of ray.serve.llm's LLMConfig. The model's own files decide format and stops."""
    engine: dict[str, Any] = {
        "max_model_len": args.max_model_len,
        "dtype": args.dtype,
        "tensor_parallel_size": args.tensor_parallel_size,
        "max_num_seqs": args.max_num_seqs,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "enable_prompt_tokens_details": True,  # cached tokens in every reply's usage
        # What a request leaves out is plain sampling, whatever the checkpoint's authors preferred.
        "override_generation_config": {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
        },
        "trust_request_chat_template": True,  # ours, from the adapter; the ingress admits no other
    }
    if args.kv_cache_gib is not None:
        engine["kv_cache_memory_bytes"] = int(args.kv_cache_gib * _GIB)
    if adapters:
        engine |= {
            "enable_lora": True,
            "max_loras": args.max_adapters,
            "max_lora_rank": _supported_rank(args.max_lora_rank),
        }
    if args.num_gpus == 0:
        from milm_ray.serving.cpu_engine import WORKER_CLS

        # block_size: a prefix is cached by whole blocks, and a round is short beside the 128 that
        # vLLM takes on a CPU.
        engine |= {"enforce_eager": True, "block_size": 32, "worker_cls": WORKER_CLS}
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": args.name, "model_source": args.path},
        "engine_kwargs": {**engine, **args.engine},
        "placement_group_config": {"bundles": args.bundles},
        "accelerator_type": args.accelerator_type,
    }
    if adapters:
        config["lora_config"] = {"max_num_adapters_per_replica": 4 * args.max_adapters}
    if Path(args.path).is_dir():
        config["callback_config"] = {"callback_class": _nothing_to_download()}
    return config


def _supported_rank(rank: int) -> int:
    """The smallest rank that vLLM can be built for and that holds `rank`."""
    for supported in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= supported:
            return supported
    raise ValueError(f"max_lora_rank {rank} is above vLLM's highest, 512")


def _nothing_to_download() -> type:
    """A start-up hook for checkpoints that are there already: no download task, no extra worker."""
    from ray.llm._internal.common.callbacks.base import CallbackBase

    class NothingToDownload(CallbackBase):
        async def on_before_node_init(self) -> None:
            self.ctx.run_init_node = False

    return NothingToDownload

"""Served models as counselors of a session: turns in, the model's next reply out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from milm_ray.config import Config
from milm_ray.job import connect, log
from milm_ray.llm.client import LLMClient
from milm_ray.llm.replies import Reply, Request, Subject
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.models import chat_format
from milm_ray.models.messages import dialogue_messages
from milm_ray.schema import Turn, Variant
from milm_ray.serving import batch
from milm_ray.serving.endpoints import app_args, prepared_bases
from milm_ray.serving.running import models_in_use
from milm_ray.workspace import Workspace

Arm = tuple[str, Variant]


class Counselor:
    """One endpoint as the counselor of any number of sessions at once."""

    def __init__(self, config: Config, run: batch.Run, base_url: str, store: ReplyStore) -> None:
        self._config, self._run, self._url, self._store = config, run, base_url, store
        self._tokenizer = batch.Tokenizer(run.base)
        self._budget = config.serve.max_model_len - config.generate.max_new_tokens
        self._clients: dict[int | None, LLMClient] = {}

    async def __call__(self, turns: Sequence[Turn], seed: int) -> tuple[Reply, int]:
        """The reply to a session that ends with its client, and the rounds dropped to fit it.

        seed: of the sampling, where it samples. Raises milm_ray.llm.client.Rejected.
        """
        messages, dropped = chat_format.fit(
            self._tokenizer,
            self._run.chat_format,
            dialogue_messages(turns),
            self._budget,
            training=False,
        )
        sampled = self._config.simulate.decoding == "sampled"
        client = self._client(seed if sampled else None)
        subject = Subject("simulated", f"{len(turns)} turns", self._run.endpoint)
        reply = await client.complete(Request(messages, None, subject, self._run.version))
        opening = batch.opening(self._run.chat_format)
        return replace(reply, text=reply.text.removeprefix(opening)), dropped

    def _client(self, seed: int | None) -> LLMClient:
        if seed not in self._clients:
            settings = batch.settings(self._config, replace(self._run, seed=seed), self._url)
            self._clients[seed] = LLMClient(settings, self._store)
        return self._clients[seed]


@contextmanager
def counselors(
    config: Config, workspace: Workspace, arms: Sequence[Arm]
) -> Iterator[Mapping[Arm, Counselor]]:
    """The counselors of the arms asked for, on endpoints that run as long as the block."""
    connect(config)
    bases = prepared_bases(config, workspace)
    runs = {
        (model, variant): batch.run_of(config, workspace, bases[model], model, variant)
        for model, variant in arms
    }
    args = app_args(config, workspace, bases)
    store = ReplyStore(workspace)
    log.info("simulate | %d engines answer; starting them takes a while", len(args.models))
    with models_in_use(args) as url:
        yield {arm: Counselor(config, runs[arm], url, store) for arm in arms}

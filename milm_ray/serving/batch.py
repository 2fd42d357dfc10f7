"""Ask the model endpoints for a reply to every round, and keep every reply as it comes.

Rounds are asked in their own order, dialogue by dialogue, so that an engine's prefix cache holds
round k's prompt when round k+1 comes. Every reply is in the reply store before it is a row: a run
that was killed asks only for what it had not received.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from milm_ray.config import Config, LLMSection
from milm_ray.errors import UserError
from milm_ray.llm.client import LLMClient, Rejected
from milm_ray.llm.progress import Progress
from milm_ray.llm.replies import Request, Subject
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.models import chat_format
from milm_ray.models.messages import round_messages
from milm_ray.nodes import this_node
from milm_ray.schema import PREDICTIONS, VARIANTS, Variant
from milm_ray.serving.adapters import DEFAULT_ADAPTER
from milm_ray.serving.endpoints import base_digest
from milm_ray.workspace import MANIFEST, Workspace

ROUNDS = "test_rounds"

_ROUNDS_PER_BLOCK = 4
_BLOCKS = 1024  # the driver keeps some ten kilobytes of each: with more rounds, blocks grow
_CALLS_PER_ACTOR = 1024
_STOPPED = "stopped"
# About a quarter of an hour: Serve starts an engine whose node was lost again, on another.
_ATTEMPTS = 24
_OUTCOME = pa.schema(
    [*PREDICTIONS, pa.field("failure", pa.string()), pa.field("detail", pa.string())]
)


@dataclass(frozen=True)
class Run:
    """One pass over the rounds: who answers, and how it samples.

    endpoint: the id asked for; version: digest of the weights behind it; base: the prepared base
    whose tokenizer measures the prompts; seed None: greedy.
    """

    model: str
    variant: Variant
    endpoint: str
    version: str
    chat_format: str
    base: str
    seed: int | None = None

    @property
    def sampling(self) -> str:
        return "greedy" if self.seed is None else f"seed-{self.seed}"


def adapter_of(model: str, variant: Variant) -> tuple[str, str]:
    """Artifact and endpoint of the adapter that stands behind a variant of a model."""
    if variant == "dpo":
        return f"adapters/{model}/dpo", f"{model}:dpo"
    return f"adapters/{model}", f"{model}:{DEFAULT_ADAPTER}"


def run_of(
    config: Config,
    workspace: Workspace,
    base: Path,
    model: str,
    variant: Variant,
    seed: int | None = None,
) -> Run:
    """One run. base: the model's prepared base. UserError where it has no such adapter."""
    endpoint, version = model, base_digest(base)
    if variant != "base":
        artifact, endpoint = adapter_of(model, variant)
        version = f"{version}+{workspace.manifest(artifact)['digest']}"
    chat_format = config.models[model].chat_format
    return Run(model, variant, endpoint, version, chat_format, str(base), seed)


def variants_of(config: Config, workspace: Workspace, model: str) -> list[Variant]:
    """The variants of a model that generate.variants names, dpo where it has been made."""
    there = workspace.exists(adapter_of(model, "dpo")[0], MANIFEST)
    return [v for v in VARIANTS if v in config.generate.variants and (v != "dpo" or there)]


def runs(config: Config, workspace: Workspace, bases: Mapping[str, Path]) -> list[Run]:
    """Every run of the configuration: models × variants × {greedy, each seed}."""
    return [
        run_of(config, workspace, bases[model], model, variant, seed)
        for model in config.models
        for variant in variants_of(config, workspace, model)
        for seed in (None, *config.generate.seeds)
    ]


def sampled_runs(
    config: Config, workspace: Workspace, bases: Mapping[str, Path], seeds: Sequence[int]
) -> list[Run]:
    """A run of every model's adapter for each seed."""
    return [
        run_of(config, workspace, bases[model], model, "adapter", seed)
        for model in config.models
        for seed in seeds
    ]


def made_from(
    config: Config,
    workspace: Workspace,
    inputs: Iterable[str],
    seeds: Sequence[int],
    **settings: Any,
) -> dict[str, Any]:
    """The fingerprint of replies: everything they depend on.

    inputs: the artifacts of the rounds and the adapters; settings: what else counts.
    """
    sampling = {"max_new_tokens", "temperature", "top_p", "top_k"}
    return workspace.fingerprint(
        {
            "generate": config.generate.model_dump(include=sampling),
            "seeds": list(seeds),
            "serve": config.serve.model_dump(include={"max_model_len", "dtype", "engine"}),
            "models": {name: section.model_dump() for name, section in config.models.items()},
            **settings,
        },
        workspace.input_digests(*inputs),
    )


def predict(
    config: Config,
    workspace: Workspace,
    wanted: Sequence[Run],
    base_url: str,
    rounds: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """Predictions for every round and run, block by block in the rounds' order, as they come.

    rounds: Parquet files of schema.ROUNDS on the workspace's filesystem; default `test_rounds/`.
    Yields tables of PREDICTIONS with two more columns, failure and detail (empty: there is a
    reply). Raises UserError when nothing more can be asked.
    """
    import ray

    files = list(rounds) or workspace.parquet_files(ROUNDS)
    total = count(workspace, files)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    per_block = max(_ROUNDS_PER_BLOCK, -(-total // _BLOCKS))
    places = _places(workspace, files, per_block)
    # from_arrow would run a task per block, each on a whole CPU, of which engines may leave none.
    blocks = ray.data.from_items(places, override_num_blocks=len(places))
    actors = -(-config.generate.concurrency // _CALLS_PER_ACTOR)
    per_actor = -(-config.generate.concurrency // actors)
    at_once = 2 + -(-per_actor // (per_block * max(1, len(wanted))))
    outcomes = blocks.map_batches(
        _Predictor,
        batch_size=None,
        batch_format="pyarrow",
        # Two blocks more than fill the engines: they follow while the last of one are awaited.
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=at_once,
            max_concurrent_calls_per_actor=at_once,
        ),
        # It mostly waits, and the engines hold most of the cluster. Endpoints started for a job
        # answer their own machine only, and the bases may be prepared nowhere else.
        num_cpus=0,
        label_selector=this_node(),
        fn_constructor_kwargs={
            "config": config,
            "workspace": workspace,
            "runs": list(wanted),
            "base_url": base_url,
            "concurrency": per_actor,
        },
    )
    with Progress("generate", total * len(wanted), cost=0.0) as progress:
        table: Any
        for table in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in table.drop(["text"]).to_pylist():
                if row["failure"] == _STOPPED:
                    cause, _, fix = row["detail"].partition("\n")
                    raise UserError(cause, fix)
                used = (row["prompt_tokens"] or 0) + (row["completion_tokens"] or 0)
                progress.add(rejected=bool(row["failure"]), tokens=used, cost=0.0)
            yield table


def count(workspace: Workspace, files: Sequence[str]) -> int:
    """Rows of Parquet files, by their footers."""
    return sum(
        pq.ParquetFile(file, filesystem=workspace.filesystem).metadata.num_rows for file in files
    )


def _places(workspace: Workspace, files: Sequence[str], per_block: int) -> list[dict[str, Any]]:
    """The rounds in blocks: file, first row, number of rows. Whoever asks reads them itself."""
    return [
        {"file": file, "first": first, "count": min(per_block, rows - first)}
        for file in files
        for rows in [count(workspace, [file])]
        for first in range(0, rows, per_block)
    ]


def _read(workspace: Workspace, file: str, first: int, count: int) -> list[dict[str, Any]]:
    """Rows of a Parquet file; only the row groups that hold them are read."""
    parquet = pq.ParquetFile(file, filesystem=workspace.filesystem)
    groups, start, before = [], 0, 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if start + rows <= first:
            before += rows
        elif start < first + count:
            groups.append(group)
        start += rows
    return parquet.read_row_groups(groups).slice(first - before, count).to_pylist()


class _Predictor:
    """Asks for all runs of a block of rounds.

    In: a place in the rounds' files (see _places). Out (1→rounds × runs): _OUTCOME, round by round.
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        runs: list[Run],
        base_url: str,
        concurrency: int,
    ) -> None:
        self._config = config
        self._workspace = workspace
        self._store = ReplyStore(workspace)
        self._runs = runs
        self._tokenizers = {run.base: Tokenizer(run.base) for run in runs}
        self._budget = config.serve.max_model_len - config.generate.max_new_tokens
        # First come, first served: the order in which rounds are asked is the prefix cache's.
        self._places = asyncio.Semaphore(concurrency)
        self._clients = {
            run: LLMClient(settings(config, run, base_url), self._store) for run in runs
        }

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        await asyncio.to_thread(self._store.refresh)
        (place,) = batch.to_pylist()
        rounds = await asyncio.to_thread(_read, self._workspace, **place)
        asked = [self._row(row, run) for row in rounds for run in self._runs]
        yield pa.Table.from_pylist(await asyncio.gather(*asked), schema=_OUTCOME)

    async def _row(self, row: Mapping[str, Any], run: Run) -> dict[str, Any]:
        messages, dropped = chat_format.fit(
            self._tokenizers[run.base],
            run.chat_format,
            round_messages(row),
            self._budget,
            training=False,
        )
        key = f"{row['dialogue_id'][:12]}/{row['round_index']}"
        subject = Subject(source_id=key, prompt=f"{run.endpoint} {run.sampling}")
        prediction: dict[str, Any] = {
            "dialogue_id": row["dialogue_id"],
            "round_index": row["round_index"],
            "model": run.model,
            "variant": run.variant,
            "sampling": run.sampling,
            "dropped_rounds": dropped,
            "failure": "",
            "detail": "",
        }
        try:
            request = Request(messages, subject=subject, version=run.version)
            async with self._places:
                reply = await self._clients[run].complete(request)
        except Rejected as error:
            return {**prediction, "failure": error.reason, "detail": error.detail}
        except UserError as error:
            return {**prediction, "failure": _STOPPED, "detail": f"{error.cause}\n{error.fix}"}
        return {
            **prediction,
            # The glm4 format opens a reply with a line break.
            "text": reply.text.removeprefix(opening(run.chat_format)),
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "latency_s": reply.latency_s,
        }


class Tokenizer:
    """A prepared base's tokenizer as `chat_format` needs it, without importing transformers."""

    def __init__(self, base: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(base, "tokenizer.json")))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def opening(name: str) -> str:
    """What a chat format puts ahead of every reply: format, not text."""
    return chat_format.get(name).reply.partition("{}")[0]


def settings(config: Config, run: Run, base_url: str) -> LLMSection:
    """The endpoint of one run as the LLM client knows it; it costs nothing per token."""
    greedy = run.seed is None
    generate = config.generate
    return LLMSection(
        model=run.endpoint,
        base_url=base_url,
        api_key_env="",  # endpoints started for a job are its own and ask for no key
        temperature=0.0 if greedy else generate.temperature,
        top_p=1.0 if greedy else generate.top_p,
        top_k=None if greedy else generate.top_k,
        seed=run.seed,
        max_tokens=generate.max_new_tokens,
        concurrency=generate.concurrency,
        timeout_s=600.0,
        max_attempts=_ATTEMPTS,
        prompt_price=0.0,
        completion_price=0.0,
    )

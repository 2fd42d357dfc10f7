"""Generate: base and adapter replies to every test round, asked of the Serve endpoints.

In: `test_rounds/`, `adapters/<model>/`. Out: `predictions/`, rounds × models × {base, adapter} ×
{greedy, each seed}, one row each; `rejects/generate/` for rounds that got no reply.

Rounds are asked in their own order, dialogue by dialogue, so that an engine's prefix cache holds
round k's prompt when round k+1 comes. Every reply is in the reply store before it is a row: a run
that was killed asks only for what it had not received.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from milm_ray.config import Config, LLMSection
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import Plan, Stage, finished, log
from milm_ray.llm.client import LLMClient, Rejected
from milm_ray.llm.limits import Limits
from milm_ray.llm.progress import Progress
from milm_ray.llm.replies import Request, Subject
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.models import chat_format
from milm_ray.models.messages import round_messages
from milm_ray.schema import PREDICTIONS, REJECTS, Reject
from milm_ray.serving.adapters import DEFAULT_ADAPTER
from milm_ray.serving.endpoints import app_args, base_digest, prepared_bases
from milm_ray.workspace import Workspace

ARTIFACT = "predictions"
REJECTED = "rejects/generate"
ROUNDS = "test_rounds"
# A round without a reply is a hole in the scores; more than this share of them is a failed stage.
MAX_REJECT_RATE = 0.01

_ROUNDS_PER_BLOCK = 64
_ROWS_PER_FILE = 4096
_KEY_ENV = "MILM_RAY_API_KEY"
_OUTCOME = pa.schema(
    [*PREDICTIONS, pa.field("failure", pa.string()), pa.field("detail", pa.string())]
)
_STOPPED = "stopped"


@dataclass(frozen=True)
class Run:
    """One pass over the rounds: who answers, and how it samples.

    endpoint: the id asked for; version: digest of the weights behind it; base: the prepared base
    whose tokenizer measures the prompts; seed None: greedy.
    """

    model: str
    variant: str
    endpoint: str
    version: str
    chat_format: str
    base: str
    seed: int | None = None

    @property
    def sampling(self) -> str:
        return "greedy" if self.seed is None else f"seed-{self.seed}"


def runs(config: Config, workspace: Workspace, bases: Mapping[str, Path]) -> list[Run]:
    """Every run of the configuration: models × {base, adapter} × {greedy, each seed}."""
    found = []
    for model, section in config.models.items():
        base = base_digest(bases[model])
        adapter = workspace.manifest(f"adapters/{model}")["digest"]
        for variant, endpoint, version in (
            ("base", model, base),
            ("adapter", f"{model}:{DEFAULT_ADAPTER}", f"{base}+{adapter}"),
        ):
            for seed in (None, *config.generate.seeds):
                place = str(bases[model])
                found.append(
                    Run(model, variant, endpoint, version, section.chat_format, place, seed)
                )
    return found


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
    total = sum(pq.ParquetFile(f, filesystem=workspace.filesystem).metadata.num_rows for f in files)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    # Small reservations: the engines hold most of the cluster, and these processes mostly wait.
    blocks = ray.data.read_parquet(
        files,
        filesystem=workspace.filesystem,
        ray_remote_args={"num_cpus": 0.1},
        override_num_blocks=max(1, -(-total // _ROUNDS_PER_BLOCK)),
    )
    actors = max(1, config.generate.concurrency // 128)
    outcomes = blocks.map_batches(
        _Predictor,
        batch_size=None,
        batch_format="pyarrow",
        # Two blocks at a time: the next one fills the engines while the last of one are awaited.
        compute=ray.data.ActorPoolStrategy(
            size=actors, max_tasks_in_flight_per_actor=2, max_concurrent_calls_per_actor=2
        ),
        num_cpus=0.1,
        fn_constructor_kwargs={
            "config": config,
            "workspace": workspace,
            "runs": list(wanted),
            "base_url": base_url,
            "concurrency": max(1, config.generate.concurrency // actors),
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


class _Predictor:
    """Asks for all runs of a block of rounds.

    In: schema.ROUNDS. Out (1→len(runs)): _OUTCOME, round by round.
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        runs: list[Run],
        base_url: str,
        concurrency: int,
    ) -> None:
        # The endpoints started for a job are this machine's own; they ask for no key.
        os.environ.setdefault(_KEY_ENV, "none")
        self._config = config
        self._store = ReplyStore(workspace)
        self._runs = runs
        self._tokenizers = {run.base: _Tokenizer(run.base) for run in runs}
        self._budget = config.serve.max_model_len - config.generate.max_new_tokens
        gate = Limits(LLMSection(concurrency=concurrency))
        self._clients = {
            run: LLMClient(_settings(config, run, base_url), self._store, gate) for run in runs
        }

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        await asyncio.to_thread(self._store.refresh)
        asked = [self._row(row, run) for row in batch.to_pylist() for run in self._runs]
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
            reply = await self._clients[run].complete(request)
        except Rejected as error:
            return {**prediction, "failure": error.reason, "detail": error.detail}
        except UserError as error:
            return {**prediction, "failure": _STOPPED, "detail": f"{error.cause}\n{error.fix}"}
        return {
            **prediction,
            # The glm4 format opens a reply with a line break: format, not text.
            "text": reply.text.removeprefix(self._opening(run)),
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "latency_s": reply.latency_s,
        }

    def _opening(self, run: Run) -> str:
        return chat_format.get(run.chat_format).reply.partition("{}")[0]


class _Tokenizer:
    """A prepared base's tokenizer as `chat_format` needs it, without importing transformers."""

    def __init__(self, base: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(base, "tokenizer.json")))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _settings(config: Config, run: Run, base_url: str) -> LLMSection:
    """The endpoint of one run as the LLM client knows it; it costs nothing per token."""
    greedy = run.seed is None
    generate = config.generate
    return LLMSection(
        model=run.endpoint,
        base_url=base_url,
        api_key_env=_KEY_ENV,
        temperature=0.0 if greedy else generate.temperature,
        top_p=1.0 if greedy else generate.top_p,
        seed=run.seed,
        max_tokens=generate.max_new_tokens,
        concurrency=generate.concurrency,
        timeout_s=600.0,
        prompt_price=0.0,
        completion_price=0.0,
    )


def _fingerprint(config: Config, workspace: Workspace) -> dict[str, Any]:
    settings = {
        "generate": config.generate.model_dump(exclude={"concurrency"}),
        "serve": config.serve.model_dump(include={"max_model_len", "dtype", "engine"}),
        "models": {name: section.model_dump() for name, section in config.models.items()},
    }
    adapters = [f"adapters/{model}" for model in config.models]
    return workspace.fingerprint(settings, workspace.input_digests(ROUNDS, *adapters))


def plan(config: Config, workspace: Workspace) -> Plan:
    """What generation would take; writes nothing."""
    if not config.models:
        raise ConfigError(["models: name at least one model to generate with"])
    if config.generate.max_new_tokens >= config.serve.max_model_len:
        raise ConfigError(["generate.max_new_tokens: leaves no room in serve.max_model_len"])
    serve = config.serve
    device = f"{serve.gpus_per_replica:g} GPU" if serve.gpus_per_replica else "no GPU"
    resources = (
        f"{len(config.models)} engines with {serve.cpus_per_replica:g} CPU and {device} each"
    )
    passes = 2 * len(config.models) * (1 + len(config.generate.seeds))
    seeds = f" and seeds {config.generate.seeds}" if config.generate.seeds else ""
    notes = (f"{passes} runs: base and adapter of each model, greedy{seeds}",)
    inputs = [ROUNDS, *(f"adapters/{model}" for model in config.models)]
    if not all(workspace.exists(name, "manifest.json") for name in inputs):
        return Plan(resources=resources, notes=notes)
    if workspace.is_done(ARTIFACT, _fingerprint(config, workspace)):
        return Plan(done=True)
    files = workspace.parquet_files(ROUNDS)
    rounds = sum(
        pq.ParquetFile(f, filesystem=workspace.filesystem).metadata.num_rows for f in files
    )
    return Plan(rounds, resources=resources, notes=notes)


def run(config: Config, workspace: Workspace) -> Mapping[str, Any]:
    """Predict every test round with every run; returns the manifest of `predictions/`.

    Raises UserError, after everything is written, when too many rounds got no reply.
    """
    from milm_ray.serving.running import running_models

    fingerprint = _fingerprint(config, workspace)
    if finished(workspace, ARTIFACT, fingerprint):
        return workspace.manifest(ARTIFACT)
    started = time.time()
    bases = prepared_bases(config, workspace)
    wanted = runs(config, workspace, bases)
    args = app_args(config, workspace, bases)
    log.info("generate | starts %d engines; this takes a while", len(args.models))
    with running_models(args) as base_url:
        serving_s = round(time.time() - started, 1)
        log.info("generate | endpoints at %s after %.0f s", base_url, serving_s)
        tally = _write(workspace, predict(config, workspace, wanted, base_url))
    settings = {"generate": config.generate.model_dump(), "serve": config.serve.model_dump()}
    if tally.rejected > MAX_REJECT_RATE * tally.rows:
        raise UserError(
            f"{tally.rejected} of {tally.rows} rounds got no reply ({dict(tally.reasons)})",
            f"see {REJECTED}/ for the reasons; run the same command again to ask for them anew",
        )
    return workspace.commit(
        ARTIFACT,
        stage="generate",
        settings=settings,
        fingerprint=fingerprint,
        counts=tally.counts(),
        started=started,
        runs=tally.by_run(),
        start_up_s=serving_s,
    )


class _Tally:
    """What is counted while predictions go by."""

    def __init__(self) -> None:
        self.rows = 0
        self.rejected = 0
        self.reasons: Counter[str] = Counter()
        self._totals: dict[str, Counter[str]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        if row["failure"]:
            self.rejected += 1
            self.reasons[row["failure"]] += 1
            return
        run = f"{row['model']}/{row['variant']}/{row['sampling']}"
        self._totals.setdefault(run, Counter()).update(
            predictions=1,
            empty=int(not row["text"].strip()),
            cut_at_max_new_tokens=int(row["finish_reason"] == "length"),
            prompts_shortened=int(row["dropped_rounds"] > 0),
            dropped_rounds=row["dropped_rounds"],
            prompt_tokens=row["prompt_tokens"] or 0,
            completion_tokens=row["completion_tokens"] or 0,
        )

    def by_run(self) -> dict[str, dict[str, int]]:
        return {run: dict(counts) for run, counts in sorted(self._totals.items())}

    def counts(self) -> dict[str, Any]:
        whole: Counter[str] = sum(self._totals.values(), Counter())
        named = ("empty", "cut_at_max_new_tokens", "prompts_shortened", "dropped_rounds")
        return {
            "rows": self.rows - self.rejected,
            "rejected": self.rejected,
            "rejected_by_reason": dict(self.reasons),
            **{name: whole[name] for name in named},
            "prompt_tokens": whole["prompt_tokens"],
            "completion_tokens": whole["completion_tokens"],
        }


def _write(workspace: Workspace, outcomes: Iterator[pa.Table]) -> _Tally:
    """Write predictions and rejects as they come; memory holds one file's rows at most."""
    workspace.clear(ARTIFACT)
    workspace.clear(REJECTED)
    tally, files, waiting = _Tally(), 0, []
    for table in outcomes:
        rows = table.to_pylist()
        for row in rows:
            tally.add(row)
        waiting += [row for row in rows if not row["failure"]]
        lost = [_reject(row).row() for row in rows if row["failure"]]
        if lost:
            part = f"part-{tally.rows:08d}.parquet"
            workspace.write_table(pa.Table.from_pylist(lost, REJECTS), REJECTED, part)
        if len(waiting) >= _ROWS_PER_FILE:
            files = _flush(workspace, waiting, files)
            waiting = []
    _flush(workspace, waiting, files)
    return tally


def _flush(workspace: Workspace, rows: list[dict[str, Any]], number: int) -> int:
    table = pa.Table.from_pylist(rows, PREDICTIONS)
    workspace.write_table(table, ARTIFACT, f"part-{number:05d}.parquet")
    return number + 1


def _reject(row: Mapping[str, Any]) -> Reject:
    return Reject(
        stage="generate",
        reason=row["failure"],
        source_id=f"{row['model']}/{row['variant']}/{row['sampling']}, round {row['round_index']}",
        dialogue_id=row["dialogue_id"],
        detail=row["detail"],
    )


STAGE = Stage("generate", plan, run, check_paths=("models",))

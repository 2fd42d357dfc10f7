"""One model's Ray Train run: its workers, its checkpoints, and what comes back."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from milm_ray import metrics
from milm_ray.errors import UserError
from milm_ray.finetune.bases import Source
from milm_ray.finetune.train import ADAPTER_DIR, Task, train
from milm_ray.models.chat_format import TEMPLATE_FILE, template
from milm_ray.workspace import Workspace

# Checkpoints that stay beside a finished run; the last one is the finished state.
_KEPT = 2
_BOARD = "tensorboard"
_BEAT_S = 30.0  # far below the time limit of a collective operation
_T = TypeVar("_T")


@dataclass(frozen=True)
class Outcome:
    """counts and log of a finished run, and the directory of its last checkpoint."""

    counts: dict[str, Any]
    log: list[dict[str, Any]]
    checkpoint: Any

    def write_adapter(self, workspace: Workspace, artifact: str, chat_format: str) -> None:
        """Put the adapter and its chat template in the place of what the artifact held."""
        workspace.clear(artifact)
        with self.checkpoint.as_directory() as directory:
            for file in sorted((Path(directory) / ADAPTER_DIR).iterdir()):
                workspace.write_bytes(file.read_bytes(), artifact, file.name)
        workspace.write_text(template(chat_format), artifact, TEMPLATE_FILE)


def fit(task: Task, source: Source, workspace: str, table: str, run_name: str) -> Outcome:
    """Train one model on the cluster; blocks until it is done.

    workspace, table: where the rows are, of schema.MI_DIALOGUES or, for finetune.method: dpo,
    schema.PREFERENCES; task.adapter is then an artifact of the workspace. run_name: directory under
    checkpoints/; a run of the same name that was interrupted is taken up where it was.
    Raises UserError for what a user can put right.
    """
    _quicken()
    from ray.exceptions import RayError
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
    )
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    settings = task.settings
    gpus = settings.gpus_per_worker
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    place = Workspace.open(workspace)
    trainer = _trainer_class()(
        _worker,
        train_loop_config={
            "task": task,
            "source": source,
            "workspace": workspace,
            "table": table,
            "run_name": run_name,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers_per_model,
            use_gpu=gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=place.path("checkpoints"),
            storage_filesystem=place.filesystem,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=_KEPT),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )
    try:
        result = trainer.fit()
    except (TrainingFailedError, RayError) as error:
        raise UserError(
            f"fine-tuning {task.model} failed: {_root_cause(error)}",
            "run the same command again; it goes on from the last checkpoint",
        ) from error
    value = result.return_value
    if "cause" in value:
        raise UserError(value["cause"], value["fix"])
    return Outcome(value["counts"], value["log"], result.checkpoint)


def _is_local() -> bool:
    """Whether the cluster is the driver's own, which ends with it."""
    return not os.environ.get("RAY_ADDRESS")


def _quicken() -> None:
    """Ray Train's switches, read when a run starts."""
    # Three runs that import torch at once on a small machine can need more than its minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    # Its print goes to the terminal and to its log, which goes to the terminal.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if _is_local():
        # One process less per model: nothing preempts a node of a local cluster.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def _trainer_class() -> Any:
    """TorchTrainer without the actors that these runs do not need: the one that hands out Ray
    datasets (the workers read their table themselves) and, on a local cluster, the one that frees
    placement groups after the driver's death: there the cluster dies with the driver, and the
    actor asks a dashboard that is not running."""
    from ray.train import torch as ray_torch
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    trainer: Any = ray_torch.TorchTrainer
    unneeded: tuple[type, ...] = (DatasetsCallback,)
    if _is_local():
        unneeded += (PlacementGroupCleanerCallback,)

    class LeanTrainer(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if not isinstance(callback, unneeded)]

    return LeanTrainer


def _root_cause(error: BaseException) -> str:
    """The worker's own error, if the failure carries one; its last line says what happened."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else error
    lines = [line for line in str(inner).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(inner).__name__


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a run does. Errors a user can act on are returned, not raised: Ray Train
    would start the workers again, to the same end."""
    # TRL would tell the hub that its trainer was started.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # transformers would import scikit-learn, scipy and pandas for a decoding method not used here:
    # a third of a worker's start-up. To find no scikit-learn is a case it provides for.
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]
    import ray.train
    import torch
    import transformers
    from ray.train.v2._internal.execution import context as train_context

    from milm_ray.finetune import memory
    from milm_ray.finetune.engine import Diverged
    from milm_ray.models.checkpoint import architecture

    # This logger bears its file's name, so that the run's log level does not reach it.
    logging.getLogger(train_context.__file__).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    task: Task = config["task"]
    torch.set_num_threads(max(1, int(task.settings.cpus_per_worker)))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    context = ray.train.get_context()
    rank = context.get_world_rank()
    try:
        source: Source = config["source"]
        memory.check_weights(
            task.model,
            _together(lambda: architecture(source.name_or_path, source.revision)),
            task.settings,
            context.get_world_size(),
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        base = _prepared(source, context.get_local_rank())
        place = config["workspace"]
        workspace = Workspace.open(place)
        rows = workspace.read_table(config["table"]).to_pylist()
        adapter = _fetched(workspace, task.adapter) if task.adapter else ""
        ready = replace(task, base=str(base), adapter=adapter)
        checkpoint = ray.train.get_checkpoint()
        # Event files are appended to, which object stores do not do; log.parquet is everywhere.
        events = None if "://" in place else Path(place, "checkpoints", config["run_name"], _BOARD)
        run = _Run(ready, rows, rank, context.get_world_size(), events)
        if checkpoint is None:
            return run(None)
        with checkpoint.as_directory() as directory:
            return run(Path(directory))
    except UserError as error:
        return {"cause": f"{task.model}: {error.cause}", "fix": error.fix}
    except Diverged as error:
        return {
            "cause": f"{task.model}: {error.what} in the batch of {', '.join(error.names)}",
            "fix": "look at these samples; lower finetune.learning_rate or raise "
            "finetune.warmup_ratio",
        }


@dataclass(frozen=True)
class _Run:
    task: Task
    rows: list[dict[str, Any]]
    rank: int
    workers: int
    events: Path | None

    def __call__(self, resume: Path | None) -> dict[str, Any]:
        loop: Callable[..., dict[str, Any]] = train
        if self.task.settings.method == "dpo":
            from milm_ray.finetune.dpo import tune

            loop = tune
        return loop(
            self.task,
            self.rows,
            rank=self.rank,
            workers=self.workers,
            save=_report,
            resume=resume,
            say=lambda text: print(f"finetune {self.task.model} | {text}", flush=True),
            record=_recorder(self.events),
        )


def _recorder(directory: Path | None) -> Callable[[dict[str, Any]], None]:
    """Hands log rows to Prometheus and, where there is a directory for them, to TensorBoard."""
    from tensorboardX import SummaryWriter

    board: list[Any] = []

    def record(row: dict[str, Any]) -> None:
        for name in ("step", "loss", "learning_rate", "grad_norm", "tokens_per_s"):
            if row.get(name) is not None:
                metrics.gauge(f"milm_train_{name}", row[name], model=row["model"])
        if directory is None:
            return
        if not board:
            board.append(SummaryWriter(str(directory), purge_step=row["step"]))
        for name, value in row.items():
            if name not in ("model", "step") and value is not None:
                kind, plain = ("eval", "loss") if name == "eval_loss" else ("train", name)
                board[0].add_scalar(f"{kind}/{plain}", value, row["step"])
        board[0].flush()

    return record


def _report(step: int, write: Callable[[Path], None]) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory))
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step}, checkpoint=checkpoint)


def _fetched(workspace: Workspace, artifact: str) -> str:
    """An adapter of the workspace as a directory of this node."""
    if isinstance(workspace.filesystem, pafs.LocalFileSystem):
        return workspace.path(artifact)
    target = tempfile.mkdtemp()
    pafs.copy_files(workspace.path(artifact), target, workspace.filesystem, pafs.LocalFileSystem())
    return target


def _prepared(source: Source, local_rank: int) -> Path:
    """The base in its native layout; one worker of a node prepares it, the others wait."""
    from milm_ray.models.checkpoint import prepare_base

    def prepare() -> Path:
        return prepare_base(
            source.name_or_path, source.revision, source.directory, source.chat_format
        )

    if local_rank == 0:
        _together(prepare)
    else:
        _together(lambda: None)
    return prepare()


def _together(action: Callable[[], _T]) -> _T:
    """What the action returns, once all workers have done theirs, be it hours (a base that one of
    them downloads); a UserError of one is raised on all, so that none waits for another."""
    from torch import distributed

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(action)
        states: list[Any] = [(False, None)] * distributed.get_world_size()
        while not all(done for done, _ in states):
            wait([acting], _BEAT_S)
            done = acting.done()
            error = acting.exception() if done else None
            if error is not None and not isinstance(error, UserError):
                raise error
            failure = (error.cause, error.fix) if error else None
            distributed.all_gather_object(states, (done, failure))
    for _, found in states:
        if found:
            raise UserError(*found)
    return acting.result()

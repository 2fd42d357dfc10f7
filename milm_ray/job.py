"""What every job shares: the command line, the plan, the Ray session, messages and exit codes.

A stage is a name, a `plan` (cheap, writes nothing) and a `run` (idempotent, returns a manifest).
`jobs/<name>.py` hands one stage to `main`; `jobs/pipeline.py` hands all of them.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from milm_ray import logs
from milm_ray.config import Config, load_config
from milm_ray.errors import EXIT_FAILED, ConfigError, UserError
from milm_ray.nodes import check_reach
from milm_ray.workspace import Workspace

log = logging.getLogger("milm_ray")
# Ray's words; it has no type of error for it. The second is a head's of its control service.
_SLOW_START = ("timed out during startup", "Timed out waiting for file")


@dataclass(frozen=True)
class Plan:
    """What a stage is about to do, so far as it can be known before the stages ahead of it ran.

    rows: input rows; llm_calls: replies asked for that the store does not hold; tokens are
    estimates; cost in USD, None where no price is known.
    """

    rows: int | None = None
    llm_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    resources: str = "CPU"
    done: bool = False
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        if self.done:
            return ["already done"]
        rows = "not known yet" if self.rows is None else f"{self.rows:,}"
        lines = [f"rows: {rows}", f"resources: {self.resources}"]
        if self.llm_calls:
            cost = "unknown price" if self.cost is None else f"about ${self.cost:,.2f}"
            lines.append(
                f"LLM calls: {self.llm_calls:,}; about {self.prompt_tokens:,} prompt and "
                f"{self.completion_tokens:,} completion tokens; {cost}"
            )
        return [*lines, *self.notes]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    check_paths: the config sections whose input paths it reads; chat_formats: the names that it
    accepts as a model's chat format, None where it renders no dialogue. around: opens what
    neighbouring stages with the same `around` share (engines that take minutes to start); it is
    entered before the first of them and left after the last.
    """

    name: str
    plan: Callable[[Config, Workspace], Plan]
    run: Callable[[Config, Workspace], Mapping[str, Any]]
    check_paths: Sequence[str] = field(default=())
    chat_formats: Collection[str] | None = None
    uses_ray: bool = True
    around: Callable[[], AbstractContextManager[Any]] | None = None


def main(description: str, stages: Sequence[Stage], argv: Sequence[str] | None = None) -> int:
    """Run stages in order as a command; returns the exit code.

    --config FILE [section.key=value …] [--dry-run]. Nothing is written and Ray is not started
    before the configuration and every input path have been checked.
    """
    options = _arguments(description, argv)
    _end_on_sigterm()
    try:
        wanted = {section for stage in stages for section in stage.check_paths}
        formats = next((s.chat_formats for s in stages if s.chat_formats is not None), None)
        config = load_config(options.config, options.override, sorted(wanted), formats)
        logs.set_up(config.ray.log)
        workspace = Workspace.open(config.workspace)
        plans = _plans(stages, config, workspace)
        log.info("workspace: %s", workspace.uri)
        for stage, plan in plans:
            for line in plan.lines():
                log.info("plan %s | %s", stage.name, line)
        if options.dry_run:
            log.info("dry run: nothing was done")
            return 0
        if any(stage.uses_ray and not plan.done for stage, plan in plans):
            connect(config)
        numbered = list(enumerate(stages, 1))
        for around, neighbours in itertools.groupby(numbered, lambda pair: pair[1].around):
            with around() if around else nullcontext():
                for number, stage in neighbours:
                    _run_stage(stage, config, workspace, f"[{number}/{len(stages)}]")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return 0


def _plans(
    stages: Sequence[Stage], config: Config, workspace: Workspace
) -> list[tuple[Stage, Plan]]:
    """Each stage with its plan.

    What a stage needs may be half removed, or of an older configuration, while one ahead of it is
    still to make it anew. Its plan is then not known yet; what is still missing after that, its
    `run` says.
    """
    plans: list[tuple[Stage, Plan]] = []
    for stage in stages:
        try:
            plan = stage.plan(config, workspace)
        except UserError as error:
            if isinstance(error, ConfigError) or all(ahead.done for _, ahead in plans):
                raise
            plan = Plan(notes=(f"not known before the stages ahead of it ran: {error.cause}",))
        plans.append((stage, plan))
    return plans


def _run_stage(stage: Stage, config: Config, workspace: Workspace, where: str) -> None:
    started = time.time()
    logs.enter_stage(stage.name)
    log.info("%s %s | start", where, stage.name)
    manifest = stage.run(config, workspace)
    log.info(
        "%s %s | done in %.1f s: %s",
        where,
        stage.name,
        time.time() - started,
        _totals(manifest["counts"]),
    )


def _totals(counts: Mapping[str, Any]) -> str:
    """The plain numbers of a manifest's counts; the breakdowns are in the manifest itself."""
    plain = {key: value for key, value in counts.items() if isinstance(value, int | float)}
    return ", ".join(f"{key} {value:,}" for key, value in plain.items())


def _arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see jobs/configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument(
        "override", nargs="*", metavar="section.key=value", help="override one value"
    )
    return parser.parse_intermixed_args(argv)


def connect(config: Config) -> None:
    """Join the cluster named by RAY_ADDRESS (as in a submitted job), or start a local one.

    Raises UserError where a node of the cluster does not reach the workspace.
    """
    # All are read when Ray is imported. With RAY_DEDUP_LOGS Ray takes the progress lines of models
    # that train side by side for repetitions and swallows them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "0" if sys.stdout.isatty() else "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no escape codes in a job's log
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", log_to_driver=True, logging_level=logging.WARNING)
        _end_on_sigterm()  # Ray has just set its own
        check_reach(Workspace.open(config.workspace))
        return
    start_ray(num_cpus=config.ray.num_cpus, include_dashboard=config.ray.dashboard)
    _end_on_sigterm()


def start_ray(**options: Any) -> Any:
    """`ray.init` of a local cluster; a start that takes longer than Ray waits is tried again."""
    import ray

    def start() -> Any:
        return ray.init(address="local", logging_level=logging.WARNING, **options)

    return started(start, ray.shutdown)


def started(start: Callable[[], Any], clear: Callable[[], Any]) -> Any:
    """What `start` starts of Ray; at most twice `clear` and again, where Ray was too slow for its
    own limit."""
    for last in (False, False, True):
        try:
            return start()
        except Exception as error:
            if last or not any(words in str(error) for words in _SLOW_START):
                raise
            # What `clear` leaves of it ends with this process.
            log.warning("Ray did not start within its 30 s; the machine is slow, trying again")
            clear()


def _end_on_sigterm() -> None:
    """On SIGTERM (`ray job stop`, a pod's end) say so as the last line, and end at once.

    Nothing is waited for: SIGKILL follows within seconds, and a run goes on from what it has
    written however it ended. What runs on the cluster for this job ends with its driver.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stopped)


def _stopped(_signal: int, _frame: FrameType | None) -> None:
    os.write(2, b"stopped; run the same command again to resume\n")
    os._exit(EXIT_FAILED)


def finished(workspace: Workspace, artifact: str, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a stage's artifact is there and current; says so, since the stage will be skipped."""
    done = workspace.is_done(artifact, fingerprint)
    if done:
        log.info("%s/ is up to date; nothing to do", artifact)
    return done

"""The one configuration: a pydantic model per section, unknown keys refused, all errors at once.

A file is YAML; `section.key=value` arguments override it; `${NAME}` and `${NAME:-default}` in a
string are environment variables. Values the paper states are marked *paper*; the ones it leaves
unstated carry their source.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from milm_ray.errors import ConfigError
from milm_ray.schema import VARIANTS, Variant
from milm_ray.section import Section, input_path
from milm_ray.serve_settings import AccessSection, ChatSection, ServeSection
from milm_ray.study_settings import MitiSection, SimulateSection

CORPORA = ("cpsycound", "psydtcorpus", "smilechat", "efaqa", "psy_insight", "annomi")
CorpusName = Literal["cpsycound", "psydtcorpus", "smilechat", "efaqa", "psy_insight", "annomi"]
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]


def _known_chat_format(value: str, info: ValidationInfo) -> str:
    """A chat format that the job knows, where it says which it does (see load_config)."""
    known = (info.context or {}).get("chat_formats")
    if known is not None and value not in known:
        raise ValueError(f"no such chat format; known are {', '.join(sorted(known))}")
    return value


class RaySection(Section):
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a local cluster; None: all")
    dashboard: bool = Field(False, description="dashboard of a local cluster")
    log: Literal["text", "json"] = Field(
        "text", description="a job's log: for people, or a JSON object a line with job and stage"
    )


class CorpusSource(Section):
    path: Annotated[str, input_path("ingest")] = Field(
        description="directory, archive or file in the corpus's own layout"
    )
    limit: int | None = Field(
        None, ge=1, description="first N files, or first N records of a file that holds many"
    )


class IngestSection(Section):
    corpora: dict[CorpusName, CorpusSource] = Field(default_factory=dict)
    max_reject_rate: float = Field(
        0.5, ge=0, le=1, description="of a corpus, duplicates apart; above it the job fails"
    )
    near_duplicates: Literal["report", "drop", "off"] = Field(
        "report", description="list dialogues that are nearly an earlier one, or reject them too"
    )
    near_duplicate_similarity: float = Field(
        0.8, gt=0.5, le=1, description="Jaccard similarity of five-character shingles, estimated"
    )


class LLMSection(Section):
    """An LLM behind an OpenAI-compatible endpoint. The key is read from the environment only."""

    model: str = "gpt-4"
    base_url: str | None = Field(None, description="None: OPENAI_BASE_URL or api.openai.com")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="the variable that holds the key; '': the server needs none"
    )
    offline: bool = Field(
        False, description="answer from recorded replies only; a miss is an error"
    )
    recorded: list[Annotated[str, input_path("llm")]] = Field(
        default_factory=list, description="reply stores to read beside the workspace's own"
    )
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, description="None: not sent; OpenAI's own API has none")
    max_tokens: int = Field(4096, ge=1)
    seed: int | None = None
    structured_output: bool = Field(True, description="ask for JSON by schema where it is offered")
    concurrency: int = Field(16, ge=1, description="requests in flight, over the whole cluster")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    timeout_s: float = Field(120.0, gt=0)
    max_attempts: int = Field(6, ge=1)
    max_cost: float | None = Field(None, gt=0, description="stop before spending more, in USD")
    prompt_price: float | None = Field(
        None, ge=0, description="USD per million tokens; None: the list of milm_ray/llm/prices.py"
    )
    completion_price: float | None = Field(None, ge=0, description="as prompt_price")


class CurateSection(Section):
    per_corpus: int = Field(50, ge=1, description="dialogues judged per corpus (paper: 50)")
    select: int = Field(2, ge=1, description="corpora kept (paper: two)")
    scale: Literal["fraction", "turn", "dialogue"] = Field(
        "fraction",
        description="total used for ranking: mean fraction of each maximum, or raw totals",
    )
    pool: Literal["all", "recorded"] = Field(
        "all", description="recorded: sample among dialogues whose verdict is in the reply store"
    )
    max_reject_rate: float = Field(0.2, ge=0, le=1)


class TranscribeSection(Section):
    per_corpus: dict[CorpusName, int] = Field(
        default_factory=dict,
        description="dialogues per selected corpus (paper: 1,520 + 520); empty: all there are",
    )
    pool: Literal["all", "recorded"] = "all"
    min_rounds: int = Field(3, ge=1)
    max_rounds: int = Field(20, ge=1)
    preserve_rounds: bool = Field(False, description="reject a reply with another round count")
    require_target: bool = Field(
        False, description="transcribe only dialogues with a recognised target behaviour"
    )
    max_reject_rate: float = Field(0.2, ge=0, le=1)


class SplitSection(Section):
    test_dialogues: int = Field(40, ge=1, description="paper: 40 of 2,040")


class AugmentSection(Section):
    """Copies of training dialogues, after the split (the paper's future work). Off by default."""

    synonyms: int = Field(0, ge=0, description="copies of each dialogue with words replaced")
    synonym_rate: float = Field(
        0.3, gt=0, le=1, description="chance of a word that has synonyms to be replaced"
    )
    paraphrases: int = Field(0, ge=0, description="copies reworded by the teacher")


class ModelSection(Section):
    path: Annotated[str, input_path("models")] | None = Field(
        None, description="checkpoint directory; None: the hub id of `hub_id`"
    )
    hub_id: str | None = None
    revision: str | None = Field(None, description="commit, tag or branch of `hub_id`")
    chat_format: Annotated[str, AfterValidator(_known_chat_format)] = Field(
        description="a format of milm_ray/models/chat_format.py"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give either path or hub_id")
        if self.hub_id and not self.revision:
            raise ValueError(
                f"{self.hub_id} is not pinned: add revision: <commit id>, from "
                f"https://huggingface.co/{self.hub_id}/commits/main"
            )
        return self


class LoraSection(Section):
    """Unstated in the paper: LLaMA-Factory's defaults."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class DpoSection(Section):
    """Preference tuning, finetune.method: dpo; what is not here is as in fine-tuning."""

    beta: float = Field(0.1, gt=0, description="how closely to keep to the adapter; TRL's default")
    learning_rate: float = Field(5e-6, gt=0, description="LLaMA-Factory's DPO example")
    epochs: float = Field(3.0, gt=0, description="LLaMA-Factory's DPO example")


class FinetuneSection(Section):
    method: Literal["sft", "dpo"] = Field(
        "sft", description="dpo: go on from the adapters, by the pairs of preferences/"
    )
    learning_rate: float = Field(1e-4, gt=0, description="paper")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="paper: cosine")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="paper")
    batch_size: int = Field(1, ge=1, description="dialogues per device and micro-step (paper: 1)")
    gradient_accumulation: int = Field(8, ge=1, description="paper")
    epochs: float = Field(3.0, gt=0, description="paper")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="paper: bf16")
    logging_steps: int = Field(10, ge=1, description="paper")
    save_steps: int = Field(500, ge=1, description="paper")
    cutoff: int = Field(2048, ge=16, description="tokens; LLaMA-Factory's default")
    unit: Literal["dialogue", "round"] = Field(
        "dialogue",
        description="sample: a dialogue with loss on every counselor turn, or one of its rounds",
    )
    pack_tokens: int = Field(
        8192, ge=1, description="tokens per forward pass; changes speed and memory, not gradients"
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="layers computed twice, to keep less (LLaMA-Factory: always); null: only where "
        "memory would not do otherwise; changes speed and memory, not gradients",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="LLaMA-Factory's default")
    weight_decay: float = Field(0.0, ge=0, description="LLaMA-Factory's default")
    lora: LoraSection = LoraSection()
    dpo: DpoSection = DpoSection()
    eval_share: float = Field(
        0.0, ge=0, lt=1, description="of the dialogues, held out; LLaMA-Factory's val_size"
    )
    eval_steps: int = Field(
        500, ge=1, description="steps between two held-out losses; LLaMA-Factory's LoRA example"
    )
    zero_stage: Literal[0, 2, 3] = 2
    offload: bool = Field(False, description="optimizer state to CPU memory")
    workers_per_model: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(1.0, ge=0)
    max_failures: int = Field(3, ge=0)


class GenerateSection(Section):
    variants: list[Variant] = Field(
        list(VARIANTS), min_length=1, description="who replies; dpo: where there is such an adapter"
    )
    max_new_tokens: int = Field(512, ge=1)
    seeds: list[int] = Field(default_factory=list, description="sampled runs beside greedy")
    temperature: float = Field(0.95, ge=0, description="of sampled runs; LLaMA-Factory's default")
    top_p: float = Field(0.7, gt=0, le=1, description="of sampled runs; LLaMA-Factory's default")
    top_k: int | None = Field(50, ge=1, description="of sampled runs; LLaMA-Factory's default")
    concurrency: int = Field(64, ge=1)


class PreferencesSection(Section):
    """Pairs of replies for finetune.method: dpo, ranked by the judge."""

    rounds: int = Field(500, ge=1, description="training rounds to reply to")
    seeds: list[int] = Field(
        [1, 2, 3, 4], min_length=2, description="replies per round; sampled as in `generate`"
    )
    both_orders: bool = Field(
        True, description="rank each round's replies in two orders; only what both say makes a pair"
    )
    max_reject_rate: float = Field(0.5, ge=0, le=1, description="of rounds without a pair")


class ScoreSection(Section):
    bootstrap: int = Field(2000, ge=100, description="resamples by dialogue")


class Config(Section):
    workspace: str = Field("", description="local or shared path; default runs/<config name>")
    seed: int = 42
    ray: RaySection = RaySection()
    ingest: IngestSection = IngestSection()
    judge: LLMSection = LLMSection(temperature=0.0, max_tokens=512)
    curate: CurateSection = CurateSection()
    teacher: LLMSection = LLMSection()
    transcribe: TranscribeSection = TranscribeSection()
    split: SplitSection = SplitSection()
    augment: AugmentSection = AugmentSection()
    models: dict[ModelName, ModelSection] = Field(default_factory=dict)
    finetune: FinetuneSection = FinetuneSection()
    serve: ServeSection = ServeSection()
    generate: GenerateSection = GenerateSection()
    preferences: PreferencesSection = PreferencesSection()
    score: ScoreSection = ScoreSection()
    access: AccessSection = AccessSection()
    chat: ChatSection = ChatSection()
    client: LLMSection = LLMSection(temperature=0.9, max_tokens=512)
    simulate: SimulateSection = SimulateSection()
    coder: LLMSection = LLMSection(temperature=0.0, max_tokens=4096)
    miti: MitiSection = MitiSection()


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _expand(value: Any, where: str, problems: list[str]) -> Any:
    """Replace ${NAME} and ${NAME:-default} in every string; an unset NAME is a problem."""
    if isinstance(value, dict):
        return {
            k: _expand(v, f"{where}.{k}" if where else str(k), problems) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_expand(v, f"{where}[{i}]", problems) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if name in os.environ:
            return os.environ[name]
        if default is None:
            problems.append(f"{where}: the environment variable {name} is not set")
            return match.group(0)
        return default

    return _VARIABLE.sub(substitute, value)


def _override(data: dict[str, Any], assignment: str, problems: list[str]) -> None:
    """Apply one `section.key=value`; the value is read as YAML."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        problems.append(f"{assignment!r}: expected section.key=value")
        return
    *parents, last = path.split(".")
    node: Any = data
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            problems.append(f"{path}: {parent} is not a section")
            return
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"{path}: the value is not YAML ({str(error).splitlines()[0]})")


def _siblings(location: Sequence[str | int]) -> Iterable[str]:
    """The keys that the section at `location` knows, for a hint at a misspelt one."""
    model: Any = Config
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ()
        known = model.model_fields.get(str(part))
        model = known.annotation if known else None
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()


def _describe(error: Any) -> str:
    """One pydantic error as one line: where, what, and a hint at the key that was meant."""
    location = error["loc"]
    where = ".".join(str(part) for part in location) or "the file"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), list(_siblings(location[:-1])), 1)
        return f"{where}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = (
        "" if isinstance(given, dict | list) or "no such file" in message else f" (got {given!r})"
    )
    return f"{where}: {message}{shown}"


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    check_paths: Sequence[str] = (),
    chat_formats: Collection[str] | None = None,
) -> Config:
    """Read and validate a configuration.

    path: the YAML file; overrides: `section.key=value`; check_paths: the sections ("ingest", "llm",
    "miti", "models") whose input paths the job will read and that must therefore exist;
    chat_formats: the names that models may give, None: any.
    Raises ConfigError with every problem at once; writes nothing.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError([f"--config: no such file: {path}"]) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"--config: {path} cannot be read as YAML: {error}"]) from None
    if not isinstance(data, dict):
        raise ConfigError([f"--config: {path} must hold sections, not a {type(data).__name__}"])

    problems: list[str] = []
    for assignment in overrides:
        _override(data, assignment, problems)
    data = _expand(data, "", problems)
    if not data.get("workspace"):
        data["workspace"] = f"runs/{path.stem}"
    try:
        context = {"check_paths": tuple(check_paths), "chat_formats": chat_formats}
        config = Config.model_validate(data, context=context)
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
    if problems:
        raise ConfigError(problems)
    return config

"""Settings of the live service: the models, who may use them, the chat, its safety check.

They are sections of a job's configuration, and arguments of the Serve apps in serve_config.yaml.
"""

from __future__ import annotations

from datetime import date
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from milm_ray.section import Section

Category = Literal[
    "suicide",
    "self_harm",
    "violence",
    "abuse",
    "minors",
    "medical_emergency",
    "psychosis",
    "eating_disorder",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)


class HelpLine(Section):
    """A number to call. Hours differ by city and year: none are stated, so none can be wrong."""

    number: str = Field(pattern=r"^[0-9][0-9 -]{2,19}$", description="as it is dialled")
    name_zh: str = Field(min_length=1)
    name_en: str = Field(min_length=1)
    categories: list[Category] = Field(
        default_factory=list, description="shown for these; empty: for all"
    )
    minors_first: bool = Field(False, description="named first when the client may be a minor")
    checked_on: date = Field(description="day on which the entry was last checked")


def default_help_lines() -> list[HelpLine]:
    """China's national lines. 12356 was checked against public notices on the day given; the others
    are long-standing emergency and youth lines, entered that day. None was dialled: whoever deploys
    this calls them, and re-dates the entries."""
    checked = date(2026, 11, 25)
    body: list[Category] = ["medical_emergency", "eating_disorder"]
    mind: list[Category] = ["suicide", "self_harm", "psychosis"]
    harm: list[Category] = ["violence", "abuse", "minors"]
    return [
        HelpLine(
            number="12356",
            name_zh="全国统一心理援助热线",
            name_en="national psychological aid line",
            categories=[*mind, *harm, "eating_disorder"],
            checked_on=checked,
        ),
        HelpLine(
            number="120",
            name_zh="医疗急救",
            name_en="ambulance",
            categories=[*mind, *body],
            checked_on=checked,
        ),
        HelpLine(
            number="110",
            name_zh="报警求助",
            name_en="police",
            categories=["suicide", *harm],
            checked_on=checked,
        ),
        HelpLine(
            number="12355",
            name_zh="青少年服务台",
            name_en="youth line",
            categories=["minors"],
            minors_first=True,
            checked_on=checked,
        ),
    ]


class SafetyConfig(Section):
    """The safety check before and after generation."""

    help_lines: list[HelpLine] = Field(default_factory=default_help_lines, min_length=1)
    check_again_after_days: int = Field(
        180, ge=1, description="a help line checked longer ago is reported as stale at start-up"
    )
    classifier_medium: float = Field(
        0.75, gt=0, le=1, description="the classifier's P(risk) from which a turn is medium"
    )
    classifier_high: float = Field(
        0.55, gt=0, le=1, description="the classifier's P(high risk) from which a turn is high"
    )
    log_text: bool = Field(
        False, description="put the client's words into the record of an intervention"
    )

    def stale_lines(self, today: date) -> list[HelpLine]:
        """The help lines whose check is older than `check_again_after_days`."""
        return [
            line
            for line in self.help_lines
            if (today - line.checked_on).days > self.check_again_after_days
        ]


class ServeSection(Section):
    """The model endpoints used by `generate` and by `make serve`."""

    max_model_len: int = Field(4096, ge=128)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    cpus_per_replica: float = Field(
        1.0, gt=0, description="reserved; without a GPU also the threads of the engine"
    )
    gpus_per_replica: float = Field(1.0, ge=0)
    replicas: int = Field(1, ge=1, description="engines per model")
    engine: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine options")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the replicas")


class AccessSection(Section):
    """Who may call the endpoints and the chat."""

    host: str = Field("127.0.0.1", description="address that `make serve` listens on")
    keys_file: str | None = Field(
        None,
        description="API keys, made by `python jobs/keys.py add NAME`, on a path that every node "
        "sees; None: no keys, and only this machine is answered",
    )


class TakeoverSection(Section):
    """The webhook by which a human is called when the check finds high risk."""

    url: str | None = Field(None, pattern=r"^https?://", description="None: nobody is called")
    token_env: str = Field(
        "MILM_TAKEOVER_TOKEN", description="the variable that holds the hook's bearer token, if any"
    )
    timeout_s: float = Field(10.0, gt=0)
    max_attempts: int = Field(8, ge=1, description="with growing pauses, then it is given up")


class SecondOpinionSection(Section):
    """A language model that is asked about risk beside the rules and the classifier.

    It can raise the level, never lower it. Off by default: how much it finds depends on the model
    and has to be measured by whoever turns it on.
    """

    model: str | None = Field(None, description="an id at chat.models_url; None: nobody is asked")
    timeout_s: float = Field(5.0, gt=0, description="then the chat goes on without it")


class ChatSection(Section):
    """The live chat. Sampling is the default of LLaMA-Factory's own chat, the paper's tool."""

    study: bool = Field(
        False, description="blind study: model, topic and motivation are assigned, names hidden"
    )
    models: list[str] = Field(
        default_factory=list, description="ids offered or assigned; empty: all that are served"
    )
    seed: int = Field(42, description="of the assignment")
    models_url: str = Field(
        "http://127.0.0.1:8000/v1",
        pattern=r"^https?://",
        description="the model endpoints, or any other OpenAI-compatible server",
    )
    models_key_env: str = Field(
        "MILM_API_KEY", description="the variable that holds the chat's key to the endpoints"
    )
    database: str | None = Field(
        None,
        description="sqlite:///PATH or postgresql://USER@HOST/NAME; None: SQLite in the workspace",
    )
    database_env: str = Field(
        "MILM_DATABASE_URL", description="a variable that, when set, holds the database's URL"
    )
    replicas: int = Field(1, ge=1, description="on several nodes only with PostgreSQL")
    num_cpus: float = Field(0.1, ge=0)
    temperature: float = Field(0.95, ge=0, le=2)
    top_p: float = Field(0.7, gt=0, le=1)
    max_tokens: int = Field(512, ge=1, description="of a reply")
    reply_timeout_s: float = Field(120.0, gt=0, description="without a new token")
    max_attempts: int = Field(
        9,
        ge=1,
        description="for one reply, when the endpoints fail; with growing pauses these take 47 s, "
        "and Ray Serve replaces a proxy that died after about 30",
    )
    max_replies: int = Field(
        256, ge=1, description="written at a time by a replica; beyond it: 503 with Retry-After"
    )
    max_message_chars: int = Field(2000, ge=1)
    max_rounds: int = Field(60, ge=1, description="of a session; then it is ended")
    max_sessions_per_person: int = Field(100, ge=1)
    safety: SafetyConfig = SafetyConfig()
    second_opinion: SecondOpinionSection = SecondOpinionSection()
    takeover: TakeoverSection = TakeoverSection()

    @field_validator("database")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        if url is None:
            return url
        parts = urlsplit(url)
        if parts.scheme not in ("sqlite", "postgresql"):
            raise ValueError("give sqlite:///PATH or postgresql://USER@HOST/NAME")
        if parts.password:
            raise ValueError("no password here: put the whole URL into MILM_DATABASE_URL instead")
        return url

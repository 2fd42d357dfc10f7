"""Settings of the safety check: thresholds, help lines, what is logged."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, model_validator

from milm_ray.config import Section

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
CATEGORIES: tuple[Category, ...] = (
    "suicide",
    "self_harm",
    "violence",
    "abuse",
    "minors",
    "medical_emergency",
    "psychosis",
    "eating_disorder",
)


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
        0.60, gt=0, le=1, description="P(risk) from which a turn without a rule hit is medium"
    )
    classifier_high: float = Field(
        0.90, gt=0, le=1, description="P(high risk) from which a turn without a rule hit is high"
    )
    log_text: bool = Field(
        False, description="put the client's words into the record of an intervention"
    )

    @model_validator(mode="after")
    def _ordered(self) -> SafetyConfig:
        if self.classifier_high < self.classifier_medium:
            raise ValueError("classifier_high must not be below classifier_medium")
        return self

    def stale_lines(self, today: date) -> list[HelpLine]:
        """The help lines whose check is older than `check_again_after_days`."""
        return [
            line
            for line in self.help_lines
            if (today - line.checked_on).days > self.check_again_after_days
        ]

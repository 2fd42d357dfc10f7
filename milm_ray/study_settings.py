"""Settings of the MITI study: the simulated sessions, and who is coded by whom."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from milm_ray.section import Section, input_path


class SimulateSection(Section):
    """Sessions of simulated clients with the MI-LLMs. `client` is the model that plays them."""

    simulator: Literal["llm", "scripted"] = Field(
        "llm", description="scripted: the state model with shipped lines, no language model"
    )
    sessions: int = Field(10, ge=1, description="per model and variant (paper: 10)")
    variants: list[Literal["adapter", "base", "dpo"]] = Field(
        ["adapter"], description="paper: the MI-LLMs only; dpo: tuned further on preferences"
    )
    max_rounds: int = Field(20, ge=1, description="a session that its client does not end")
    decoding: Literal["sampled", "greedy"] = Field(
        "sampled", description="of the counselor; sampled: as generate's sampled runs"
    )
    concurrency: int = Field(16, ge=1, description="sessions at a time")
    max_reject_rate: float = Field(0.2, ge=0, le=1)


class MitiSection(Section):
    """The MITI study: who is coded, by whom, and what is compared."""

    annomi: Annotated[str, input_path("miti", "file")] | None = Field(
        None, description="AnnoMI-full.csv for the group of real dialogues; None: no such group"
    )
    annomi_dialogues: int = Field(30, ge=1, description="paper: 30")
    annomi_quality: Literal["high", "any"] = Field(
        "high", description="the paper does not say that it left out low-quality dialogues"
    )
    coders: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]] = Field(
        ["coder-1", "coder-2"], description="people; a sheet is made for each"
    )
    sheets: Annotated[str, input_path("miti", "directory")] | None = Field(
        None,
        description="directory of coded sheets; None: `sheets/` in the workspace, if it exists",
    )
    automatic: list[Literal["trained", "llm"]] = Field(
        ["trained"], description="automatic coders beside people's codes; `coder` is the llm"
    )
    resamples: int = Field(2000, ge=100, description="of the intervals")
    paper_cells: Annotated[str, input_path("miti", "file")] | None = Field(
        None, description="CSV of the paper's cells (table, group, variable, mean, …): docs/miti.md"
    )

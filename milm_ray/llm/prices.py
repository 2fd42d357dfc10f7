"""What tokens cost, with the month each price is of. A model that is not here has no price.

The figures come from public pages, not from bills. Prices change and providers differ:
`prompt_price` and `completion_price` of the configuration come first, and an unknown price stays
unknown rather than zero.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from milm_ray.config import LLMSection


@dataclass(frozen=True)
class Price:
    """USD per million tokens; `as_of` is the month that the list price is of."""

    prompt: float
    completion: float
    as_of: str

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD for so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


# OpenAI's public list, without discounts for caching or batches.
PRICES: dict[str, Price] = {
    "gpt-4": Price(30.0, 60.0, "2024-08"),
    "gpt-4-0613": Price(30.0, 60.0, "2024-08"),
    "gpt-4-turbo": Price(10.0, 30.0, "2024-08"),
    "gpt-4o": Price(2.5, 10.0, "2026-04"),
    "gpt-4o-mini": Price(0.15, 0.60, "2026-04"),
    "gpt-4.1": Price(2.0, 8.0, "2026-04"),
    "gpt-4.1-mini": Price(0.40, 1.60, "2026-04"),
    "gpt-5": Price(1.25, 10.0, "2026-03"),
    "gpt-5-mini": Price(0.25, 2.0, "2026-03"),
}


def price_of(settings: LLMSection) -> Price | None:
    """The price of the configured model: as configured, else as listed, else None."""
    if settings.prompt_price is not None and settings.completion_price is not None:
        return Price(settings.prompt_price, settings.completion_price, "configuration")
    # The list is the provider's own; the same name at another address may cost anything.
    address = settings.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com"
    if settings.offline or urlsplit(address).hostname != "api.openai.com":
        return None
    return PRICES.get(settings.model)


def cost_of(
    price: Price | None, prompt_tokens: int | None, completion_tokens: int | None
) -> float | None:
    """USD of one reply, None where its price or its tokens are unknown."""
    if price is None or prompt_tokens is None or completion_tokens is None:
        return None
    return price.cost(prompt_tokens, completion_tokens)

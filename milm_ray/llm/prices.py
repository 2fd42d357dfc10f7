"""What tokens cost, with the day each price was looked up. A model that is not here has no price.

Prices change and providers differ: `prompt_price` and `completion_price` of the configuration come
first, and an unknown price stays unknown rather than zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from milm_ray.config import LLMSection


@dataclass(frozen=True)
class Price:
    """USD per million tokens; `checked` is the day on which the list price was read."""

    prompt: float
    completion: float
    checked: str

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD for so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


# Public list prices without discounts for caching or batches.
PRICES: dict[str, Price] = {
    "gpt-4": Price(30.0, 60.0, "2024-08-06"),
    "gpt-4-0613": Price(30.0, 60.0, "2024-08-06"),
    "gpt-4-turbo": Price(10.0, 30.0, "2024-08-06"),
    "gpt-4-turbo-2024-04-09": Price(10.0, 30.0, "2024-08-06"),
    "gpt-4o": Price(2.5, 10.0, "2024-12-01"),
    "gpt-4o-2024-08-06": Price(2.5, 10.0, "2024-12-01"),
    "gpt-4o-mini": Price(0.15, 0.60, "2024-12-01"),
    "gpt-4o-mini-2024-07-18": Price(0.15, 0.60, "2024-12-01"),
    "gpt-4.1": Price(2.0, 8.0, "2025-05-01"),
    "gpt-4.1-mini": Price(0.40, 1.60, "2025-05-01"),
}


def price_of(settings: LLMSection) -> Price | None:
    """The price of the configured model: as configured, else as listed, else None."""
    if settings.prompt_price is not None and settings.completion_price is not None:
        return Price(settings.prompt_price, settings.completion_price, "configuration")
    # A list price is the model's own provider's; another endpoint may charge anything.
    return PRICES.get(settings.model) if settings.base_url is None else None


def cost_of(
    price: Price | None, prompt_tokens: int | None, completion_tokens: int | None
) -> float | None:
    """USD of one reply, None where its price or its tokens are unknown."""
    if price is None or prompt_tokens is None or completion_tokens is None:
        return None
    return price.cost(prompt_tokens, completion_tokens)

"""How often codes were given, from a coder that says how probable each is: expected counts.

Counting a classifier's best guesses multiplies its leaning: a code that wins narrowly everywhere
is counted everywhere. Summing probabilities instead ("probabilistic classify and count"; Bella et
al. 2010, Forman 2008 on the bias of plain counting) lets errors of both kinds cancel, as far as the
probabilities are calibrated. Counts are then fractions, and belong to automatic coders only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike


def expected_in_volley(probabilities: Mapping[str, ArrayLike]) -> dict[str, float]:
    """How probable each code is in a volley, by the volley's rules.

    probabilities: by code, that each of the volley's utterances has it. Each code counts once, so
    it is the chance that any utterance has it (taken as independent); simple_reflection counts
    where there is a reflection and no complex one.
    """
    values = {code: np.asarray(each, float) for code, each in probabilities.items()}
    found = {code: _any(each) for code, each in values.items()}
    if "simple_reflection" in values and "complex_reflection" in values:
        reflected = values["simple_reflection"] + values["complex_reflection"]
        found["simple_reflection"] = max(0.0, _any(reflected) - found["complex_reflection"])
    return found


def _any(each: np.ndarray) -> float:
    return float(1 - np.prod(1 - np.clip(each, 0, 1)))


def expected_counts(volleys: Sequence[Mapping[str, ArrayLike]]) -> dict[str, float]:
    """Sums of `expected_in_volley` over a dialogue's counselor volleys."""
    total: dict[str, float] = {}
    for volley in volleys:
        for code, value in expected_in_volley(volley).items():
            total[code] = total.get(code, 0.0) + value
    return total

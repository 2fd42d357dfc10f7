"""What the trained English coder sees of an utterance: its words, its surroundings, a few marks.

A dialogue is coded when it is over, so an utterance is read with what the other speaker said before
and after it. Whether a reflection adds meaning shows in how much of it the client has just said,
and whether it was one at all in how the client goes on.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from milm_ray.miti.annomi import Session

if TYPE_CHECKING:
    from sklearn.pipeline import FeatureUnion

_WORD = re.compile(r"[\w']+")
_TOKENS = r"[\w']+|[?!…]"
_FILLERS = frozenset(
    _WORD.findall(
        "i you the a an and to of it that is in so but me my your are was have be not for on with "
        "this do just like know um uh yeah it's i'm that's don't you're what or at as if they he "
        "she we there then about well okay oh right mm hmm"
    )
)
_HEDGE = re.compile(
    r"\b(sounds? like|seems? like|feels? like|you feel|you're feeling|feeling|in other words|so you"
    r"|you're saying|you want|part of you|on (the )?one hand|what i('m| am) hear|i hear|i wonder"
    r"|it's like|as if|almost like|kind of like)\b"
)
_FEELING = re.compile(
    r"\b(feel\w*|frustrat\w*|scar\w*|worr\w*|angry|anger|sad\w*|hurt\w*|afraid|stress\w*|anxi\w*"
    r"|hope\w*|proud|guilt\w*|asham\w*|overwhelm\w*|important|values?|matters?|struggl\w*|torn"
    r"|stuck|hard|tough|confident|ready|committed|control|burden|lonely|upset|annoy\w*|tired"
    r"|love\w*|care)\b"
)
_YOU = frozenset(("you", "your", "you're", "you've"))
_I = frozenset(("i", "i'm", "my", "me", "i've"))


class Context(NamedTuple):
    """An utterance and its surroundings, in small letters; "" where there is nothing.

    before and after: the other speaker's volleys around it; earlier: its own speaker's volley
    before that; first and last: its place in its volley; place: 0 to 1 in the dialogue.
    """

    text: str
    before: str
    after: str
    earlier: str
    first: bool
    last: bool
    place: float


def contexts(session: Session) -> dict[int, Context]:
    """By the utterance's number."""
    volleys = [
        (" ".join(u.text for u in utterances).lower(), utterances)
        for _, utterances in session.volleys()
    ]
    said = ["", "", *(text for text, _ in volleys), ""]
    return {
        utterance.number: Context(
            utterance.text.lower(),
            said[k + 1],
            said[k + 3],
            said[k],
            n == 0,
            n == len(utterances) - 1,
            utterance.number / len(session.utterances),
        )
        for k, (_, utterances) in enumerate(volleys)
        for n, utterance in enumerate(utterances)
    }


def features() -> FeatureUnion:
    """Sequences of Context to sparse rows; fitted on training dialogues only."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion, Pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    around = {"token_pattern": _TOKENS, "sublinear_tf": True}
    parts = [
        ("words", TfidfVectorizer(preprocessor=_text, ngram_range=(1, 2), **around)),
        (
            "characters",
            TfidfVectorizer(
                preprocessor=_plain,
                analyzer="char_wb",
                ngram_range=(2, 4),
                min_df=3,
                sublinear_tf=True,
            ),
        ),
        ("before", TfidfVectorizer(preprocessor=_before, **around)),
        ("after", TfidfVectorizer(preprocessor=_after, ngram_range=(1, 2), min_df=2, **around)),
        (
            "marks",
            Pipeline([("count", FunctionTransformer(_marks)), ("scale", StandardScaler())]),
        ),
    ]
    weights = {"words": 1.0, "characters": 1.0, "before": 0.5, "after": 0.5, "marks": 0.2}
    return FeatureUnion(parts, transformer_weights=weights)


def _plain(context: Context) -> str:
    return context.text


def _text(context: Context) -> str:
    return f"bos {context.text} eos"  # so that word pairs tell how it opens and closes


def _before(context: Context) -> str:
    return context.before or "startofsession"


def _after(context: Context) -> str:
    return f"bos {context.after or 'endofsession'} eos"


def _marks(batch: Sequence[Context]) -> NDArray[np.float64]:
    """Lengths, questions, what is taken over from the other speaker, feelings, hedges, place."""
    return np.array([_mark(context) for context in batch])


def _mark(context: Context) -> list[float]:
    text, before, after = context.text, context.before, context.after
    words, heard = _WORD.findall(text), _WORD.findall(before)
    length, known = max(1, len(words)), set(heard)
    content = [word for word in words if word not in _FILLERS]
    taken = sum(word in known for word in content)
    pairs = set(itertools.pairwise(words))
    echoed = len(pairs & set(itertools.pairwise(heard)))
    return [
        np.log1p(len(words)),
        np.log1p(len(heard)),
        np.log1p(len(words)) - np.log1p(len(heard)),
        np.log1p(len(_WORD.findall(after))),
        np.log1p(len(_WORD.findall(context.earlier))),
        float(text.rstrip().endswith("?")),
        float("?" in text),
        float(text.count("?")),
        float(before.rstrip().endswith("?")),
        float("?" in after),
        taken / max(1, len(content)),
        np.log1p(taken),
        np.log1p(len(content) - taken),
        echoed / max(1, len(pairs)),
        float(context.first),
        float(context.last),
        context.place,
        float(len(_HEDGE.findall(text))),
        float(len(_FEELING.findall(text))),
        float(len(_FEELING.findall(before))),
        sum(word in _YOU for word in words) / length,
        sum(word in _I for word in words) / length,
        float(text.rstrip().endswith("-")),
        np.log1p(text.count(".")),
        np.log1p(text.count(",")),
    ]

"""A SentencePiece BPE model as a fast tokenizer.json that gives the same ids.

Works from the serialised model alone, so no tokenizer code of a hub repository runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from milm_ray.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_SPACE = "▁"


def fast_tokenizer(path: Path) -> Tokenizer:
    """The fast tokenizer of a tokenizer.model file.

    Ids equal SentencePiece's own, with two exceptions. `<s>` and the like are special tokens here,
    while SentencePiece reads them as text. Where the model puts a space before a text or strips
    spaces, the stretches between special tokens are texts of their own, as in Baichuan2's own chat
    code, which encodes the turns one by one. UserError if it is no BPE model.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise UserError(
            f"{path} is not a SentencePiece BPE model", "give the model's original file"
        )
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for _, _, kind in pieces),
        )
    )
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    for text, _, kind in pieces:
        # SentencePiece cuts user-defined pieces out first, as a fast tokenizer does added tokens.
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False)])
        elif kind == _USER_DEFINED:
            token = AddedToken(text, normalized=_SPACE in text, special=text.startswith("<"))
            tokenizer.add_tokens([token])
    return tokenizer


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best score first.

    SentencePiece joins any two neighbours whose union is a piece, by the piece's score.
    """
    mergeable = {text for text, _, kind in pieces if kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    score = {text: value for text, value, _ in pieces}
    rank = {text: index for index, (text, _, _) in enumerate(pieces)}
    merges = [
        (text[:cut], text[cut:])
        for text, _, kind in pieces
        if kind == _NORMAL
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
    merges.sort(key=lambda pair: (-score[pair[0] + pair[1]], rank[pair[0]], rank[pair[1]]))
    return merges

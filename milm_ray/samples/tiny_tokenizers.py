"""Tokenizers of the tiny base models, trained on the pre-training text in the real models' layouts.

tiny-llama3 and tiny-glm4 are byte-level BPE with the pre-tokenization rule of their originals and
share one set of merges, so a token keeps its embedding when one model starts from the other.
tiny-baichuan2 is a SentencePiece BPE with byte fallback and no leading space, its role tokens at
the ids of the real model (195 and 196).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE_LEVEL_SIZE = 4768
VOCAB_SIZE = 4800

# The splitting rule that Llama-3 and GLM-4 both take over from tiktoken's cl100k.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 27)),
]
GLM4_SPECIALS = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
]
BAICHUAN2_RESERVED = [
    *(f"<reserved_{n}>" for n in range(106)),
    *(f"<reserved_{n}>" for n in range(108, 194)),
    "<reserved_106>",
    "<reserved_107>",
]


def train_byte_level(texts: Iterable[str]) -> dict:
    """Byte-level BPE vocabulary and merges: the `model` section of a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_LEVEL_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def with_specials(trained: dict, specials: list[str], bos: str | None = None) -> Tokenizer:
    """The trained BPE with special tokens behind its vocabulary; bos, where given, opens a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, processors

    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos is None:
        tokenizer.post_processor = byte_level
    else:
        template = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    return tokenizer


def train_sentencepiece(texts: Iterable[str]) -> bytes:
    """A serialised SentencePiece BPE model of VOCAB_SIZE pieces, as Baichuan2's tokenizer.model."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=BAICHUAN2_RESERVED,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_sentencepiece(model: bytes, directory: Path) -> None:
    """Write tokenizer.model."""
    (directory / "tokenizer.model").write_bytes(model)

"""Chat formats: how a dialogue becomes the text and the token ids that a base model was taught.

One Jinja template per format, with `{% generation %}` marks around what the counselor says,
renders training, serving and batch prediction alike. Texts, ids and labels equal those of
LLaMA-Factory's templates of the same names (its data/template.py, data/processor/supervised.py).

What a person writes stays text: strings in a message that spell a special token are split by a
space inside the template itself, so nobody can open a turn from within a message, on any route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from milm_ray.errors import UserError

Message = Mapping[str, str]

IGNORE_INDEX = -100
TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant")

# Marks the generation blocks in a rendered text while it is cut up; dropped from contents.
_MARK = "\x00"


@dataclass(frozen=True)
class ChatFormat:
    """One format. Texts are template fragments; a round reads user, header, reply, reply_after.

    prefix: opens every dialogue. system, user: with `{}` where the content goes.
    header: opens the counselor's turn and is the generation prompt. reply: what the counselor's
    tokens are, with `{}`; it carries the loss. eos: the token that ends a reply.
    eos_in_text: the reply's text ends with eos; otherwise eos is only ever predicted (as the label
    of the token behind the reply) and stands once, at the end of a training dialogue.
    stops: tokens that end generation. guards: beginnings of special tokens, kept out of contents.
    reply_after: text behind a finished reply that carries no loss (ChatML's newline).
    """

    name: str
    prefix: str
    system: str
    user: str
    header: str
    reply: str
    eos: str
    eos_in_text: bool
    stops: tuple[str, ...]
    guards: tuple[str, ...]
    reply_after: str = ""


FORMATS: dict[str, ChatFormat] = {}


def register(chat_format: ChatFormat) -> ChatFormat:
    """Add a format under its name; a second one of the same name replaces the first."""
    FORMATS[chat_format.name] = chat_format
    _compiled.cache_clear()
    return chat_format


def get(model: str) -> ChatFormat:
    """The format of a name; UserError with the known names otherwise."""
    try:
        return FORMATS[model]
    except KeyError:
        known = ", ".join(sorted(FORMATS))
        raise UserError(f"unknown chat format {model!r}", f"use one of: {known}") from None


def template(model: str) -> str:
    """The Jinja template of a format, usable as a transformers or vLLM chat template."""
    fmt = get(model)
    clean = "text"
    for guard in fmt.guards:
        clean += f" | replace({_quote(guard)}, {_quote(guard[0] + ' ' + guard[1:])})"
    return "".join(
        [
            "{%- macro clean(text) -%}{{ " + clean + " }}{%- endmacro -%}",
            _filled(fmt.prefix),
            "{%- for message in messages -%}",
            "{%- set content = clean(message['content']) -%}",
            "{%- if message['role'] == 'system' and loop.first -%}",
            _filled(fmt.system),
            "{%- elif message['role'] == 'user' -%}",
            _filled(fmt.user),
            "{%- elif message['role'] == 'assistant' -%}",
            _filled(fmt.header),
            "{%- generation -%}" + _filled(fmt.reply) + "{%- endgeneration -%}",
            _filled(fmt.reply_after),
            "{%- else -%}",
            "{{- raise_exception('a message is system (first only), user or assistant, not '",
            " ~ message['role']) -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}" + _filled(fmt.header) + "{%- endif -%}",
        ]
    )


def stop_tokens(model: str) -> list[str]:
    """Tokens that end generation, the end-of-reply token first."""
    return list(get(model).stops)


def render(model: str, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Text of a dialogue in a model's format.

    model: a format's name (baichuan2, glm4, llama3). messages: role system (first only), user or
    assistant, with content. add_generation_prompt: open the counselor's turn at the end.
    """
    return "".join(_segments(model, messages, add_generation_prompt))


def encode_prompt(tokenizer: Any, model: str, messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue that waits for the counselor's reply."""
    text = render(model, messages, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_dialogue(
    tokenizer: Any, model: str, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Training ids and labels of a whole dialogue, both of the same length.

    labels[i] is the token to predict at place i from the ids before it (the usual shift is the
    loss's), and IGNORE_INDEX wherever no counselor speaks. They cover every counselor reply and its
    end token. Where the format keeps the end token out of the text, it is the label of the next
    turn's first token, and the dialogue closes with it, as in LLaMA-Factory.
    """
    fmt = get(model)
    eos = tokenizer.convert_tokens_to_ids(fmt.eos)
    input_ids: list[int] = []
    labels: list[int] = []
    for index, segment in enumerate(_segments(model, messages, False)):
        ids = list(tokenizer.encode(segment, add_special_tokens=False)) if segment else []
        spoken = index % 2 == 1
        if spoken:
            labels += ids
        elif ids:
            opens_after_reply = index > 0 and not fmt.eos_in_text
            labels += [eos if opens_after_reply else IGNORE_INDEX]
            labels += [IGNORE_INDEX] * (len(ids) - 1)
        input_ids += ids
    if not fmt.eos_in_text and messages and messages[-1]["role"] == "assistant":
        input_ids.append(eos)
        labels.append(eos)
    return input_ids, labels


def fit(
    tokenizer: Any, model: str, messages: Sequence[Message], max_tokens: int, *, training: bool
) -> tuple[list[Message], int]:
    """Drop the oldest rounds until a dialogue fits in max_tokens: (what is kept, rounds dropped).

    The system message and the newest round (for a prompt: the newest client turn) always stay, so
    the result may still be too long; the caller counts that. training: measured as
    encode_dialogue; otherwise as encode_prompt.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    starts = [index for index, message in enumerate(turns) if message["role"] == "user"] or [0]

    def length(kept: list[Message]) -> int:
        if training:
            return len(encode_dialogue(tokenizer, model, kept)[0])
        return len(encode_prompt(tokenizer, model, kept))

    for dropped, start in enumerate(starts):
        kept = system + turns[start:]
        if length(kept) <= max_tokens or start == starts[-1]:
            return kept, dropped
    raise AssertionError("the loop always returns at the newest round")


def save_chat_format(directory: str | Path, model: str) -> Path:
    """Write the format's template beside weights (chat_template.jinja); returns the file."""
    path = Path(directory) / TEMPLATE_FILE
    path.write_text(template(model), encoding="utf-8")
    return path


def _quote(text: str) -> str:
    """A Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _filled(fragment: str) -> str:
    """Jinja output of a fragment, `{}` replaced by the message's content."""
    if not fragment:
        return ""
    parts: list[str] = []
    for index, text in enumerate(fragment.split("{}")):
        if index:
            parts.append("content")
        if text:
            parts.append(_quote(text))
    return "{{- " + " ~ ".join(parts) + " -}}"


@cache
def _compiled(model: str) -> Any:
    """The compiled template, its generation blocks framed by _MARK."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}`, which transformers defines for its own labels."""

        tags = {"generation"}  # noqa: RUF012 - the base class declares it so

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_frame")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _frame(self, caller: Any) -> str:
            return f"{_MARK}{caller()}{_MARK}"

    def raise_exception(message: str) -> None:
        raise UserError(message, "alternate user and assistant after at most one system message")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template(model))


def _segments(model: str, messages: Sequence[Message], add_generation_prompt: bool) -> list[str]:
    """The rendered text cut at the generation blocks: odd places are what the counselor says."""
    plain = [
        {"role": message["role"], "content": message["content"].replace(_MARK, "")}
        for message in messages
    ]
    text = _compiled(model).render(messages=plain, add_generation_prompt=add_generation_prompt)
    return text.split(_MARK)


register(
    ChatFormat(
        name="baichuan2",
        prefix="",
        system="{}",
        user="<reserved_106>{}",
        header="<reserved_107>",
        reply="{}",
        eos="</s>",
        eos_in_text=False,
        stops=("</s>",),
        guards=("<reserved_", "<s>", "</s>", "<unk>"),
    )
)
register(
    ChatFormat(
        name="glm4",
        prefix="[gMASK]<sop>",
        system="<|system|>\n{}",
        user="<|user|>\n{}",
        header="<|assistant|>",
        # The newline is the model's own first token, in LLaMA-Factory as in the model's template.
        reply="\n{}",
        eos="<|endoftext|>",
        eos_in_text=False,
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        guards=("<|", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    )
)
register(
    ChatFormat(
        name="llama3",
        prefix="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        reply="{}<|eot_id|>",
        eos="<|eot_id|>",
        eos_in_text=True,
        stops=("<|eot_id|>", "<|end_of_text|>"),
        guards=("<|",),
    )
)

"""The model endpoints as their clients see them: the real openai client, real engines."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serving.conftest import Served, random_adapter

pytestmark = pytest.mark.slow
ASKED = [{"role": "user", "content": "你好，我想戒烟，可是很难。"}]
GREEDY = {"temperature": 0.0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def say(client: openai.OpenAI, model: str, **options: object) -> str:
    reply = client.chat.completions.create(model=model, messages=ASKED, **{**GREEDY, **options})
    assert reply.model == model
    return reply.choices[0].message.content


def test_every_base_and_adapter_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [
        "baichuan2",
        "baichuan2:mi",
        "glm4",
        "glm4:mi",
    ]
    assert client.models.retrieve("glm4:mi").id == "glm4:mi"


def test_an_adapter_answers_otherwise_than_its_base(client: openai.OpenAI) -> None:
    for model in ("baichuan2", "glm4"):
        base, adapter = say(client, model), say(client, f"{model}:mi")
        assert base
        assert adapter
        assert base != adapter


def reference(served: Served, name: str, *adapters: str) -> list[str]:
    """Greedy replies of transformers: the base's, then those with PEFT and each adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from milm_ray.models.chat_format import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(served.bases[name])
    ids = torch.tensor([encode_prompt(tokenizer, name, ASKED)])
    replies = []
    for adapter in (None, *adapters):
        base = AutoModelForCausalLM.from_pretrained(served.bases[name], dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter) if adapter else base
        reply = model.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=16,
            max_new_tokens=16,
            eos_token_id=[],
        )
        replies.append(tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True))
    return replies


def test_greedy_replies_are_those_of_transformers_and_peft(
    served: Served, client: openai.OpenAI
) -> None:
    """The engine's own kernels, fused layers and adapters against the reference, token by token."""
    for name in served.bases:
        expected = reference(served, name, served.workspace.path("adapters", name))
        assert [say(client, name), say(client, f"{name}:mi")] == expected


def test_an_adapter_of_embeddings_and_head_touches_no_other_request(
    served: Served, client: openai.OpenAI
) -> None:
    name, base = "baichuan2", served.bases["baichuan2"]
    target = served.workspace.local("adapters", name, "whole")
    random_adapter(base, target, name, seed=9, also=("embed_tokens", "lm_head"))
    expected = reference(served, name, str(target))
    say(client, f"{name}:whole")  # from here on it lies in a slot
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda id: say(client, id), [name, f"{name}:whole"] * 8))
    assert replies == expected * 8
    shutil.rmtree(target)


def test_base_requests_are_untouched_by_adapter_requests_beside_them(
    client: openai.OpenAI,
) -> None:
    """In one batch, rows of the base must not get the adapter's weights."""
    alone = {model: say(client, model, max_tokens=48) for model in ("glm4", "glm4:mi")}
    asked = ["glm4", "glm4:mi"] * 8
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda model: say(client, model, max_tokens=48), asked))
    assert together == [alone[model] for model in asked]


def test_a_stream_says_the_same_as_a_whole_reply(client: openai.OpenAI) -> None:
    whole = say(client, "glm4:mi")
    stream = client.chat.completions.create(
        model="glm4:mi",
        messages=ASKED,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert {chunk.model for chunk in chunks} == {"glm4:mi"}
    assert chunks[-1].usage.completion_tokens == 16


def test_completions_take_the_text_as_it_is(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="baichuan2", prompt="我觉得", **GREEDY)
    assert reply.choices[0].text
    assert reply.usage.completion_tokens == 16


def test_the_prompt_is_the_chat_format_s(served: Served, client: openai.OpenAI) -> None:
    """The endpoint measures the same tokens as the format that training used."""
    from transformers import AutoTokenizer

    from milm_ray.models.chat_format import encode_prompt

    for model, base in served.bases.items():
        ids = encode_prompt(AutoTokenizer.from_pretrained(base), model, ASKED)
        for endpoint in (model, f"{model}:mi"):
            reply = client.chat.completions.create(model=endpoint, messages=ASKED, **GREEDY)
            assert reply.usage.prompt_tokens == len(ids)


def test_generation_ends_at_the_format_s_stop_tokens(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="glm4", messages=ASKED, temperature=0, max_tokens=200
    )
    assert reply.choices[0].finish_reason == "stop"
    assert "<|" not in reply.choices[0].message.content


@pytest.mark.parametrize("model", ["gpt-4", "glm4:other", "glm4:../baichuan2", "glm4:"])
def test_an_unknown_model_is_404(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        say(client, model)
    assert "/v1/models" in error.value.message


def test_a_new_adapter_is_served_without_a_restart(served: Served, client: openai.OpenAI) -> None:
    target = served.workspace.local("adapters", "glm4", "second")
    with pytest.raises(openai.NotFoundError):
        say(client, "glm4:second")
    random_adapter(served.bases["glm4"], target, "glm4", seed=7)
    first = say(client, "glm4:second")
    assert "glm4:second" in [model.id for model in client.models.list()]
    assert first not in (say(client, "glm4"), say(client, "glm4:mi"))
    # Trained anew under the same name: the new weights answer, not those loaded before.
    shutil.rmtree(target)
    random_adapter(served.bases["glm4"], target, "glm4", seed=8)
    assert say(client, "glm4:second") != first
    shutil.rmtree(target)
    with pytest.raises(openai.NotFoundError):
        say(client, "glm4:second")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "doctor", "content": "x"}]}, "role"),
    ],
)
def test_a_wrong_request_is_400_and_says_what(
    client: openai.OpenAI, wrong: dict[str, object], named: str
) -> None:
    request = {"model": "glm4", "messages": ASKED, **wrong}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**request)
    assert named in error.value.message


def test_a_prompt_over_the_context_is_400_with_openai_s_code(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model="glm4",
                messages=[{"role": "user", "content": "你好" * 2000}],
                stream=stream,
            )
        assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": "glm4"}', b"null"])
def test_a_body_that_is_no_request_is_400(served: Served, body: bytes) -> None:
    assert post(served, body) == 400


def test_a_body_over_the_limit_is_413(served: Served) -> None:
    message = {"role": "user", "content": "x" * (1 << 21)}
    body = json.dumps({"model": "glm4", "messages": [message]}).encode()
    assert post(served, body) == 413


def post(served: Served, body: bytes) -> int:
    request = urllib.request.Request(
        f"{served.url}/chat/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        if not json.loads(error.read())["error"]["message"]:
            raise
        return error.code

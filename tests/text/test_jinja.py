"""The exported chat template, run by plain Transformers, gives the ids that metier serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from metier.errors import DataError
from metier.model.load import starter_path
from metier.records import Chat
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer
from tests.text.conftest import MakeTokenizer

SYSTEM = {"role": "system", "content": "Be short."}
ASK = {"role": "user", "content": "Is 'water' wet?\n\n  Say so; über 12345 \t日本 🙂"}
SAID = {"role": "assistant", "content": " Yes, it is "}
CHATS: dict[str, Chat] = {
    "one": [ASK],
    "system": [SYSTEM, ASK],
    "developer": [{"role": "developer", "content": "Be short."}, ASK],
    "empty": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    "blanks": [{"role": "user", "content": "  \n two \n"}],
    "markup": [{"role": "user", "content": "{{ bos_token }} {% raw %} \\n \" ' ### Answer:"}],
    "turns": [SYSTEM, ASK, SAID, {"role": "user", "content": "Why?"}],
}
TEXT = ("plain", "question-answer")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def plain_ids(renderer: Renderer, template: str, chat: Chat, directory: Path, **options: bool):
    renderer.tokenizer.save(directory, template)
    loaded = AutoTokenizer.from_pretrained(str(directory))
    options = {"add_generation_prompt": True, **options}
    return loaded.apply_chat_template(list(chat), return_dict=False, **options)


@pytest.fixture(params=["gpt2", "stories260k", "starter"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> Tokenizer:
    if request.param == "starter":
        return Tokenizer.load(starter_path())
    return make_tokenizer("small" if request.param == "gpt2" else request.param)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("template", TEXT)
def test_text_templates(tokenizer: Tokenizer, template: str, name: str, tmp_path: Path) -> None:
    renderer = Renderer(tokenizer, template)
    found = plain_ids(renderer, renderer.jinja()[0], CHATS[name], tmp_path)
    assert found == renderer.prompt(CHATS[name])


@pytest.mark.parametrize("template", TEXT)
def test_a_whole_chat_ends_as_it_was_trained(
    tokenizer: Tokenizer, template: str, tmp_path: Path
) -> None:
    renderer = Renderer(tokenizer, template)
    chat = [ASK, SAID]
    found = plain_ids(renderer, renderer.jinja()[0], chat, tmp_path, add_generation_prompt=False)
    assert found == list(renderer.example(chat).ids)


def test_a_mark_at_the_start_of_a_text_is_written_behind_the_bos_token(
    stories260k: Path, tmp_path: Path
) -> None:
    """Newer SentencePiece-like tokenizers mark a text only where nothing stands before it."""
    described = json.loads((stories260k / "tokenizer.json").read_text("utf-8"))
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    described |= {"normalizer": None, "pre_tokenizer": mark}
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    config = (stories260k / "tokenizer_config.json").read_text("utf-8")
    (tmp_path / "made" / "tokenizer_config.json").write_text(config, "utf-8")
    renderer = Renderer(Tokenizer.load(tmp_path / "made"), "plain")
    chat = [{"role": "user", "content": "Tom saw a dog"}]
    first, second = (plain_ids(renderer, one, chat, tmp_path) for one in renderer.jinja())
    assert first != renderer.prompt(chat)
    assert second == renderer.prompt(chat)


@pytest.mark.parametrize("name", ["one", "system", "blanks", "markup", "turns"])
def test_the_tokenizers_own_template(
    make_tokenizer: MakeTokenizer, name: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer("small", ("<|im_start|>", "<|im_end|>"), CHATML)
    renderer = Renderer(tokenizer, "chat")
    assert renderer.jinja() == (CHATML,)
    chat = [{**m, "content": m["content"].strip()} for m in CHATS[name]]
    assert plain_ids(renderer, CHATML, chat, tmp_path) == renderer.prompt(chat)


def test_a_template_without_bos_is_given_it(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    control = ("<|im_start|>", "<|im_end|>", "<s>")
    tokenizer = make_tokenizer("small", control, CHATML, bos_token="<s>")
    renderer = Renderer(tokenizer, "chat")
    (template,) = renderer.jinja()
    served = renderer.prompt(CHATS["system"])
    assert served[0] == tokenizer.bos_id
    assert plain_ids(renderer, template, CHATS["system"], tmp_path) == served
    assert plain_ids(renderer, CHATML, CHATS["system"], tmp_path) == served[1:]


def test_messages_of_tools_are_refused_by_both(tokenizer: Tokenizer, tmp_path: Path) -> None:
    renderer = Renderer(tokenizer, "plain")
    chat = [ASK, {"role": "tool", "content": "4"}]
    with pytest.raises(DataError):
        renderer.prompt(chat)
    with pytest.raises(Exception, match="cannot be written by this template"):
        plain_ids(renderer, renderer.jinja()[0], chat, tmp_path)


def test_what_no_template_can_say_differs(tmp_path: Path) -> None:
    """The control of these tests, and the reason why an export is proven on real prompts."""
    renderer = Renderer(Tokenizer.load(starter_path()), "question-answer")
    chat = [{"role": "user", "content": "What is <|eos|>?"}]
    assert plain_ids(renderer, renderer.jinja()[0], chat, tmp_path) != renderer.prompt(chat)

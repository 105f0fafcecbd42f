"""Messages are found in what the chat template makes of them, and nothing around them moves."""

import pytest
import tiny
import torch
from captum.attr import ShapleyValues

from captum_llm_ext import ChatInput, GenerationAttribution

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "bos and stripping": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | trim }} [/]"
        "{% endfor %}{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
    ),
    "system joined to the first user turn": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
        "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{% if loop.first and sys %}<<SYS>>{{ sys }}<</SYS>> {% endif %}{{ m.content }} [/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "tools": (
        "{% if tools %}{% for t in tools %}TOOL {{ t.function.name }}\n{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<image>{% endif %}"
        "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Dave lives in Austin. Where does he live?"},
    {"role": "assistant", "content": "In Austin."},
    {"role": "user", "content": " user: Dave?\n"},
]


def _tokenizer(name):
    tokenizer = tiny.byte_level()
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def _ids(tokenizer, messages=MESSAGES, **arguments):
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, **arguments
    )
    return list(found["input_ids"])


@pytest.mark.parametrize("unit", ["turn", "sentence", "word", "token"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_full_chat_is_what_the_template_makes(name, unit):
    tokenizer = _tokenizer(name)
    chat = ChatInput(MESSAGES, tokenizer, unit)
    assert list(chat.ids) == _ids(tokenizer)
    assert chat.ids[:2] != (1, 1)
    full = chat.render(
        torch.ones(1, chat.n_features, dtype=torch.bool), torch.Generator().manual_seed(0)
    )
    assert full[0].ids == chat.ids
    assert "".join(piece.text for piece in chat.pieces) == chat.text


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_the_messages_and_the_template_is_fixed(name):
    tokenizer = _tokenizer(name)
    chat = ChatInput(MESSAGES, tokenizer)
    assert [slot.text.strip() for slot in chat.slots] == [
        MESSAGES[i]["content"].strip() for i in (0, 1, 3)
    ]
    assert [n.split(":")[0] for n in chat.names] == ["system", "user", "user"]
    empty = chat.render(
        torch.zeros(1, chat.n_features, dtype=torch.bool), torch.Generator().manual_seed(0)
    )[0]
    text = tokenizer.decode(list(empty.ids))
    assert "Be brief" not in text
    assert "Where" not in text
    assert "In Austin." in text  # the assistant's own turn


def test_words_within_turns_and_turns_as_a_level(model):
    tokenizer = _tokenizer("chatml")
    chat = ChatInput(MESSAGES[:2], tokenizer, "word", roles=("user",))
    assert chat.names == ["Dave", " lives", " in", " Austin.", " Where", " does", " he", " live?"]
    result = GenerationAttribution(ShapleyValues(model), tokenizer).attribute(
        chat, " golf", output_unit=None
    )
    parts, attr = result.at_level("turn")
    assert parts == ["user: Dave lives in Austin. Where does he live?"]
    torch.testing.assert_close(
        attr[:, 0], result.full_values - result.empty_values, atol=1e-5, rtol=0
    )
    nested = ChatInput(MESSAGES, tokenizer, ("sentence", "word"))
    assert [level.name for level in nested.levels] == ["turn", "sentence"]


def test_tools_are_fixed_and_parts_of_messages_are_found():
    tokenizer = _tokenizer("tools")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "tool", "content": "A cat."},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    chat = ChatInput(messages, tokenizer, roles=("user", "tool"), tools=tools)
    assert [slot.text.strip() for slot in chat.slots] == ["What is it?", "A cat."]
    assert chat.text.startswith("TOOL look")
    assert list(chat.ids) == _ids(tokenizer, messages, tools=tools)
    assert messages[0]["content"][1]["text"] == "What is it?"


def test_a_message_that_reads_like_the_template_is_found_where_it_stands():
    tokenizer = _tokenizer("tools")
    messages = [{"role": "user", "content": "user"}, {"role": "user", "content": "user"}]
    chat = ChatInput(messages, tokenizer)
    assert [slot.stop for slot in chat.slots] == [10, 20]


@pytest.mark.parametrize(
    ("messages", "arguments", "error", "message"),
    [
        ("hello", {}, TypeError, "`messages` is a str"),
        ([{"content": "x"}], {}, TypeError, "message 0 is"),
        (
            MESSAGES,
            {"roles": ("tool",)},
            ValueError,
            "the roles are .'assistant', 'system', 'user'",
        ),
        ([{"role": "user", "content": " "}], {}, ValueError, "has no text"),
        ([{"role": "user", "content": None}], {}, ValueError, "has no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, ValueError, "has no text"),
        (MESSAGES, {"unit": "phrase"}, ValueError, "unknown unit 'phrase'"),
    ],
)
def test_bad_chats(messages, arguments, error, message):
    with pytest.raises(error, match=message):
        ChatInput(messages, _tokenizer("chatml"), **arguments)


def test_templates_that_fail_or_hide_a_message():
    tokenizer = tiny.byte_level()
    with pytest.raises(ValueError, match="chat template cannot render"):
        ChatInput(MESSAGES, tokenizer)  # it has no template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        ChatInput(MESSAGES, tokenizer)
    for hiding in ("{{ messages[0].content | upper }}", "{{ messages[0].content * 2 }}", "nothing"):
        tokenizer.chat_template = hiding
        with pytest.raises(ValueError, match=r"message 0 .* cannot be found"):
            ChatInput(MESSAGES[:1], tokenizer)
    with pytest.raises(TypeError, match="has no `apply_chat_template`"):
        ChatInput(MESSAGES, tiny.NoOffsets(tokenizer))


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_of_the_template_and_of_other_roles_are_fixed(name):
    chat = ChatInput(MESSAGES, _tokenizer(name), "token", roles=("user",))
    said = "".join(piece.text for piece in chat.pieces if piece.feature is not None)
    assert "".join(said.split()) == "".join("".join(MESSAGES[i]["content"].split()) for i in (1, 3))
    assert {piece.role for piece in chat.pieces if piece.feature is not None} == {"user"}

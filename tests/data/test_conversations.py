"""Records of all kinds become conversations, or are refused by their number."""

import json

import pytest

from opd_jax import data, sft
from opd_jax.data.prompts import records, sources
from opd_jax.data.prompts.conversations import Columns, conversation, reference
from opd_jax.errors import UserError
from opd_jax.models import tokenizers
from tests import tiny

USER = {"role": "user", "content": "Q?"}
REPLY = {"role": "assistant", "content": "A."}


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return str(path)


def lines(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        *((value, None) for value in (None, float("nan"), "", "  ", [None], [])),
        *((value, "7") for value in ("7", " 7\n", 7, ["7"], [7], '["7"]', "['7']")),
        ("[1, 2]", "[1, 2]"),  # an interval
        ("[7]", "[7]"),
        (1.5, "1.5"),
    ],
)
def test_a_reference_answer_is_read_or_missing(value, found):
    assert reference(value) == found


@pytest.mark.parametrize("value", [["1", "2"], {"value": 1}])
def test_an_answer_that_is_not_one_answer_is_refused(tmp_path, value):
    path = lines(tmp_path / "a.jsonl", {"prompt": "Q?", "answer": "1"}, {"prompt": "Q?", "answer": value})
    with pytest.raises(UserError, match="record 2 can't be used .*the answer is .*give one string or number"):
        sources.read_file(path)


@pytest.mark.parametrize("text", [json.dumps([USER]), str([USER])], ids=["JSON", "Python"])
def test_messages_that_a_cell_holds_as_text_are_messages(tmp_path, text):
    quoted = '"' + text.replace('"', '""') + '"'
    (found,) = sources.read_file(write(tmp_path / "a.csv", f"messages,answer\n{quoted},\n"))
    assert found == ([USER], None, None)


def test_messages_as_numpy_prints_them_are_refused_and_an_empty_cell_of_tools_is_none(tmp_path):
    printed = "[{'content': 'be brief', 'role': 'system'}\\n {'content': 'hi', 'role': 'user'}]"
    with pytest.raises(UserError, match="record 1 can't be used .*looks like a list of messages"):
        sources.read_file(write(tmp_path / "a.csv", f'messages\n"{printed}"\n'))
    (found,) = sources.read_file(write(tmp_path / "b.csv", "prompt,tools\nQ?,\n"))
    assert found.tools is None


def test_a_question_in_brackets_stays_a_question():
    for text in ("[1, 2, 3] sorted is", "[What is this?]", "[1, 2, 3]", '["cat", "dog"]'):
        assert conversation({"prompt": text}, Columns()).messages == [{"role": "user", "content": text}]


def test_parts_of_text_are_joined_and_an_image_is_refused():
    parts = [{"type": "text", "text": "Look: "}, {"type": "text", "text": "a cat."}]
    assert conversation({"messages": [USER | {"content": parts}]}, Columns()).text == "Look: a cat."
    with pytest.raises(TypeError, match="a part of type 'image_url', and only text can be read"):
        conversation({"messages": [USER | {"content": [{"type": "image_url"}]}]}, Columns())


def test_tools_and_their_calls_reach_the_chat_template(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": 1}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "I look."}
    told = {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "1", "at": "12:00"}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, asked, told], "tools": tools})
    (found,) = sources.read_file(path)
    assert found.tools == tools and found.messages[1] == asked
    assert found.messages[2] == {name: told[name] for name in told if name != "at"}
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{{ tools[0].function.name }}|{% for m in messages %}{{ m.role }}"
        "{% if m.tool_calls %}!{{ m.tool_calls[0].function.arguments.town }}"
        "{{ m.reasoning_content }}{% endif %}"
        "|{% endfor %}"
    )
    config = tiny.config(tmp_path, **{"data.path": path}).data
    prompts, _ = data.render([found], tokenizer, config)
    assert tokenizer.decode(prompts[0].ids) == "weather|user|assistant!1I look.|tool|"


def test_half_a_character_is_refused_by_its_record(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": "Explain: \\ud83d"}\n')
    with pytest.raises(UserError, match="record 2 can't be used .*half of a character, .* at position 9"):
        sources.read_file(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, ending):
    texts = {".jsonl": '{"prompt": "Q?"}\n', ".json": '[{"prompt": "Q?"}]', ".csv": "prompt\nQ?\n"}
    path = write(tmp_path / f"a{ending}", "\ufeff" + texts[ending])
    assert [found.text for found in sources.read_file(path)] == ["Q?"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "prompt,answer\nQ?,1\nTom has 3 apples, gives 2 away,1\n",
            "line 3 has 3 fields and the header has 2",
        ),
        ("prompt,answer\nQ?\n", "line 2 has 1 fields and the header has 2"),
        ("prompt,answer,answer\nQ?,1,2\n", "two columns are named 'answer'"),
    ],
)
def test_a_table_whose_rows_do_not_fit_its_header_is_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        records.read(write(tmp_path / "a.csv", text), "data.path")


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_deep_nesting_is_one_line(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", "[" * 100_000)
    with pytest.raises(UserError, match="is not JSON") as caught:
        records.read(path, "data.path")
    assert "\n" not in str(caught.value)


def exchanges(tmp_path, path, template=None, **overrides):
    """What SFT makes of a file: (train, heldout)."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    config = tiny.config(
        tmp_path, **{"data.path": path, "data.heldout": 0, "rollout.max_tokens": 40} | overrides
    )
    return sft.read(config, tokenizer, {tiny.END})[:2]


def test_replies_of_parts_and_a_blank_last_line_are_read_for_fine_tuning_too(tmp_path):
    reply = {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, reply]})
    with open(path, "a") as file:
        file.write("\n")
    ((exchange,), _) = exchanges(tmp_path, path)
    assert tiny.tokenizer().decode(exchange.response) == "Hello.<|im_end|>"


def test_conversations_that_differ_before_their_last_question_are_no_copies(tmp_path):
    rows = [
        {"messages": [USER | {"content": f"Topic {i}."}, REPLY, USER | {"content": "Continue"}, REPLY]}
        for i in range(24)
    ]
    train, heldout = exchanges(
        tmp_path, lines(tmp_path / "a.jsonl", *rows), **{"data.heldout": 5, "data.prompt_tokens": 80}
    )
    assert (len(train), len(heldout)) == (19, 5)


@pytest.mark.parametrize(
    ("template", "reply", "said"),
    [
        (
            "{{ messages[-1].content.split('</think>')[-1] }}",
            "<think>x</think>A.",
            "leaves out a part of the reply",
        ),
        (None, "A.<|im_end|>B.", "an end token stands inside the reply"),
    ],
)
def test_a_reply_that_would_not_be_learnt_whole_is_refused(tmp_path, template, reply, said):
    path = lines(tmp_path / "a.jsonl", {"messages": [USER, {"role": "assistant", "content": reply}]})
    if template:
        template = (
            "{% if messages[-1].role == 'assistant' %}Q:" + template + "<|im_end|>{% else %}Q:{% endif %}"
        )
    with pytest.raises(UserError, match=f"record 1: .*{said}"):
        exchanges(tmp_path, path, template)


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + tiny.CHAT_TEMPLATE
)


def test_a_template_that_refuses_a_system_role_can_be_used_and_says_so_where_one_is_given(tmp_path):
    student, teacher = tiny.tokenizer(), tiny.tokenizer()
    student.chat_template = teacher.chat_template = NO_SYSTEM
    tokenizers.check_pair(student, teacher)
    teacher.chat_template = tiny.CHAT_TEMPLATE
    with pytest.raises(UserError, match="the chat template renders None for the student"):
        tokenizers.check_pair(student, teacher)
    path = lines(tmp_path / "a.jsonl", {"prompt": "Q?"})
    config = tiny.config(
        tmp_path, **{"data.path": path, "data.heldout": 0, "data.system_prompt": "Be brief."}
    )
    with pytest.raises(UserError, match=r"record 1: .*roles system, user \(System role not supported\)"):
        data.load(config.data, student)


def test_a_template_that_is_broken_or_reaches_for_python_is_one_line(tmp_path):
    tokenizer = tiny.tokenizer()
    python = "{{ messages.__class__.__base__.__subclasses__() }}"
    for template in ("{% for", "{{ messages[9].content }}", "{{ 1 / 0 }}", python):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="here: the chat template refuses") as caught:
            tokenizers.render(tokenizer, [USER], "here")
        assert "\n" not in str(caught.value)

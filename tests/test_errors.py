"""The one error of a user's mistake."""

import pytest

from opd_jax import errors


def test_a_message_is_one_line_of_limited_length_that_keeps_its_start_and_its_remedy():
    message = str(errors.UserError("data.path: record 3 has\n" + "x" * 20_204 + "\u2028\n; fix it"))
    assert message.startswith("data.path: record 3 has xxx")
    assert message.endswith("xxx ; fix it")
    assert len(message) == errors.LONGEST
    assert len(message.splitlines()) == 1


def test_a_command_ends_with_a_message_of_limited_length(capsys):
    with pytest.raises(SystemExit) as ended:
        errors.fail(ValueError("y" * 20_204))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert (len(said), said.count("\n")) == (len("error: ") + errors.LONGEST + 1, 1)


def test_the_reason_of_a_file_that_cannot_be_opened_is_without_its_name():
    assert errors.reason(OSError(36, "File name too long", "x" * 5000)) == "File name too long"
    assert errors.reason(ValueError("one\ntwo")) == "one"
    assert errors.reason(ValueError()) == "ValueError"

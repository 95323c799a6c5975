"""JSON files of others: each way of being wrong is one message that names the file."""

import json
import re

import pytest

from dedistill.errors import UserError
from dedistill.io import json_files

WRONG = {
    "missing": (None, "No such file"),
    "empty": (b"", "Expecting value"),
    "cut": (b'{"a": [1, 2', "Expecting"),
    "another kind": (b"[1]", "an object was expected, not an array"),
    "null": (b"null", "an object was expected, not null"),
    "not text": (b'{"a": "\xff\xfe\xfa"}', "codec can't decode"),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "large": (b" " * 4096, "more than 0 MiB"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_table_is_named(tmp_path, monkeypatch, case):
    raw, reason = WRONG[case]
    file = tmp_path / "config.json"
    if raw is not None:
        file.write_bytes(raw)
    if case == "large":
        monkeypatch.setattr(json_files, "LARGEST", 1000)
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        json_files.read_object(file, "model.path", "fetch it again")
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert message.startswith("model.path: ") and message.endswith("; fetch it again")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        json_files.read_object(tmp_path)


def test_what_is_right_comes_back(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"ü": [1, None]}), encoding="utf-8")
    (tmp_path / "b.json").write_bytes("[1]".encode("utf-16"))  # json finds out the encoding itself
    assert json_files.read_object(tmp_path / "a.json") == {"ü": [1, None]}
    assert json_files.read_array(tmp_path / "b.json") == [1]
    with pytest.raises(UserError, match="an array was expected, not an object"):
        json_files.read_array(tmp_path / "a.json")


@pytest.mark.parametrize(("text", "reason"), [("[]", "an object was expected"), ("{", "Expecting"), ("[" * 99999, "deeply")])
def test_json_in_a_header_is_an_object_or_an_error_that_names_it(text, reason):
    with pytest.raises(UserError, match=f"facts of 'x' cannot be read as JSON: .*{reason}"):
        json_files.parse_object(text, "facts of 'x'")
    assert json_files.parse_object('{"a": 1}', "facts of 'x'") == {"a": 1}

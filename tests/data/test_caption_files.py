"""Captions from text and JSON: what counts as one caption, and what is refused."""

import json

import pytest

from dedistill.data.images.caption_files import BadCaption, captions_in


def read(content: str | bytes, kind: str = "txt", fields: tuple[str, ...] = (), split_lines: bool | None = None):
    data = content.encode() if isinstance(content, str) else content
    return captions_in(data, kind, fields=fields, split_lines=split_lines)


@pytest.mark.parametrize("kind", ["txt", "caption"])
@pytest.mark.parametrize(
    ("text", "split_lines", "expected"),
    [
        ("a cat", None, ("a cat",)),
        ("  a cat \r\n", None, ("a cat",)),
        ("a cat\na black cat on a mat\n", None, ("a cat", "a black cat on a mat")),
        ("a cat\r\na black cat\r\n", None, ("a cat", "a black cat")),
        ("first paragraph.\n\nsecond one.", None, ("first paragraph.\n\nsecond one.",)),
        ("first paragraph.\n \nsecond one.", True, ("first paragraph.", "second one.")),
        ("a cat\na dog", False, ("a cat\na dog",)),
        ("a cat\na cat\n", True, ("a cat",)),
        ("\n\n", None, ()),
        ("", False, ()),
        ("\ufeffcafé", None, ("café",)),
        ("a cat\n\ufeffa dog\n\u200b\n", True, ("a cat", "a dog")),
        (" \u200b\ufeff ", None, ()),
    ],
)
def test_text(kind, text, split_lines, expected):
    assert read(text, kind, split_lines=split_lines) == expected


@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        ({"caption": "long", "caption_short": "short", "url": "http://x"}, (), ("long", "short")),
        ({"captions": ["a", " b ", "a", ""]}, (), ("a", "b")),
        ({"caption": "x", "captions": ["x", "y"]}, (), ("x", "y")),
        ({"caption": None, "width": 3}, (), ()),
        ({"caption": "x", "blip": "y"}, ("blip",), ("y",)),
        ({"caption": "two\nlines"}, (), ("two\nlines",)),
    ],
)
def test_json(content, fields, expected):
    assert read(json.dumps(content), "json", fields) == expected


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        ("{", "json", "not JSON"),
        ('["a"]', "json", "expected a JSON object, found a list"),
        ('{"caption": 3}', "json", "'caption' holds a int"),
        ('{"captions": ["a", {}]}', "json", "'captions' holds a dict"),
        ('{"caption": "\\ud800"}', "json", "surrogate"),
        ('{"caption": ' + "[" * 200_000, "json", "not JSON"),
        ("café".encode("latin-1"), "txt", "not UTF-8: byte 0xe9 at offset 3"),
        ("a cat".encode("utf-16"), "txt", "not UTF-8: byte 0xff at offset 0"),
        ("a cat".encode("utf-16-be"), "txt", "NUL"),
        (b"x" * ((1 << 20) + 1), "txt", "the limit is"),
    ],
)
def test_refused(content, kind, reason):
    with pytest.raises(BadCaption, match=reason):
        read(content, kind)


@pytest.mark.parametrize("split_lines", [None, True])
@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_line_feeds_and_carriage_returns_end_a_line(sign, split_lines):
    whole = f"an owl{sign}on a branch"
    assert read(whole, split_lines=split_lines) == (whole,)
    assert read(f"{whole}\ran owl\r\nno owl", split_lines=split_lines) == (whole, "an owl", "no owl")


@pytest.mark.parametrize("answers", [["a fox", None, "a red fox"], [None, "a fox", "a red fox", None]])
def test_nulls_among_captions_are_passed_over(answers):
    assert read(json.dumps({"captions": answers, "caption": [None]}), "json") == ("a fox", "a red fox")

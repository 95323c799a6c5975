"""What messages and pages share: amounts of things in words."""

import pytest

from dedistill.errors import amount
from dedistill.report.pages import render


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ("group",), "0 groups"),
        (1, ("group",), "1 group"),
        (1234, ("image",), "1,234 images"),
        (1, ("tensor is", "tensors are"), "1 tensor is"),
        (2, ("tensor is", "tensors are"), "2 tensors are"),
    ],
)
def test_amounts_agree_with_their_words(number, words, text):
    assert amount(number, *words) == text


def test_templates_say_amounts_alike(tmp_path):
    (tmp_path / "t.j2").write_text('{{ 1 | amount("group") }}, {{ [1, 2] | length | amount("entry", "entries") }}')
    assert render("t.j2", tmp_path) == "1 group, 2 entries"

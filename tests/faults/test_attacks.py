"""The table of attacks counts tests that are there, and the document shows it."""

import re

import attacks
import campaign
import pytest


def test_every_kind_has_its_tests():
    for kind, places in attacks.KINDS.items():
        for file, pattern in places.items():
            tests = re.findall(r"^def test_(\w+)", (attacks.TESTS / file).read_text(), re.MULTILINE)
            assert any(re.search(pattern, f"test_{name}") for name in tests), (kind, file, pattern)


def test_the_document_shows_what_the_command_counted():
    text = attacks.DOCUMENT.read_text()
    rows = re.findall(r"^\| (.+) \| ([\d,]+) \|$", text.partition(attacks.HEADING)[2].partition("\n## ")[0], re.MULTILINE)
    counts = {kind: int(number.replace(",", "")) for kind, number in rows}
    assert [*counts] == [*attacks.KINDS, attacks.ALL]
    assert 0 < counts[attacks.ALL] <= sum(counts.values()) - counts[attacks.ALL]
    assert attacks.replaced(text, attacks.section(counts)) == text, "the rest is left as it is"


@pytest.mark.parametrize("text", ["# A\n\ntable\n\n## B\nb\n", "# A\n\n## Attacks, by kind\nstale\n\n## B\nb\n"])
def test_the_section_is_put_in_its_place_twice_the_same(text):
    once = attacks.replaced(text, attacks.section({"x": 1}))
    assert once.startswith("# A\n") and once.endswith("\n## B\nb\n") and "stale" not in once
    assert attacks.replaced(once, attacks.section({"x": 1})) == once


def test_the_campaign_leaves_what_was_written_by_hand(tmp_path):
    file = tmp_path / "reliability.md"
    file.write_text("# Old\n\n| a |\n\n## What a run reads\n\nby hand\n\n## More\nx\n")
    campaign.write([("fault", "1", "none", True)], "command", 60.0, file)
    text = file.read_text()
    assert "| fault | 1 | none |" in text and "| a |" not in text
    assert text.endswith("\n\n## What a run reads\n\nby hand\n\n## More\nx\n")

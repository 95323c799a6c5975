"""The ladder of reflow on digits: its page says what was measured, and what was found is found again."""

import json

import pytest

from dedistill.recipe import load_recipe
from dedistill.recipe.chain import load_chain
from lab.ladder.report import CLAIMS, OF_LOSSES, RESULTS, ROOT, figure, lines, loss_lines
from lab.ladder.study import Ladder

FOUND = json.loads(RESULTS.read_text())


def test_the_page_shows_the_committed_numbers():
    page = (ROOT / "docs" / "reflow.md").read_text()
    assert "\n".join(lines(FOUND)) in page and "python -m lab.ladder" in page
    assert "\n".join(loss_lines(json.loads(OF_LOSSES.read_text()))) in page and "python -m lab.ladder --losses" in page
    assert (ROOT / "docs" / "images" / "ladder.svg").read_text() == figure(FOUND) + "\n"


def test_the_same_ladder_as_a_chain():
    """Every stage's recipe is there, and each begins with what the one before leaves."""
    chain = load_chain(str(ROOT / "lab" / "ladder"))
    assert [stage.name for stage in chain.stages] == ["base", "pairs", "reflow", "pairs2", "onestep"]
    trained = [load_recipe(ROOT / "lab" / "ladder" / f"{name}.toml") for name in ("base", "reflow", "onestep")]
    assert [r.model.path for r in trained[1:]] == [f"{r.run.out}/model" for r in trained[:-1]]
    assert [r.data.path in stage.options for r, stage in zip(trained[1:], chain.stages[1::2])] == [True, True]


@pytest.mark.slow
def test_what_was_found_is_found_again(tmp_path):
    """A ladder of a seed that was never climbed keeps every promise that all committed seeds kept."""
    scores = Ladder(tmp_path / "ladder", 17).run()
    kept = [claim for claim in CLAIMS if all(map(claim.holds, FOUND["seeds"]))]
    assert len(kept) > len(CLAIMS) / 2 and [c.text for c in kept if not c.holds(scores)] == []

"""The scan of a data set: its numbers against numbers counted by hand, its duplicates against all pairs compared."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from dedistill.data.images.buckets import buckets_for
from dedistill.data.images.index import build_index
from dedistill.data.images.scan import scan, scan_lines
from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError
from dedistill.report.scan import write_scan_page

ROOT = Path(__file__).parent.parent.parent
HOSTILE = '<script>alert("x")</script>'


def save(path: Path, image: Image.Image, *captions: str, **options) -> None:
    image.save(path, **options)
    path.with_suffix(".txt").write_text("\n".join(captions))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two photographs, copies of them in another source (smaller and harder compressed), a flat image, two bad files."""
    root = tmp_path_factory.mktemp("data")
    photos, copies = root / "photos", root / "copies"
    photos.mkdir()
    copies.mkdir()
    china, flower = (Image.fromarray(a) for a in load_sample_images().images)
    save(photos / "china.png", china, "a temple", " ".join(["long"] * 30))
    save(photos / "flower.jpg", flower, "one two three", HOSTILE)
    save(photos / "crop.jpg", china.crop((0, 0, 300, 300)), "sky")
    (photos / "broken.jpg").write_bytes((photos / "flower.jpg").read_bytes()[:9000])
    (photos / "lonely & bare.png").write_bytes((photos / "china.png").read_bytes())
    save(copies / "c.jpg", china.resize((320, 214)), "four words of copy", quality=50)
    save(copies / "f.webp", flower.resize((500, 333)), "another")
    return [ImageSet(str(photos), missing_captions="quarantine"), ImageSet(str(copies))]


@pytest.fixture(scope="module")
def index(folders):
    return build_index(folders)


@pytest.fixture(scope="module")
def facts(index):
    return scan(index, resolutions=[256, 384])


def test_numbers(facts):
    photos, copies = facts["sources"]
    assert (photos["images"], photos["captions"], photos["several"], photos["left_out"]) == (3, 5, 2, 2)
    assert (photos["shortest"], photos["median"], photos["longest"]) == (1, 2, 30)
    assert (copies["images"], copies["captions"], copies["several"], copies["left_out"]) == (2, 2, 0, 0)
    assert facts["unit"] == "words"
    assert dict(facts["lengths"]) | {"under 8": 6, "16 to 31": 1} == dict(facts["lengths"])
    assert sum(count for _, count in facts["lengths"]) == 7


def test_sizes(facts):
    """Sides of a square of as many pixels: 523 twice, 300, 262 and 408."""
    assert {label: n for label, n in facts["sides"] if n} == {"256 to 383": 2, "384 to 511": 1, "512 to 767": 2}


def test_buckets(facts):
    """At 384 only the two photographs and the copy of 500 pixels are big enough, and the nearest bucket is 3:2."""
    for resolution in (256, 384):
        rows = facts["buckets"][resolution]
        assert sum(count for *_, count in rows) + facts["too_small"][resolution] == 5
        assert {(h, w) for h, w, _ in rows} <= set(buckets_for([resolution]))
    assert facts["too_small"][384] == 2 and [row[2] for row in facts["buckets"][384]] == [3]


def test_quarantine_and_captions(facts):
    reasons = dict(facts["quarantined"])
    assert reasons["photos/lonely & bare.png"] == "no caption" and "truncated" in reasons["photos/broken.jpg"]
    assert facts["one_sided"] == [["photos/flower.jpg", "no caption of more than 20 words"]]


def test_copies_and_crops_are_found(facts):
    groups = [{facts["names"][i] for i in group} for group in facts["near_duplicates"]]
    assert groups == [{"photos/china.png", "photos/crop.jpg", "copies/c.jpg"}, {"photos/flower.jpg", "copies/f.webp"}]


def test_tokens(index, tmp_path):
    """With a tokenizer, lengths are its own, the end mark counted."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "long": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    facts = scan(index, resolutions=[256], tokenizer=tmp_path)
    assert facts["unit"] == "tokens"
    assert [facts["sources"][0][key] for key in ("shortest", "median", "longest")] == [2, 3, 31]
    for wrong, message in ((tmp_path / "none", "is not a folder"), (ROOT / "docs", "no tokenizer can be read")):
        with pytest.raises(UserError, match=message):
            scan(index, resolutions=[256], tokenizer=wrong)


def test_page(index, facts, tmp_path):
    """Every image shown is in the folder, nothing leaves it, captions stay text."""
    page = write_scan_page(tmp_path, index, facts)
    html = page.read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)"', html)
    assert len(shown) == 5 + 5 and all((tmp_path / src).is_file() for src in shown)
    assert not re.search(r'(?:src|href)="(?!images/|data:,)', html)
    assert HOSTILE not in html and "&lt;script&gt;alert" in html
    assert "photos/lonely &amp; bare.png" in html and "image file is truncated" in html
    assert "no tokenizer was given" in html and "5 images that can be used" in " ".join(html.split())
    assert json.loads((tmp_path / "scan.json").read_text())["near_duplicates"] == facts["near_duplicates"]
    one = facts | {"near_duplicates": facts["near_duplicates"][:1]}
    text = " ".join(write_scan_page(tmp_path, index, one).read_text(encoding="utf-8").split())
    assert "1 group of near-duplicates.</p>" in text


def test_lines(facts):
    text = "\n".join(scan_lines(facts))
    assert "photos: 3 images, 5 captions (2 images have several), 2 left out; captions of 1 to 30 words, median 2" in text
    assert "photos/china.png = photos/crop.jpg = copies/c.jpg" in text and "too small: 2" in text
    assert "left out: photos/lonely & bare.png: no caption" in text
    one = facts | {"near_duplicates": facts["near_duplicates"][:1]}
    assert "near-duplicates: 1 group, 3 images" in scan_lines(one)


def tool(*arguments: str) -> int:
    before, sys.argv = sys.argv, ["scan_data", *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "tools" / "scan_data.py"), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = before
    return 0


def test_tool(folders, tmp_path, capsys):
    paths = [source.path for source in folders]
    assert tool(*paths, "--out", tmp_path / "scan", "--resolutions", "256") == 0
    out = capsys.readouterr()
    assert "near-duplicates: 2 groups, 5 images" in out.out and "done: " in out.err
    assert {p.name for p in (tmp_path / "scan").iterdir()} == {
        ".dedistill",
        "index.html",
        "index.jsonl",
        "scan.json",
        "images",
    }
    assert tool(paths[1], paths[1], "--resolutions", "256") == 0
    assert "copies-1: 2 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere",), "'nowhere' does not exist"), ((".", "--resolutions", "0"), "expects a whole number of at least 1")],
)
def test_tool_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert tool(*arguments) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err

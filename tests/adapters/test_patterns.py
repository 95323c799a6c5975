"""Name patterns: whole names, one dotted part per star, no prefixes."""

import pytest

from dedistill.adapters.targets import matching

LEAVES = ["norm1.linear", "attn.to_q", "attn.to_out.0", "ff.net.2"]
BLOCKS = [f"transformer_blocks.{i}.{leaf}" for i in range(12) for leaf in LEAVES]
SINGLES = [f"single_transformer_blocks.{i}.{leaf}" for i in range(12) for leaf in ("norm.linear", "attn.to_q", "proj_out")]
NAMES = [*BLOCKS, *SINGLES, "norm_out.linear", "proj_out"]


def starting(*prefixes: str) -> list[str]:
    return [name for name in NAMES if name.startswith(prefixes)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("transformer_blocks.1.**", starting("transformer_blocks.1.")),  # not 10, 11, nor a single block
        ("transformer_blocks.1*.**", starting("transformer_blocks.1.", "transformer_blocks.10.", "transformer_blocks.11.")),
        ("transformer_blocks.1.*", []),  # one part only; every linear here lies deeper
        ("transformer_blocks.1.*.*", ["transformer_blocks.1.norm1.linear", "transformer_blocks.1.attn.to_q"]),
        ("*transformer_blocks.1.**", [n for n in NAMES if "transformer_blocks.1." in n]),
        ("proj_out", ["proj_out"]),
        ("**.proj_out", [n for n in NAMES if n.endswith("proj_out")]),
        ("*.*.proj_out", [n for n in SINGLES if n.endswith("proj_out")]),
        ("**.norm*.linear", [n for n in NAMES if n.endswith(".linear")]),  # ** may stand for no part: norm_out.linear
        ("**.attn.**", [n for n in NAMES if ".attn." in n]),
        ("**", NAMES),
        ("*", ["proj_out"]),
        ("transformer_blocks.1", []),  # a container's own name takes nothing inside it
        ("", []),
    ],
)
def test_exactly_these_names(pattern, expected):
    """Neither a prefix nor a suffix of a dotted part is enough."""
    assert sorted(matching(pattern, NAMES)) == sorted(expected)


@pytest.mark.parametrize(
    ("pattern", "name", "taken"),
    [
        ("*.norm1", "a.norm1", True),
        ("*.norm1", "a.b.norm1", False),
        ("**.norm1", "a.b.norm1", True),
        ("**.norm1", "norm1", True),
        ("**.norm1", "a.xnorm1", False),
        ("a.**", "a.b", True),
        ("a.**", "a.b.c", True),
        ("a.**", "a", False),  # at the end ** needs a part
        ("a.**.z", "a.z", True),
        ("a.**.z", "a.b.c.z", True),
        ("a.**.z", "ab.z", False),
        ("**.b.**.z", "a.b.c.z", True),
        ("**.b.**.z", "a.c.z", False),
        ("to_*", "to_q", True),
        ("to_*", "to_", True),
        ("to_*", "to_q.x", False),
        ("*_q_*", "add_q_proj", True),
        ("a+b", "aab", False),
        ("a[0-9]", "a1", False),  # no character classes, as fnmatch has them
        ("a?", "ab", False),
        ("a.b", "axb", False),  # a dot is a dot, not a regular expression's
    ],
)
def test_one_name(pattern, name, taken):
    """`*` never crosses a dot, `**` only stands for whole parts, nothing else is special."""
    assert matching(pattern, [name]) == [name] * taken


@pytest.mark.parametrize("pattern", ["a**", "**a", "a.b**.c", "***", "a.***", "x**y"])
def test_malformed_pattern_raises(pattern):
    with pytest.raises(ValueError, match=r"\*\* stands alone"):
        matching(pattern, ["a"])


def test_order_of_names_is_kept():
    assert matching("**.attn.to_q", reversed(NAMES)) == [n for n in reversed(NAMES) if n.endswith("attn.to_q")]

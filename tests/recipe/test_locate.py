"""Line numbers of TOML keys: exact cases, and agreement with tomllib on which keys there are."""

import random
import tomllib

import pytest

from dedistill.recipe.toml import dotted, locate

CASES = {
    "keys": ("a = 1\n\nb = 2\n", {"a": 1, "b": 3}),
    "table": ("# top\n[t]\na = 1\n[t.u]\nb = 2\n", {"t": 2, "t.a": 3, "t.u": 4, "t.u.b": 5}),
    "implied table": ("[t.u]\na = 1\n", {"t": 1, "t.u": 1, "t.u.a": 2}),
    "a header beats an earlier hint": ("[t.u]\n[t]\na = 1\n", {"t": 2, "t.u": 1, "t.a": 3}),
    "dotted": ("[t]\nu.a = 1\nu . b = 2\n", {"t": 1, "t.u": 2, "t.u.a": 2, "t.u.b": 3}),
    "quoted": ('"a b" = 1\n\'c\' = 2\n[t."x.y"]\nd = 3\n', {'"a b"': 1, "c": 2, "t": 3, 't."x.y"': 3, 't."x.y".d': 4}),
    "escaped key": ('"\\u0061" = 1\n', {"a": 1}),
    "number as key": ("1 = 2\n3.4 = 5\n", {"1": 1, "3": 2, "3.4": 2}),
    "array of tables": (
        "[[t]]\na = 1\n[[t]]\na = 2\n[t.u]\nb = 3\n",
        {"t": 1, "t.0": 1, "t.0.a": 2, "t.1": 3, "t.1.a": 4, "t.1.u": 5, "t.1.u.b": 6},
    ),
    "arrays of tables in one another": (
        "[[t]]\n[[t.u]]\n[[t.u]]\na = 1\n[[t]]\n[[t.u]]\na = 2\n",
        {"t": 1, "t.0": 1, "t.0.u": 2, "t.0.u.0": 2, "t.0.u.1": 3, "t.0.u.1.a": 4}
        | {"t.1": 5, "t.1.u": 6, "t.1.u.0": 6, "t.1.u.0.a": 7},
    ),
    "array of tables in a table": ("[t]\n[[t.u]]\na = 1\n", {"t": 1, "t.u": 2, "t.u.0": 2, "t.u.0.a": 3}),
    "inline table": ("t = {a = 1, b.c = 2}\nd = 3\n", {"t": 1, "t.a": 1, "t.b": 1, "t.b.c": 1, "d": 2}),
    "inline table in an inline table": ("t = {u = {a = 1}, b = {}}\n", {"t": 1, "t.u": 1, "t.u.a": 1, "t.b": 1}),
    "inline tables on several lines": (
        "t = [ # first\n  {a = 1},\n\n  {a = 2, b = 3},\n]\nc = 1\n",
        {"t": 1, "t.0": 2, "t.0.a": 2, "t.1": 4, "t.1.a": 4, "t.1.b": 4, "c": 6},
    ),
    "array on several lines": ("a = [\n 1,\n 2, 3\n]\nb = []\n", {"a": 1, "a.0": 2, "a.1": 3, "a.2": 3, "b": 5}),
    "array in an array": ("a = [[1], [2,\n3]]\n", {"a": 1, "a.0": 1, "a.0.0": 1, "a.1": 1, "a.1.0": 1, "a.1.1": 2}),
    "long string": ('a = """\nb = 1 # no\n[c]\n"""\nd = 2\n', {"a": 1, "d": 5}),
    "long literal": ("a = '''\nb = '1'\n'''\nd = 2\n", {"a": 1, "d": 4}),
    "quotes at the end of a long string": ("a = \"\"\"x\"\"\"\"\nb = '''y'''''\nc = 3\n", {"a": 1, "b": 2, "c": 3}),
    "escaped quotes": ('a = "\\"#=["\nb = """\\""""\nc = 3\n', {"a": 1, "b": 2, "c": 3}),
    "signs in strings": ("a = '#[x]=' # [y]\nb = \"{c = 1}\"\nc = 3\n", {"a": 1, "b": 2, "c": 3}),
    "apostrophe in a comment": ("# don't = \"\na = 1 # it's\nb = 2\n", {"a": 2, "b": 3}),
    "numbers and dates": ("a = -1.5e-3\nb = 1979-05-27 07:32:00.5\nc = +inf\n", {"a": 1, "b": 2, "c": 3}),
    "spaces": ("\t[ t . u ]\n  a=1\n[[ v ]]\n", {"t": 1, "t.u": 1, "t.u.a": 2, "v": 3, "v.0": 3}),
    "line ends of Windows": ("a = 1\r\n[t]\r\nb = 2", {"a": 1, "t": 2, "t.b": 3}),
    "empty": ("", {}),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_lines(text, expected):
    tomllib.loads(text)  # a case must be TOML
    assert locate(text) == expected


def test_dotted():
    assert dotted(("adapter", "targets", 0, "a b", "c.d")) == 'adapter.targets.0."a b"."c.d"'


def keys_of(value, path=()):
    """Every key and entry of parsed TOML, as ``locate`` should name them."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = set()
    for key, inner in pairs:
        found |= {dotted((*path, key))} | keys_of(inner, (*path, key))
    return found


def test_agrees_with_tomllib_on_mutations():
    """Whatever tomllib accepts: the same keys, each on a line that holds its last part."""
    rng = random.Random(1)
    pieces = ["\n", "[", "]", "{", "}", "=", ",", ".", "#", '"', "'", '"""', "'''", "a", "0", " ", "[[a]]\n", "a = [1]\n"]
    texts = [text for text, _ in CASES.values()]
    accepted = 0
    for _ in range(10000):
        text = rng.choice(texts) + rng.choice(["", rng.choice(texts)])
        for _ in range(rng.randint(1, 3)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(pieces) + text[at + rng.randint(0, 2) :]
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            continue
        accepted += 1
        places = locate(text)
        assert set(places) == keys_of(data), text
        lines = text.split("\n")
        for key, line in places.items():
            last = key.rpartition(".")[2].strip('"')
            assert last.isdigit() or last in lines[line - 1] or "\\u" in lines[line - 1], (key, text)
    assert accepted > 500

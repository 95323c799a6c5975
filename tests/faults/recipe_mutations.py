"""Recipes as a careless or hostile hand would write them."""

import random

from tiny_recipes import ADAPTER, IMAGES, TEACHER

_VALUES = (
    *("0", "-1", "1", "3.5", "nan", "inf", "-inf", "1e400", "9" * 400, "0x7fffffffffffffffff", "true", '""', '"x"'),
    *(
        '"\\u0000"',
        '"../../etc/passwd"',
        '"' + "y" * 5000 + '"',
        "[]",
        "[[]]",
        "{}",
        "{a = 1}",
        "[1, 'a']",
        "1979-05-27",
        "'''\n'''",
    ),
    *("[" * 400 + "]" * 400, "{a={a={a=1}}}", '["**.*"]', '["("]', "07:32:00", "'C:\\x'", '"\\q"', "=", "", "“x”"),
)
_KEYS = (
    "lr",
    "steps",
    "batch",
    "every",
    "a.b.c",
    '"quoted key"',
    '""',
    "ext­ends",
    "extends",
    "api_key",
    "παράδειγμα",
    "0",
    "-",
    "kind",
)
_TABLES = (
    "[train]",
    "[run]",
    "[[train]]",
    "[[adapter.targets]]",
    "[adapter.targets]",
    "[a.b.c]",
    "[]",
    "[x",
    "[ run ]",
    "[model.new]",
)


def hostile_recipe(rng: random.Random) -> tuple[bytes, list[str]]:
    """(bytes of the file, --set arguments), anything from a good recipe to no text at all."""
    text = rng.choice([ADAPTER, IMAGES, TEACHER])
    text = text.format(out="runs", base="base", images="images", cache="cache", steps=4)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        text = _mutated(rng, text)
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.15:
        for _ in range(rng.randint(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw), [_override(rng) for _ in range(rng.choice([0, 0, 0, 1, 2]))]


def _mutated(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    kind = rng.randrange(7)
    if kind == 0 and equals:
        lines[at] = f"{key}= {rng.choice(_VALUES)}"
    elif kind == 1 and equals:
        lines[at] = lines[at].replace(key.strip(), rng.choice(_KEYS), 1)
    elif kind == 2:
        lines.insert(at, f"{rng.choice(_KEYS)} = {rng.choice(_VALUES)}")
    elif kind == 3:
        lines.insert(at, rng.choice(_TABLES))
    elif kind == 4:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == 5:
        del lines[at]
    else:
        word = lines[at]
        cut = rng.randrange(len(word) + 1)
        lines[at] = word[:cut] + rng.choice(['"', "'", "[", "}", "#", "\\", "\u2028", "\r", "\0", "."]) + word[cut:]
    return "\n".join(lines) + "\n"


def _override(rng: random.Random) -> str:
    table = rng.choice(["train", "run", "adapter", "adapter.targets.0", "adapter.targets.9", "model", "x", "", "data.sets.0"])
    return rng.choice([f"{table}.{rng.choice(_KEYS)}={rng.choice(_VALUES)}", table, "=", f"{table}={rng.choice(_VALUES)}"])

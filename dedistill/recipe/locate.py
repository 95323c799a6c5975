"""Line numbers of the keys of a TOML document; tomllib reads the values but forgets where they stood."""

import json
import re
import tomllib

_BARE = re.compile(r"[A-Za-z0-9_-]+")
# Strings of several lines first, else their opening quotes would read as an empty string; a comment is a token too, so
# that what it says is never read as keys.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?""""{0,2}|' + r"'''.*?''''{0,2}|" + r'"(?:\\.|[^"\\])*"|' + r"'[^']*'|#[^\n]*|[\[\]{}=,.\n]|"
    r"""[^\s\[\]{}=,."'#]+""",
    re.DOTALL,
)


def dotted(parts: tuple[str | int, ...]) -> str:
    """``("adapter", "targets", 0)`` -> ``adapter.targets.0``; parts that TOML would quote are quoted."""
    return ".".join(p if _BARE.fullmatch(p) else json.dumps(p, ensure_ascii=False) for p in map(str, parts))


def locate(text: str) -> dict[str, int]:
    """Line, counted from 1, of every table, key and array entry of ``text``, which tomllib must have accepted."""
    scan = _Scan(text)
    table: tuple[str, ...] = ()
    while scan.tokens:
        if scan.peek() == "\n":
            scan.take()
        elif scan.peek() == "[":
            table = scan.header()
        else:
            scan.pair(table)
    return scan.places


class _Scan:
    """Reads tokens from the left. It trusts the text, and at its end every loop stops."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str, int]] = []
        self.places: dict[str, int] = {}
        self.rows: dict[tuple[str, ...], int] = {}  # tables seen so far of each [[array]]
        line = 1
        for match in _TOKEN.finditer(text):
            if not match[0].startswith("#"):
                self.tokens.append((match[0], line))
            line += match[0].count("\n")
        self.tokens.reverse()  # pop() from the end is cheap

    def peek(self) -> str:
        return self.tokens[-1][0] if self.tokens else ""

    def take(self) -> str:
        return self.tokens.pop()[0]

    def key(self, end: str) -> tuple[str, ...]:
        """The parts of a key up to and with ``end``."""
        parts = []
        while (token := self.take()) != end:
            if token != ".":
                parts.append(tomllib.loads(f"key = {token}")["key"] if token[0] in "\"'" else token)
        return tuple(parts)

    def header(self) -> tuple[str, ...]:
        """Read ``[table]`` or ``[[array of tables]]``; the path of the keys that follow, indices and all."""
        line = self.tokens[-1][1]
        self.take()
        many = self.peek() == "["
        if many:
            self.take()
        parts = self.key("]")
        if many:
            self.take()
            array = self.path(parts[:-1], line) + parts[-1:]
            self.rows[array] = self.rows.get(array, 0) + 1
        path = self.path(parts, line)
        self.places[dotted(path)] = line  # the header itself counts, not an earlier key that implied the table
        return path

    def path(self, parts: tuple[str, ...], line: int) -> tuple[str, ...]:
        """``parts`` with the number of the newest table after each array of tables; all tables on the way are noted."""
        path: tuple[str, ...] = ()
        for part in parts:
            path += (part,)
            self.places.setdefault(dotted(path), line)
            if path in self.rows:
                path += (str(self.rows[path] - 1),)
                self.places.setdefault(dotted(path), line)
        return path

    def pair(self, table: tuple[str, ...]) -> None:
        """Read ``key = value``."""
        line = self.tokens[-1][1]
        parts = self.key("=")
        for n in range(len(parts)):
            self.places.setdefault(dotted(table + parts[: n + 1]), line)
        self.value(table + parts)

    def value(self, path: tuple[str, ...]) -> None:
        """Read past a value and note what stands inside it."""
        first, index = self.take(), 0
        if first not in ("[", "{"):
            while self.peek() not in (",", "]", "}", "\n", ""):
                self.take()
            return
        while (token := self.peek()) not in ("]", "}", ""):
            if token in ("\n", ","):
                self.take()
            elif first == "{":
                self.pair(path)
            else:
                inner = (*path, str(index))
                self.places[dotted(inner)] = self.tokens[-1][1]
                self.value(inner)
                index += 1
        if self.tokens:
            self.take()

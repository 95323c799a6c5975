"""Plain data on its way to a recipe: where each key was said, and what is wrong with it so far."""

from typing import Any

from dedistill.recipe.fields import KeySource
from dedistill.recipe.rules import Clash
from dedistill.recipe.shipped import is_shipped
from dedistill.recipe.toml import dotted


class Draft:
    """Plain data on its way to a Recipe, with the place of every key and the mistakes found so far."""

    def __init__(self, file: str):
        self.file = file
        self.data: dict[str, Any] = {}
        self.places: dict[str, KeySource] = {}
        self.errors: list[tuple[KeySource, str]] = []
        self.notes: list[str] = []
        """On what was dropped by what the user wrote."""

    def source_of(self, key: str) -> KeySource | None:
        """Where ``key`` was set, or the table that it belongs to; None for defaults."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key)

    def blame(self, key: str, message: str) -> None:
        """Note a mistake at the line of ``key``, or of the table it belongs to, or at the file."""
        place = self.source_of(key) or KeySource(0, self.file)
        self.errors.append((place, f"{place}: {key}: {message}"))

    def blame_clash(self, clash: Clash) -> None:
        """Note keys that do not go together, at the one that was said last: what it was laid over was right without it."""
        own = self.source_of(clash.key)
        last = max((k for k in clash.others if k in self.places), key=lambda k: self.places[k].weight, default="")
        if not own or not last or self.places[last].weight <= own.weight:
            return self.blame(clash.key, clash.message)
        place = self.places[last]
        parts = clash.key.split(".")
        table = next((".".join(parts[:n]) for n, part in enumerate(parts) if part.isdecimal()), "")
        there = (
            f"set {f'[[{table}]]' if table else clash.key} {'by --set' if place.file == '--set' else f'in {place.file}'} too"
        )
        self.blame(last, f"does not go with {clash.key} ({own}): {clash.message}; {there}")

    def drop_idle(self, clash: Clash) -> bool:
        """Drop what lost its effect by keys that were said later, as when a recipe changes the density that the one it extends
        gave parameters for; True if anything went."""
        last = max((self.places[k] for k in clash.others if k in self.places), key=lambda place: place.weight, default=None)
        if not clash.idle or last is None:
            return False
        *tables, name = clash.key.split(".")
        table: Any = self.data
        for part in tables:
            table = table.get(part, {})
        found = table.get(name)
        inner = [f"{clash.key}.{part}" for part in found] if isinstance(found, dict) else []
        said = [k for k in inner or [clash.key] if k not in clash.others and k in self.places]
        lost = [k for k in said if self.places[k].weight < last.weight]
        if lost and not is_shipped(str(last)):
            self.notes.append(f"{', '.join(lost)} ({self.places[lost[0]]}) left out: {clash.message} ({last})")
        for key in lost:
            del (found if inner else table)[key.rpartition(".")[2]]
            self.forget(key)
        return bool(lost)

    def below(self, key: str) -> list[str]:
        """``key`` and all located keys inside it."""
        return [k for k in self.places if k == key or k.startswith(key + ".")]

    def lay(self, data: dict[str, Any], places: dict[str, KeySource]) -> None:
        """Put ``data`` over what is there: tables merge, everything else is replaced whole."""
        self._lay(self.data, data, ())
        self.places |= places

    def _lay(self, under: dict[str, Any], over: dict[str, Any], path: tuple[str, ...]) -> None:
        for name, value in over.items():
            if isinstance(value, dict) and isinstance(under.get(name), dict):
                self._lay(under[name], value, (*path, name))
            else:
                self.forget(dotted((*path, name)))
                under[name] = value

    def forget(self, key: str) -> None:
        for old in self.below(key):
            del self.places[old]

    def rename(self, old: str, new: str) -> None:
        for key in self.below(old):
            self.places[new + key[len(old) :]] = self.places[key]

"""Saving beside training: what is to be saved is copied first, a thread writes the copies."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dedistill.pulse import pulse


class Saver:
    """One save at a time. What goes wrong in one is raised by the next call of ``start`` or ``wait``."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future | None = None

    def start(self, save: Callable[[], object]) -> None:
        """Run ``save`` beside what follows, after the save before has ended. It must hold copies of its own."""
        self.wait()
        self._running = self._pool.submit(save)

    def check(self) -> None:
        """Raise what a save that has ended has raised; waits for none."""
        if self._running and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until what was started is safe on disk."""
        running, self._running = self._running, None
        if running:
            with pulse.during("saving"):
                running.result()

    def close(self) -> None:
        """Wait, and raise nothing: for the end of a run that has failed already."""
        self._pool.shutdown()

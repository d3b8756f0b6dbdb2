"""How a run shows itself while it trains: a live display on a terminal, plain lines elsewhere.

Both go to stderr.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from braeburn.data.workers import Progress as Amount
from braeburn.parallel import processes

SECONDS_BETWEEN_LINES = 10.0
# Warnings from the start of a longer run are out of sight at its end.
SECONDS_UNTIL_REPEATED = 60.0

Item = TypeVar("Item")


class Display:
    """Shows one run. Use as a context manager."""

    def __init__(self, total_steps: int, console: Console | None = None, *, quiet: bool = False):
        """Prepares a display of `total_steps` over all stages; with `quiet` it shows nothing."""
        self._console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self._total_steps = total_steps
        self._last_line = -float("inf")
        self._began = time.monotonic()
        self._warnings: list[str] = []
        self._seconds_per_step: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self._bar = Progress(*columns, console=self._console)

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if time.monotonic() - self._began > SECONDS_UNTIL_REPEATED:
            for text in self._warnings:
                self.say(text)

    def warn(self, text: str) -> None:
        """A line that must not be missed: said again at the end, unless that is soon."""
        self._warnings.append(text)
        self.say(text, style="bold yellow")

    def say(self, text: str, style: str | None = None) -> None:
        """A line of its own; `style` is rich's, for terminals."""
        with suppress(OSError):  # the terminal is gone, or the disk that holds the log is full
            self._console.print(text, markup=False, soft_wrap=True, style=style)

    def preparing(self, progress: Amount) -> None:
        """Text is being tokenised, so far."""
        left = progress.seconds_left
        facts = (
            f"{progress.done / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB  "
            f"{progress.rate / 1e6:,.1f} MB/s" + (f"  {duration(left)} left" if left else "")
        )
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task("tokenising", facts="")
            megabytes, done = progress.total // 10**6, progress.done // 10**6
            self._bar.update(self._task, total=megabytes, completed=done, facts=facts)
            return
        now = time.monotonic()
        if now - max(self._last_line, self._began) >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"tokenising: {facts}")

    def begin_stage(self, name: str, steps: int, done: int) -> None:
        """A stage of `steps` begins, or goes on after `done`."""
        self._seconds_per_step = None
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=steps, completed=done, facts="")
        self.say(f"stage {name}: {steps - done} steps" + (f" left of {steps}" if done else ""))

    def tracked(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        """The items as they are, while it shows how many are done of what comes before the steps of
        a stage.

        Args:
            items: what is worked through.
            what: is done with them, as in "measuring activations".
            total: how many there are.
        """

        def show(line: str) -> None:
            if self._bar and self._task is not None:
                self._bar.update(self._task, facts=line)
            else:
                self.say(line)

        yield from _told(items, what, total, show)

    def step(self, row: dict[str, Any], stage_step: int) -> None:
        """A step was made; `row` is that of `metrics.jsonl`."""
        seconds = row["step_seconds"]
        self._seconds_per_step = 0.9 * (self._seconds_per_step or seconds) + 0.1 * seconds
        facts = (
            f"loss {row['loss']:.4f} (average {row['loss_average']:.4f})  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        if row["mfu"] is not None:
            facts += f"  MFU {row['mfu']:.1%}"
        if row["skipped"]:
            facts += f"  {row['skipped']} skipped"
        # Later stages may have longer steps: the estimate is of this stage's pace.
        remaining = (self._total_steps - row["step"]) * self._seconds_per_step
        facts += f"  {duration(remaining)} left"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=stage_step, facts=facts)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or row["step"] == self._total_steps:
            self._last_line = now
            self.say(f"step {row['step']}/{self._total_steps}  {row['stage']}  {facts}")


def tracked(
    items: Iterable[Item], what: str, total: int | None = None, console: Console | None = None
) -> Iterator[Item]:
    """The items as they are, while standard error shows how many are done.

    A terminal shows a bar, which goes away at the end; elsewhere there is a line every ten seconds,
    so that what is quick says nothing. Of several processes, the main one shows it.

    Args:
        items: what is worked through.
        what: is done with them, as in "reading weights".
        total: how many there are; the length of `items` by default, where it has one.
        console: shows it; of standard error by default.
    """
    console = console or Console(stderr=True, highlight=False, quiet=not processes.is_main())
    if total is None and isinstance(items, Sized):
        total = len(items)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=what)
        return

    def show(line: str) -> None:
        with suppress(OSError):
            console.print(line, markup=False, soft_wrap=True)

    yield from _told(items, what, total, show)


def _told(
    items: Iterable[Item], what: str, total: int | None, show: Callable[[str], None]
) -> Iterator[Item]:
    """The items as they are, with a line of how many are done every ten seconds."""
    began = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - told >= SECONDS_BETWEEN_LINES:
            told = now
            left = (
                f"  {duration((total - done) * (now - began) / done)} left"
                if total and done
                else ""
            )
            show(f"{what}: {done}{f' of {total}' if total else ''}{left}")
        yield item


def duration(seconds: float) -> str:
    """A length of time to two units, as in `3 h 20 min`."""
    whole = round(seconds)
    for name, size, smaller, smaller_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"

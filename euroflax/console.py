"""What a run shows in a terminal: the plan, progress bars, and bits per byte as a table."""

import io
import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from euroflax.ending import printable
from euroflax.languages import LANGUAGES

_LINE_SECONDS = 15.0
_MAX_COLUMNS = 6
_WIDE = 240


class ConsoleDisplay:
    """Draws progress bars in a terminal; elsewhere prints a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._kind, self._task = "", TaskID(0)
        self._last_line = time.monotonic()

    def note(self, text: str) -> None:
        """Prints a sentence."""
        self._console.print(printable(text, lines=True), highlight=False, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Prints a table, as wide as it needs to be where the output is no terminal."""
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, _WIDE)
        self._console.print(table)

    def progress(self, task: str, done: int, total: int) -> None:
        """Moves the bar of a task; a task that is done takes its bar away."""
        self._bar(task, done, total, "")

    def step(self, metrics: dict, total_tokens: int) -> None:
        """Moves the bar of the training with loss and speed."""
        text = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        self._bar("train", metrics["tokens"], total_tokens, text)
        now = time.monotonic()
        if not self._console.is_terminal and (
            now - self._last_line > _LINE_SECONDS or metrics["tokens"] >= total_tokens
        ):
            self._last_line = now
            self.note(f"step {metrics['step']}: {text}, {100 * metrics['tokens'] / total_tokens:.0f}% done")

    def _bar(self, task: str, done: int, total: int, text: str) -> None:
        if not self._console.is_terminal:
            now = time.monotonic()
            if not text and now - self._last_line > _LINE_SECONDS:
                self._last_line = now
                self.note(f"{task}: {100 * done / max(total, 1):.0f}% done")
            return
        kind = task.split(maxsplit=1)[0]
        if self._bars is None or self._kind != kind:
            self.close()
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
            self._kind, self._task = kind, self._bars.add_task(task, total=total, text=text)
        self._bars.update(self._task, description=task, completed=done, total=total, text=text)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Takes away the bar that is drawn."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Prints the mean of an evaluation, and the best and worst language."""
        by_language = {key.removeprefix("bits_per_byte."): value for key, value in figures.items()}
        mean = by_language.pop("mean", math.nan)
        lacking = [code for code, value in by_language.items() if not math.isfinite(value)]
        by_language = {code: value for code, value in by_language.items() if code not in lacking} or by_language
        without = f"; not measured in {', '.join(lacking)}" if lacking else ""
        best, worst = min(by_language, key=by_language.__getitem__), max(by_language, key=by_language.__getitem__)
        self.note(
            f"step {step}: {mean:.3f} bits per byte over {len(by_language)} languages "
            f"({best} {by_language[best]:.3f} to {worst} {by_language[worst]:.3f})" + without
        )

    def evaluations(self, metrics: list[dict]) -> None:
        """Prints bits per byte of each language as a table with a column for each evaluation, six at most."""
        found = [line for line in metrics if "eval" in line]
        if not found:
            return
        if len(found) > _MAX_COLUMNS:
            picks = {round(i * (len(found) - 1) / (_MAX_COLUMNS - 1)) for i in range(_MAX_COLUMNS)}
            found = [found[i] for i in sorted(picks)]
        table = Table(title="bits per byte of held-out text", title_justify="left", box=None)
        table.add_column("language")
        for line in found:
            table.add_column(f"step {line['step']}", justify="right")
        for key in found[-1]["eval"]:
            code = key.removeprefix("bits_per_byte.")
            name = f"{code} {LANGUAGES[code].name}" if code in LANGUAGES else code
            cells = [line["eval"].get(key) for line in found]
            style = "bold" if code == "mean" else None
            table.add_row(name, *("not measured" if cell is None else f"{cell:.3f}" for cell in cells), style=style)
        self._console.print(table)


def evaluations_as_html(metrics: list[dict]) -> str:
    """The table of `ConsoleDisplay.evaluations` for a notebook."""
    console = Console(record=True, file=io.StringIO(), width=120)
    ConsoleDisplay(console).evaluations(metrics)
    return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>")


class SilentDisplay:
    """Shows nothing: for processes other than the first, and where `verbs` are called without a display."""

    def evaluations(self, metrics: list[dict]) -> None:
        """Shows nothing."""

    def table(self, table: Table) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Has nothing to take away."""

    def note(self, text: str) -> None:
        """Shows nothing."""

    def progress(self, task: str, done: int, total: int) -> None:
        """Shows nothing."""

    def step(self, metrics: dict, total_tokens: int) -> None:
        """Shows nothing."""

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Shows nothing."""

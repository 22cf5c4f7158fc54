"""What people see: tables on stdout, messages and progress on stderr; `--json` prints one document instead.

Tables fit the terminal, or 80 columns.
"""

import errno
import json
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from composer.errors import ComposerError
from registry.errors import RegistryError, Unavailable, of_composer

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Failure = RegistryError | ComposerError | OSError

wide = False
"""Set by --wide: tables are as wide as what is in them."""
_CUT = frozenset({"module", "tensor"})
_LEAST_CHARS = 24
_NOT_PLAIN = re.compile(r"[^\n\x20-\x7e]")
METRICS = {"accuracy": "exact match"}
"""What people read in place of a metric's id."""


def document(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """The document itself, or what `show` makes of it."""
    if as_json:
        print(escaped(json.dumps(value, indent=2, ensure_ascii=False, default=str)))
    else:
        show()


def say(message: str) -> None:
    """On stderr; what follows a line break is indented, so that no text of others looks like a message of ours."""
    print(indented(message), file=sys.stderr)


def out(text: str) -> None:
    """On stdout, as `say` on stderr."""
    print(indented(text))


def indented(text: str, width: int = 4) -> str:
    return plain(text).replace("\n", "\n" + " " * width)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Left-aligned text, right-aligned numbers; a record for each row where the table is wider than the output.

    Names of modules and tensors are cut in the middle before that. No cell is broken.
    """
    if title:
        heading(title)
    cells = [[cell(value) for value in row] for row in rows]
    if not cells:
        print("none")
        return
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]
    room = _width() - 2 * (len(columns) - 1)
    for index, name in enumerate(columns):
        spare = room - (sum(widths) - widths[index])
        if name in _CUT and sum(widths) > room and spare >= _LEAST_CHARS:
            for row in cells:
                row[index] = middle(row[index], spare)
            widths[index] = min(widths[index], spare)
    if sum(widths) > room:
        for row in rows:
            lines(cell(row[0]), list(zip(columns[1:], row[1:], strict=True)))
        return
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    for row in (list(columns), *cells):
        words = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        print("  ".join(words).rstrip())


def middle(text: str, most: int) -> str:
    """The text, or its ends with `…` between them: module names differ at both."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def lines(title: str, pairs: Sequence[tuple[str, Any]]) -> None:
    """A heading and `name  value` below it, wrapped between words; None is left out, each item of a list that does not
    fit has a line of its own."""
    heading(title)
    shown = [(name, value) for name, value in pairs if value is not None and cell(value) not in ("", "-")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        room = max(_LEAST_CHARS, _width() - width - 4)
        whole = cell(value)
        items = cast(Sequence[Any], value) if isinstance(value, list | tuple) and len(whole) > room else [whole]
        texts = [
            line for item in items for line in wrap(cell(item), room, break_long_words=False, break_on_hyphens=False)
        ]
        for index, text in enumerate(texts):
            out(f"  {'' if index else name:<{width}}  {text}".rstrip())


def _width() -> int:
    """Columns of the terminal, 80 without one; no limit with --wide."""
    return sys.maxsize if wide else get_terminal_size((80, 24)).columns


def heading(text: str) -> None:
    typer.secho(plain(text), bold=True)


def plain(text: str) -> str:
    """What others wrote must not speak to the terminal: control characters are shown, not obeyed."""
    return "".join(one if one.isprintable() or one == "\n" else f"\\x{ord(one):02x}" for one in text)


def escaped(document: str) -> str:
    """The same JSON, its control characters written as escapes: JSON lets those of above ASCII stand as they are."""
    return _NOT_PLAIN.sub(lambda one: one[0] if one[0].isprintable() else json.dumps(one[0])[1:-1], document)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        return ", ".join(cell(item) for item in items) or "-"
    return plain(str(value)).replace("\n", "\\n")


def more(cursor: str | None, as_json: bool) -> None:
    """Says how a list goes on that was cut off; a JSON document says it itself, as `next`."""
    if cursor and not as_json:
        say(f"more: --cursor {cursor}")


def summary(label: str, summary: dict[str, Any]) -> None:
    """A verdict, the lines that it rests on, and the fix, wrapped at words to 80 columns."""
    heading(f"{label}: {summary['headline']}")
    fix = [f"fix: {summary['fix']}"] if summary["fix"] else []
    for line in (*(f"  {line}" for line in summary["lines"]), *fix):
        indent = "    " if line.startswith(" ") else "  "
        for part in wrap(plain(line), 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False):
            print(part)


def with_error(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def changes(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What an audit row changed, a field each: (`version`, `1.0.0 -> 1.1.0`); equal fields are left out."""
    before: dict[str, Any] = row["before"] or {}
    after: dict[str, Any] = row["after"] or {}
    return [
        (
            name,
            cell(after.get(name)) if before.get(name) is None else f"{cell(before[name])} -> {cell(after.get(name))}",
        )
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]


def gate_lines(report: Sequence[dict[str, Any]]) -> None:
    for result in report:
        mark = "pass" if result["passed"] else "FAIL" if result.get("required", True) else "warn"
        line = f"  {mark}  {result['rule']}: {result['detail']}"
        if len(line) <= _width():
            out(line)
            continue
        out(f"  {mark}  {result['rule']}:")
        for part in wrap(plain(result["detail"]), _width() - 8, break_long_words=False, break_on_hyphens=False):
            print(f"        {part}")


class Progress:
    """What long work calls with each amount that is done; it may be called from several threads. Shows nothing."""

    def __call__(self, count: int) -> None:
        pass

    def label(self, text: str) -> None:
        """Says what is being done now."""


class _Bar(Progress):
    def __init__(self, bars: "Bars", label: str, total: int) -> None:
        self._bars, self._task = bars, bars.add_task(plain(label), total=total)

    def __call__(self, count: int) -> None:
        self._bars.advance(self._task, count)

    def label(self, text: str) -> None:
        self._bars.update(self._task, description=plain(text))


@contextmanager
def progress(label: str, total: int, *, counts: bool = False) -> Generator[Progress]:
    """A bar with rate and time left on stderr when that is a terminal, nothing otherwise.

    `total` and what the callback gets are bytes, or things with `counts`.
    """
    if not sys.stderr or not sys.stderr.isatty() or total <= 0:
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    amount = [MofNCompleteColumn(), RateColumn()] if counts else [DownloadColumn(), TransferSpeedColumn()]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), *amount, TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(bars, label, total)


def fail(error: Failure, as_json: bool) -> int:
    """Says what is wrong and what to do next; returns the exit code of its family."""
    told = _told(error)
    say(f"error: {told.detail}")
    for finding in told.findings:
        if "rule" in finding:
            mark = "pass" if finding["passed"] else "FAIL"
            say(f"  {mark}  {finding['rule']}: {finding['detail']}")
        elif finding.get("severity") != "notice" and str(finding.get("message")) not in told.detail:
            say(f"  {finding.get('severity')}: {finding.get('message')}")
    next_step = _next_step(told)
    if next_step:
        say(f"next: {next_step}")
    if as_json:
        print(escaped(json.dumps({"error": problem(told)}, indent=2, ensure_ascii=False)))
    return told.exit_code


def problem(error: Failure) -> dict[str, Any]:
    told = _told(error)
    return {
        "code": told.code,
        "detail": told.detail,
        "subject": told.subject,
        "next": _next_step(told),
        "findings": told.findings,
    }


def _told(error: Failure) -> RegistryError:
    if isinstance(error, OSError):
        return _of_disk(error)
    return of_composer(error) if isinstance(error, ComposerError) else error


def _of_disk(error: OSError) -> Unavailable:
    where = str(error.filename or "")
    told = ": ".join([*([where] if where else []), str(error.strerror or error)])
    next_step = "See that it can be read and written."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        next_step = "Allow more open files (ulimit -n): a merge keeps some for each shard."
    return Unavailable("disk_error", f"{told}.", subject=where, next_step=next_step)


def _next_step(told: RegistryError) -> str:
    """Of a field of the request, what gave it on the command line: nobody at a terminal reads the OpenAPI document."""
    if told.code != "bad_request" or "/openapi.json" not in told.next_step:
        return told.next_step
    field = told.subject.partition(".")[2]
    option = f"--{field.partition('.')[0].replace('_', '-')}"
    given = any(word.partition("=")[0] == option for word in sys.argv)
    return f"Correct {option if given else field}; --help says what the command takes."

"""Output for people: tables on stdout, messages and progress on stderr; `--json` prints one document instead.

Tables fit the terminal, or 80 columns.
"""

import errno
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from math import ceil
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from composer.errors import ComposerError
from registry import wire
from registry.errors import RegistryError, Unavailable
from registry.errors.translation import of_composer, refuse_errors, strictly
from registry.formats.intervals import error_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from composer.findings import Finding


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Failure = RegistryError | ComposerError | OSError

wide = False
"""Set by --wide: tables are as wide as their content."""
_CUT = frozenset({"module", "tensor"})
_ITEM_A_LINE = frozenset({"scores"})
_LEAST_CHARS = 24
_NOT_PLAIN = re.compile(r"[^\n\x20-\x7e]")
_LABEL_CHARS = 26
"""Width of a bar's label, so that amount, rate and time left fit into 80 columns beside it."""


def document(value: Any, as_json: bool, show: Callable[[], None], failure: Failure | None = None) -> None:
    """Prints the document as JSON, or calls `show`; what the registry answered is printed as it came. Then ends the
    command with `failure`, if there is one, on stderr alone: a second document on stdout would break its readers."""
    if as_json:
        print(escaped(json.dumps(value, indent=2, ensure_ascii=False, default=_as_json)))
    else:
        show()
    if failure is not None:
        raise typer.Exit(fail(failure, as_json=False))


def _as_json(value: object) -> object:
    from registry.wire.document import Wire

    return value.document if isinstance(value, Wire) else str(value)


def listing(
    items: Sequence[Any], as_json: bool, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = ""
) -> None:
    """Prints a complete list: as a page of JSON, or its rows as a table."""
    document({"items": items, "next": None}, as_json, lambda: table(title, columns, rows))


def say(message: str) -> None:
    """Prints to stderr. Lines after a line break are indented, so that other people's text cannot look like our
    message."""
    print(_fitted(message, sys.stderr), file=sys.stderr)


def warn(message: str) -> None:
    """Prints a warning to stderr."""
    say(f"warning: {message}")


def warn_of(findings: "Iterable[Finding]", *, strict: bool = False) -> None:
    """Shows findings. `strict`: raises the error of the first warning."""
    seen = list(findings)
    if strict:
        refuse_errors(strictly(seen), "adapters")
    for finding in seen:
        say(finding_line(finding.to_json()))


def finding_line(finding: Mapping[str, Any]) -> str:
    """A finding's message, with its fix if it needs one."""
    from composer.findings import next_step

    fix = next_step(finding["code"], "") if finding["severity"] != "notice" else ""
    return f"{finding['severity']}: {finding['message']} {fix}".rstrip()


def out(text: str) -> None:
    """Prints to stdout; `say` prints to stderr."""
    print(_fitted(text, sys.stdout))


def as_it_is(text: str) -> None:
    """Prints a file to stdout, neither wrapped nor indented; control characters are escaped on a terminal only."""
    content = text.removesuffix("\n")
    print(plain(content) if sys.stdout.isatty() else content)


def _fitted(text: str, stream: TextIO | None) -> str:
    """The text, wrapped between words if the stream is a terminal. None is a closed stream."""
    indent = " " * (len(text) - len(text.lstrip(" ")) + 4)
    first, *rest = plain(text).split("\n")
    lines = [first, *(indent + line for line in rest)]
    if stream and stream.isatty():
        lines = [part for line in lines for part in _wrapped(line, _width(), indent)]
    return "\n".join(lines)


def _wrapped(text: str, room: int, indent: str = "") -> list[str]:
    """Wraps between words. A name, path or digest longer than a line stays unbroken, without the indent if only the
    indent makes it too long."""
    lines = wrap(text, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]
    return [line.lstrip() if len(line) > room else line for line in lines]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table: left-aligned text, right-aligned numbers; a record per row if the table is too wide or a cell has
    items that need a line each.

    Names of modules and tensors are first shortened in the middle. No cell is broken.
    """
    if title:
        heading(title)
    if not rows:
        print("none")
        return
    # Drops columns that have neither a name nor content, such as empty remarks.
    kept = [i for i, name in enumerate(columns) if name or any(row[i] not in (None, "") for row in rows)]
    columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]
    room = _width() - 2 * (len(columns) - 1)
    for index, name in enumerate(columns):
        spare = room - (sum(widths) - widths[index])
        if name in _CUT and sum(widths) > room and spare >= _LEAST_CHARS:
            for row, text in zip(cells, _cut_apart([row[index] for row in cells], spare), strict=True):
                row[index] = text
            widths[index] = max(len(name), *(len(row[index]) for row in cells))
    if sum(widths) > room or any(_has_lines(*pair) for row in rows for pair in zip(columns, row, strict=True)):
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


def _has_lines(name: str, value: Any) -> bool:
    return not wide and name in _ITEM_A_LINE and isinstance(value, list) and len(cast(list[Any], value)) > 1


def middle(text: str, most: int, head: int | None = None) -> str:
    """Shortens text in the middle with `…`: module names differ at both ends."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2 if head is None else head
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def _cut_apart(names: Sequence[str], most: int) -> list[str]:
    """Shortens the names as near to their middle as keeps distinct names distinct; otherwise leaves them."""
    for head in sorted(range(most), key=lambda head: abs(head - (most - 1) // 2)):
        shortened = [middle(name, most, head) for name in names]
        if len(set(shortened)) == len(set(names)):
            return shortened
    return list(names)


def lines(title: str, pairs: Sequence[tuple[str, Any]]) -> None:
    """Prints a heading and `name  value` lines, wrapped between words. Skips None; the items of a list that does not
    fit get a line each."""
    heading(title)
    shown = [(name, value) for name, value in pairs if value is not None and cell(value) not in ("", "-")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        room = max(_LEAST_CHARS, _width() - width - 4)
        text = cell(value)
        items = [text]
        if isinstance(value, list | tuple) and (len(text) > room or _has_lines(name, value)):
            items = cast(Sequence[Any], value)
        texts = [line for item in items for line in _wrapped(cell(item), room)]
        for index, text in enumerate(texts):
            out(f"  {'' if index else name:<{width}}  {text}".rstrip())


def _width() -> int:
    """Width of the terminal in columns, 80 without one; no limit with --wide."""
    return sys.maxsize if wide else get_terminal_size((80, 24)).columns


def heading(text: str) -> None:
    """Prints a heading in bold, cut to the terminal's width."""
    typer.secho(_fitted(text, sys.stdout), bold=True)


def plain(text: str) -> str:
    """Escapes control characters: other people's text must not control the terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else f"\\x{ord(character):02x}" for character in text
    )


def escaped(document: str) -> str:
    """The same JSON with control characters above ASCII escaped too, which JSON allows unescaped."""
    return _NOT_PLAIN.sub(lambda one: one[0] if one[0].isprintable() else json.dumps(one[0])[1:-1], document)


def cell(value: Any) -> str:
    """A value as the text of a table cell: four digits for floats, commas between items, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        named = cast(Mapping[str, Any], value)
        return ", ".join(f"{plain(name)}: {cell(item)}" for name, item in named.items()) or "-"
    if isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        return ", ".join(cell(item) for item in items) or "-"
    return plain(str(value)).replace("\n", "\\n")


def more(cursor: str | None, as_json: bool) -> None:
    """Says how to get the next page; a JSON document has `next` instead."""
    if cursor and not as_json:
        say(f"more: --cursor {cursor}")


def summary(label: str, summary: dict[str, Any]) -> None:
    """Prints a verdict, the lines that support it, and the fix, wrapped between words."""
    heading(f"{label}: {summary['headline']}")
    fix = [f"fix: {summary['fix']}"] if summary["fix"] else []
    for line in (*(f"  {line}" for line in summary["lines"]), *fix):
        indent = "    " if line.startswith(" ") else "  "
        for part in _wrapped(plain(line), _width(), indent):
            print(part)


def with_error(value: float, stderr: float | None, n: int = 0) -> str:
    """A value with its standard error, if it has one, or its interval, if it is 0 or 1 of `n` examples."""
    return f"{value:.3f}{error_text(value, stderr, n, '.3f')}"


def second(at: datetime | None) -> str:
    """A time to the second; empty for none."""
    return at.isoformat()[:19] if at else ""


def minute(at: datetime | None) -> str:
    return at.isoformat()[:16] if at else ""


def size(count: int) -> str:
    """A number of bytes in decimal units."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def counted(count: int, what: str) -> str:
    """`1 file`, `1,200 files`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def fields(document: Mapping[str, Any], *left_out: str) -> list[tuple[str, Any]]:
    """A document's fields for `lines`: names in words, sizes in decimal units, whole numbers in groups of three."""

    def shown(name: str, value: Any) -> Any:
        if name.endswith("_bytes"):
            return size(value)
        return f"{value:,}" if type(value) is int else value

    return [
        (name.removesuffix("_bytes").replace("_", " "), shown(name, value))
        for name, value in document.items()
        if name not in left_out
    ]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields that an audit row changed, such as (`version`, `1.0.0 -> 1.1.0`)."""
    return [
        (
            name,
            cell(after.get(name)) if before.get(name) is None else f"{cell(before[name])} -> {cell(after.get(name))}",
        )
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]


def gate_lines(report: "Sequence[wire.quality.GateResultOut | Mapping[str, Any]]") -> None:
    """Prints one line per gate, with its mark."""
    for gate in report:
        result = gate if isinstance(gate, Mapping) else gate.document
        mark = _mark(result)
        rule = _rule(result)
        line = f"  {mark}  {rule}: {result['detail']}"
        if len(line) <= _width():
            out(line)
            continue
        out(f"  {mark}  {rule}:")
        for part in _wrapped(plain(result["detail"]), _width() - 8):
            print(f"        {part}")


def _rule(result: Mapping[str, Any]) -> str:
    """A gate's rule, with the policy of a namespace that it is from."""
    return f"{result['rule']} ({result['policy']})" if result.get("policy") else result["rule"]


def _mark(result: Mapping[str, Any]) -> str:
    """The word for a gate: `wait` if it may still pass by itself, `warn` if it is not required."""
    if result["passed"]:
        return "pass"
    return "wait" if result.get("waiting") else "FAIL" if result.get("required", True) else "warn"


class StepProgress:
    """Progress callback: called with each amount done, from any thread. This one shows nothing."""

    def __call__(self, count: int) -> None:
        pass

    def expect(self, total: int) -> None:
        """Sets the total when it becomes known or grows."""

    def step(self, label: str, done: int | None, total: int | None, unit: str | None) -> None:
        """Starts or updates the bar of the current step, indeterminate if no total is known."""

    def show_running(self, steps: "Sequence[wire.work.StepOut]") -> None:
        """The `step` text of a job's running step; empty if none runs."""
        for step in steps:
            if step.state == "running":
                self.step(step.name, step.done, step.total, step.unit)


class _Bar(StepProgress):
    def __init__(self, bars: "Bars", label: str, total: int | None, unit: str) -> None:
        self._bars = bars
        self._label: str = label
        self._task = bars.add_task(middle(plain(label), _LABEL_CHARS), total=total, unit=unit)

    def __call__(self, count: int) -> None:
        self._bars.advance(self._task, count)
        (task,) = self._bars.tasks
        if task.total is not None and task.completed > task.total:  # a search may measure more than expected
            self._bars.update(self._task, total=task.completed)

    def expect(self, total: int) -> None:
        self._bars.update(self._task, total=total)
        self._bars.start()

    def step(self, label: str, done: int | None, total: int | None, unit: str | None) -> None:
        if label != self._label:
            self._label = label
            self._bars.remove_task(self._task)
            self._task = self._bars.add_task(middle(plain(label), _LABEL_CHARS), total=total, unit=unit)
            self._bars.start()
        self._bars.update(self._task, completed=done or 0, total=total, unit=unit)


@contextmanager
def progress(label: str, total: int | None, unit: str = "bytes") -> Generator[StepProgress]:
    """A bar with amount, rate and time left, on stderr if that is a terminal; otherwise nothing.

    The callback's amounts are in `unit`. Without a total, the bar appears with the first amount or step.
    """
    if not sys.stderr or not sys.stderr.isatty() or total == 0:
        yield StepProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class AmountColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text("")
            rate = f" {_amount(per_s, task)}/s" if (per_s := _per_s(task)) else ""
            unit = "" if task.fields["unit"] == "bytes" else f" {task.fields['unit']}"
            return Text(f"{_amount(task.completed, task)}/{_amount(task.total, task)}{unit}{rate}", no_wrap=True)

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            left_s = ((task.total or 0) - task.completed) / per_s if (per_s := _per_s(task)) else None
            return Text("-:--:--" if left_s is None else str(timedelta(seconds=ceil(left_s))))

    def _per_s(task: Task) -> float:
        """The average rate since the start; 0 in the first second. rich's own jumps when two updates coincide."""
        elapsed_s = task.elapsed or 0
        return task.completed / elapsed_s if elapsed_s > 1 else 0

    def _amount(count: float, task: Task) -> str:
        return size(int(count)) if task.fields["unit"] == "bytes" else f"{count:.3g}" if count % 1 else f"{count:.0f}"

    columns = (TextColumn("{task.description}", markup=False), BarColumn(14), AmountColumn(), Left())
    bars = Bars(*columns, console=Console(stderr=True), transient=True)
    shown = _Bar(bars, label, total, unit)
    if total is not None:
        bars.start()
    try:
        yield shown
    finally:
        bars.stop()


def fail(error: Failure, as_json: bool) -> int:
    """Prints the error and the next step; returns the exit code of its family."""
    failure = _as_registry_error(error)
    detail = failure.detail
    if failure.code == "bad_request" and detail.startswith(f"{failure.subject}: "):
        detail = f"{_option(failure.subject)}{detail[len(failure.subject) :]}"
    say(f"error: {detail}")
    for finding in failure.findings:
        if "rule" in finding:
            say(f"  {_mark(finding)}  {_rule(finding)}: {finding['detail']}")
        elif finding.get("severity") != "notice" and f" {finding.get('message')}" not in f" {failure.detail}":
            say(f"  {finding.get('severity')}: {finding.get('message')}")
    next_step = _next_step(failure)
    if next_step:
        say(f"next: {next_step}")
    if as_json:
        print(escaped(json.dumps({"error": problem(failure)}, indent=2, ensure_ascii=False)))
    return failure.exit_code


def problem(error: Failure) -> dict[str, Any]:
    """The error as a JSON document, for `--json`."""
    failure = _as_registry_error(error)
    return {
        "family": failure.family,
        "code": failure.code,
        "detail": failure.detail,
        "subject": failure.subject,
        "next": _next_step(failure),
        "findings": failure.findings,
    }


def _as_registry_error(error: Failure) -> RegistryError:
    if isinstance(error, OSError):
        return _of_disk(error)
    return of_composer(error) if isinstance(error, ComposerError) else error


def _of_disk(error: OSError) -> Unavailable:
    where = str(error.filename or "")
    detail = ": ".join([*([where] if where else []), str(error.strerror or error)])
    next_step = "Check that it can be read and written."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        next_step = "Allow more open files (ulimit -n): a merge keeps some for each shard."
    return Unavailable("disk_error", f"{detail}.", subject=where, next_step=next_step)


def _next_step(failure: RegistryError) -> str:
    """The next step; for a bad request field, names the command-line option instead of the OpenAPI document."""
    if failure.code != "bad_request" or "/openapi.json" not in failure.next_step:
        return failure.next_step
    return f"Correct {_option(failure.subject)}; see --help."


def _option(subject: str) -> str:
    """`query.max_rank` as `--max-rank`, if that was given."""
    field = subject.partition(".")[2]
    name = "event" if field == "act" else field.partition(".")[0].replace("_", "-")
    given = any(word.partition("=")[0] == f"--{name}" for word in sys.argv)
    return f"--{name}" if given else field

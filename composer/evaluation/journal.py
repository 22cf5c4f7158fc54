"""A file of results written one by one, from which an interrupted evaluation resumes at the example where it
stopped."""

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from composer.evaluation.evaluate import Result, examine
from composer.evaluation.hooks import Deltas
from composer.evaluation.model import LoadedModel
from composer.evaluation.scorers.scorer import NO_PYTHON, PythonScorers
from composer.formats.recipes.suite import Example, Suite


class JournalFile:
    """A file of JSON lines that grows as work is done. The first line is `head`, which names what was worked on: the
    rows of anything else are discarded. A torn last line is cut off, so that its work is done again as it was.
    """

    def __init__(self, path: Path, head: object) -> None:
        self._path = path
        first, *rows = _complete_lines(path) or [""]
        self.rows: list[Any] = []
        """The rows that were in the file."""
        if first == json.dumps(head):
            self.rows = [json.loads(row) for row in rows]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{json.dumps(head)}\n", encoding="utf-8")

    def append(self, row: object) -> None:
        """Writes a row before the call returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")

    def discard(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)


class ResultJournal(JournalFile):
    """The results of one model on one suite, batch by batch. `subject` must name the model's weights and the suite's
    content."""

    def __init__(self, path: Path, subject: str) -> None:
        super().__init__(path, {"results": 1, "subject": subject})
        self.known = {
            Example(prompt, completion, tuple(choices)): Result(*result)
            for row in self.rows
            for prompt, completion, choices, *result in row
        }

    def add(self, results: Mapping[Example, Result]) -> None:
        """Records a batch, in the file before the call returns."""
        self.known.update(results)
        self.append(
            [
                [
                    example.prompt,
                    example.completion,
                    example.choices,
                    own.nats,
                    own.tokens,
                    own.score,
                    own.answer,
                    own.cut,
                ]
                for example, own in results.items()
            ]
        )

    def missing(self, examples: Collection[Example]) -> list[Example]:
        """The examples without a result, each once."""
        return [example for example in dict.fromkeys(examples) if example not in self.known]


def examine_rest(
    model: Callable[[], tuple[LoadedModel, Deltas]],
    suite: Suite,
    examples: Collection[Example],
    journal: ResultJournal,
    scorers: PythonScorers = NO_PYTHON,
    progress: Callable[[int], None] = lambda _count: None,
) -> list[Result]:
    """Examines like `examine`, without the examples that the journal has. `model` is called if any is missing, for the
    base and the deltas on it; `progress` gets the number of examples just done."""
    missing = journal.missing(examples)

    def keep(results: Mapping[int, Result]) -> None:
        journal.add({missing[index]: result for index, result in results.items()})
        progress(len(results))

    if missing:
        loaded, deltas = model()
        examine(loaded, suite, deltas, missing, scorers, keep)
    return [journal.known[example] for example in examples]


def _complete_lines(path: Path) -> list[str]:
    """The lines of the file, which is cut after the last complete one; none without a file."""
    content = b""
    with suppress(FileNotFoundError):
        content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return content[:end].decode().splitlines()

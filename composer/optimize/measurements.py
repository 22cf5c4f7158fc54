"""Measures candidates on examples, each only once, and keeps the results in a journal from which a run resumes."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from composer.evaluation.hooks import Deltas
from composer.evaluation.journal import complete_lines
from composer.evaluation.measure import Encoded, Measured, encode, measure
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.calibration_sets import example_digest
from composer.formats.recipes.suite import Example, Suite

Asked = tuple[Suite, Example]
_Key = tuple[str, str, str]
"""Who was measured, the suite's digest, the example's digest."""


class Journal:
    """What was measured: a line of JSON for each pass over a batch, appended as it comes. An unfinished last line is
    cut off, so that its pass is run again as it was: in another batch the last bits would differ.

    The first line names the problem: measurements of another one, such as one with an older suite, are discarded.
    """

    def __init__(self, path: Path | None, problem: str) -> None:
        self.known: dict[_Key, Measured] = {}
        self._path = path
        if path is None:
            return
        head = json.dumps({"problem": problem})
        lines = complete_lines(path)
        if not lines or lines[0] != head:
            path.write_text(f"{head}\n", encoding="utf-8")
            return
        for line in lines[1:]:
            for who, suite, example, nats, tokens, exact in json.loads(line):
                self.known[who, suite, example] = Measured(nats, tokens, exact)

    def add(self, measured: Iterable[tuple[_Key, Measured]]) -> None:
        """Records the results of a pass, in the file before the call returns."""
        rows = dict(measured)
        self.known |= rows
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                line = json.dumps([[*key, one.nats, one.tokens, one.exact] for key, one in rows.items()])
                file.write(f"{line}\n")


class Measurements:
    """Runs examples with deltas active. `passes` counts those that were asked for, each once, whether they were run now
    or before a restart, so that a budget ends a resumed search where it ends any other; `run` counts those run now."""

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        journal: Journal,
        progress: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._load, self._journal, self._progress = load, journal, progress
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._asked: set[_Key] = set()
        self.run = 0

    def of(self, who: str, deltas: Callable[[], Deltas], asked: Sequence[Asked]) -> list[Measured]:
        """The results for the examples, in order. The missing ones are run together, in one pass of `who`'s deltas.

        Raises what `encode`, `deltas_applied` and `deltas` raise.
        """
        keys = [(who, suite.digest, example_digest(example)) for suite, example in asked]
        self._asked.update(keys)
        missing = [
            (key, one) for key, one in dict(zip(keys, asked, strict=True)).items() if key not in self._journal.known
        ]
        if missing:
            encoded = [self._encode(suite, example) for _, (suite, example) in missing]
            measured = measure(self._load(), encoded, deltas(), progress=self._progress)
            self.run += len(missing)
            self._journal.add((key, one) for (key, _), one in zip(missing, measured, strict=True))
        return [self._journal.known[key] for key in keys]

    @property
    def passes(self) -> int:
        return len(self._asked)

    def _encode(self, suite: Suite, example: Example) -> Encoded:
        key = (suite.digest, example_digest(example))
        if key not in self._encoded:
            self._encoded[key] = encode(self._load(), example, suite.chat, suite.ends)
        return self._encoded[key]

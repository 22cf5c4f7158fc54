"""The journal of a search, from which a run resumes."""

import json
from collections.abc import Iterable
from pathlib import Path

from composer.conflicts.evidence.bench import Key, Record
from composer.evaluation.journal import complete_lines
from composer.evaluation.measure import Measured


class Journal(Record):
    """What was measured: a line of JSON for each pass over a batch, appended as it comes. An unfinished last line is
    cut off, so that its pass is run again as it was: in another batch the last bits would differ.

    The first line names the problem: measurements of another one, such as one with an older suite, are discarded.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__()
        self._path = path
        head = json.dumps({"problem": problem})
        lines = complete_lines(path)
        if not lines or lines[0] != head:
            path.write_text(f"{head}\n", encoding="utf-8")
            return
        for line in lines[1:]:
            for who, suite, example, nats, tokens, exact in json.loads(line):
                self.known[who, suite, example] = Measured(nats, tokens, exact)

    def add(self, measured: Iterable[tuple[Key, Measured]]) -> None:
        """Records the results of a pass, in the file before the call returns."""
        rows = dict(measured)
        super().add(rows.items())
        with self._path.open("a", encoding="utf-8") as file:
            line = json.dumps([[*key, one.nats, one.tokens, one.exact] for key, one in rows.items()])
            file.write(f"{line}\n")

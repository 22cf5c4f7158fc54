"""The journal of a search, from which a run resumes."""

from collections.abc import Iterable
from pathlib import Path

from composer.conflicts.evidence.bench import Key, Record
from composer.evaluation.journal import JournalFile
from composer.evaluation.measure import Measured


class Journal(Record):
    """What was measured: a row for each pass over a batch. The pass of a torn row is run again as it was: in another
    batch the last bits would differ. Measurements of another problem, such as one with an older suite, are discarded.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__()
        self._file = JournalFile(path, {"problem": problem})
        for row in self._file.rows:
            for who, suite, example, nats, tokens, exact in row:
                self.known[who, suite, example] = Measured(nats, tokens, exact)

    def add(self, measured: Iterable[tuple[Key, Measured]]) -> None:
        """Records the results of a pass, in the file before the call returns."""
        rows = dict(measured)
        super().add(rows.items())
        self._file.append([[*key, one.nats, one.tokens, one.exact] for key, one in rows.items()])

"""lm-evaluation-harness' view of a base in memory. Importing this module imports the harness.

Answers are written to a file one by one, so that an interrupted evaluation resumes at the request where it stopped.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models import huggingface

from composer.evaluation.journal import JournalFile
from composer.evaluation.model import LoadedModel

HFLM: Any = huggingface.HFLM  # its decorator hides the class from type checkers
_ROW_TOKENS = 512
_MIN_ROWS = 4
_BATCHES = 8
"""Batches between two writes to the journal."""


class AnswerJournal(JournalFile):
    """The answers of one model to requests, part by part. `subject` must name the model's weights and the task's
    content."""

    def __init__(self, path: Path, subject: str) -> None:
        super().__init__(path, {"answers": 1, "subject": subject})
        self.known: dict[str, Any] = {key: answer for part in self.rows for key, answer in part.items()}

    def add(self, answers: dict[str, Any]) -> None:
        """Records answers by key, in the file before the call returns."""
        self.known |= answers
        self.append(answers)


class HarnessModel(HFLM):
    """A loaded base that answers the harness' requests, with the deltas that are active at the moment.

    `journal` keeps the answers; `progress` is called with how many requests are answered, and of how many.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        rows = max(_MIN_ROWS, loaded.batch_tokens // _ROW_TOKENS)
        # The harness adds a padding token to its tokenizer.
        super().__init__(loaded.model, tokenizer=deepcopy(loaded.tokenizer), backend="causal", batch_size=rows)
        self._device = loaded.device
        self._part = rows * _BATCHES
        self.journal: AnswerJournal | None = None
        self.progress: Callable[[int, int], None] = lambda _done, _total: None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        rows = self._answered("loglikelihood", requests, lambda part: HFLM.loglikelihood(self, part, True))
        return [(nats, greedy) for nats, greedy in rows]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return self._answered("rolling", requests, lambda part: HFLM.loglikelihood_rolling(self, part, True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._answered("generate", requests, lambda part: HFLM.generate_until(self, part, True))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _answered(
        self, kind: str, requests: Sequence[Instance], answer: Callable[[list[Instance]], Sequence[Any]]
    ) -> list[Any]:
        """The answers in the order of the requests. Long ones come first, those with the same context together: the
        peak of memory comes at the start, and a context is computed once."""
        keys, known = _keys(kind, requests), self.journal.known if self.journal else {}
        order = sorted(range(len(keys)), key=lambda index: (-len(str(requests[index].args[0])), keys[index]))
        order = [index for index in order if keys[index] not in known]
        self.progress(len(keys) - len(order), len(keys))
        for begin in range(0, len(order), self._part):
            part = order[begin : begin + self._part]
            answers = answer([requests[index] for index in part])
            new = {keys[index]: answer for index, answer in zip(part, answers, strict=True)}
            if self.journal:
                self.journal.add(new)
            known |= new
            self.progress(len(keys) - len(order) + begin + len(part), len(keys))
        return [known[key] for key in keys]


def _keys(kind: str, requests: Sequence[Instance]) -> list[str]:
    """A key for each request; equal requests, as of repeated draws, are numbered."""
    seen: Counter[str] = Counter()
    keys: list[str] = []
    for request in requests:
        text = json.dumps([kind, *request.args], sort_keys=True, default=str)
        digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys

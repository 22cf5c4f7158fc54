"""Scores that a release's files report: the `model-index` of a model card, and Hugging Face's `.eval_results/*.yaml`.

The files are untrusted and the scores are claims. An unusable part is a finding, never an error: no release should fail
because of its README.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import cast

from composer.errors import InvalidFile
from composer.findings import Finding, Severity
from composer.formats.checkpoints.card import CARD_FILE, FRONT_MATTER_BYTES, front_matter, load_bounded
from composer.formats.untrusted import LONE_SURROGATE, printable

DIRECTORY = ".eval_results/"
MAX_FILES = 20
MAX_FILE_BYTES = FRONT_MATTER_BYTES
MAX_SCORES = 100
MAX_FINDINGS = 20
_MAX_TEXT = 200
_MAX_METRIC = 64
_RESULTS_FILE = re.compile(r"\.eval_results/[A-Za-z0-9_-][A-Za-z0-9._-]*\.ya?ml")
_NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d{1,18})?(?:[eE][+-]?\d{1,3})?")
_UNFIT = re.compile(r"[^a-z0-9_]+")
_LOWER = re.compile(
    r"(?:\w+_)?(?:loss|nll|perplexity|ppl|wer|cer|mer|ter|mse|rmse|mae|brier_score|ece|fid|bits_per_byte|toxicity)"
)
_HIGHER = re.compile(
    r"(?:\w+_)?(?:acc|accuracy|acc_norm|exact_match|em|f1|precision|recall|mcc|matthews_correlation|matthews_corrcoef"
    r"|pearson|pearsonr|spearman|spearmanr|auc|roc_auc|map|mrr|ndcg|bleu|sacrebleu|chrf|rouge\w*|meteor|bertscore"
    r"|comet|score|reward|win_rate|pass_\d+|pass_at_\d+|mc1|mc2)(?:_(?:micro|macro|weighted|at_\d+|\d+))?"
)
SCORE = "score"
"""The metric of an entry without one. Higher values are better, as on the leaderboards that read `.eval_results`."""


@dataclass(frozen=True, slots=True)
class ReportedScore:
    """One reported value: of a data set, with its configuration and split if they are stated, in the units of
    its source. `revision` is the data set's; `source` is the file."""

    dataset: str
    config: str | None
    split: str | None
    metric: str
    value: float
    higher_is_better: bool
    revision: str | None
    source: str


def is_results_file(path: str) -> bool:
    """Whether the path is one of `.eval_results/*.yaml`."""
    return bool(_RESULTS_FILE.fullmatch(path))


def reported_scores(files: Mapping[str, bytes]) -> tuple[list[ReportedScore], list[Finding]]:
    """The scores that a card and files of `.eval_results/` report, by path, and a warning for each that cannot be used.
    Of several values of one metric the first counts; `.eval_results` come before the card."""
    known: dict[tuple[str, str | None, str | None, str], ReportedScore] = {}
    doubts: list[Finding] = []
    for path in sorted(files, key=lambda path: (path == CARD_FILE, path)):
        entries = _of_card if path == CARD_FILE else _of_results
        try:
            for entry in entries(path, files[path]):
                if isinstance(entry, Finding):
                    doubts.append(entry)
                else:
                    known.setdefault((entry.dataset, entry.config, entry.split, entry.metric), entry)
        except InvalidFile as error:
            if path != CARD_FILE:  # reading the card's provenance reports this for a card
                doubts.append(doubt(path, error.message))
    scores = list(known.values())
    if len(scores) > MAX_SCORES:
        doubts.append(doubt(CARD_FILE, f"Only the first {MAX_SCORES} of {len(scores)} reported scores are kept."))
    if len(doubts) > MAX_FINDINGS:
        more = len(doubts) - MAX_FINDINGS
        doubts = [*doubts[:MAX_FINDINGS], doubt(CARD_FILE, f"{more} more reported scores cannot be used.")]
    return scores[:MAX_SCORES], doubts


def doubt(subject: str, message: str) -> Finding:
    """The finding about a reported score that is not kept."""
    return Finding("reported_score", Severity.WARNING, subject, message)


def _of_card(path: str, content: bytes) -> Iterator[ReportedScore | Finding]:
    stated, source = front_matter(content).get("model-index"), f"{path} (model-index)"
    for model in () if stated is None else _items(stated, source, "it"):
        if isinstance(model, Finding):
            yield model
            continue
        for result in _items(_field(model, "results"), source, "`results` of a model"):
            if isinstance(result, Finding):
                yield result
                continue
            data = _field(result, "dataset")
            for metric in _items(_field(result, "metrics"), source, "`metrics` of a result"):
                if isinstance(metric, Finding):
                    yield metric
                    continue
                name = _field(metric, "type") or _field(metric, "name")
                yield _entry(source, data, name, _field(metric, "value"), _field(data, "config"))


def _of_results(path: str, content: bytes) -> Iterator[ReportedScore | Finding]:
    for entry in _items(load_bounded(content.decode("utf-8", "replace"), path), path, "it"):
        if isinstance(entry, Finding):
            yield entry
            continue
        data = _field(entry, "dataset")
        task = _field(data, "task_id")
        if _is_metric(task):
            yield _entry(path, data, task, _field(entry, "value"), None)
        else:
            yield _entry(path, data, SCORE, _field(entry, "value"), None if task == "default" else task)


def _entry(source: str, data: object, metric: object, value: object, config: object) -> ReportedScore | Finding:
    """The score, or why it cannot be used."""
    dataset = _field(data, "id") or _field(data, "type") or _field(data, "name")
    where = f"{source}: the score of {printable(dataset)}" if isinstance(dataset, str) else f"{source}: a score"
    try:
        number, name = _number(value), _metric(metric)
        higher = _direction(name)
        return ReportedScore(
            dataset=_text(dataset, "the data set"),
            config=_optional(config, "the configuration"),
            split=_optional(_field(data, "split"), "the split"),
            metric=name,
            value=number,
            higher_is_better=higher,
            revision=_optional(_field(data, "revision"), "the revision"),
            source=source,
        )
    except ValueError as error:
        return doubt(source, f"{where} is not kept: {error}.")


def _field(value: object, name: str) -> object:
    return cast("dict[object, object]", value).get(name) if isinstance(value, dict) else None


def _items(value: object, source: str, what: str) -> Iterator[object]:
    """The mappings of a list, and a finding for anything else."""
    if not isinstance(value, list):
        yield doubt(source, f"{source}: {what} is not a list.")
        return
    for item in cast("list[object]", value):
        if isinstance(item, dict):
            yield cast(object, item)
        else:
            yield doubt(source, f"{source}: {printable(item)} in {what} is not a mapping.")


def _number(value: object) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e100 or not isfinite(value):
        raise ValueError(f"{printable(value)} is not a number")
    return float(value)


def _metric(value: object) -> str:
    """`Pass@1` becomes `pass_1`."""
    name = _UNFIT.sub("_", value.lower()).strip("_") if isinstance(value, str) else ""
    if not name or not (name[0].isalpha() or name[0] == "_") or len(name) > _MAX_METRIC:
        raise ValueError(f"{printable(value)} is not the name of a metric")
    return name


def _is_metric(task: object) -> bool:
    """Whether the task of an entry is a metric's name, as in the files that `adaptory export` writes."""
    return isinstance(task, str) and bool(_LOWER.fullmatch(task) or _HIGHER.fullmatch(task))


def _direction(metric: str) -> bool:
    if _LOWER.fullmatch(metric):
        return False
    if _HIGHER.fullmatch(metric):
        return True
    raise ValueError(f"whether higher or lower {metric} is better is not known")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} has no name")
    text = value.strip()
    if len(text) > _MAX_TEXT or "\0" in text or LONE_SURROGATE.search(text):
        raise ValueError(f"the name of {what} has more than {_MAX_TEXT} characters, or some that cannot be stored")
    return text


def _optional(value: object, what: str) -> str | None:
    return None if value is None else _text(value if isinstance(value, str) else str(value)[: _MAX_TEXT + 1], what)

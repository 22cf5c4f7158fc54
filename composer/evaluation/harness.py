"""Tasks of lm-evaluation-harness on a base with deltas active, scored as the harness scores them.

A task is identified by its configuration, the version of the harness and its documents. The harness is imported when
tasks are loaded.
"""

import json
import random
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.errors import ComposerError, Interrupted, InvalidFile, Mismatch, NotSupported
from composer.evaluation.evaluate import MAX_ANSWER_CHARS, SuiteScore
from composer.evaluation.hooks import Deltas, deltas_applied
from composer.evaluation.measure import no_chat_template
from composer.formats.recipes.elsewhere import Documents, HarnessTask, HarnessVersion
from composer.formats.recipes.suite import METRIC, NAME

if TYPE_CHECKING:
    from composer.evaluation.harness_model import AnswerJournal, HarnessModel

HARNESS = "lm-eval"
MAX_TASKS = 500
SEEDS = (0, 1234)
"""The seeds of Python, numpy, torch and the choice of few-shot examples: the harness's own defaults."""
BOOTSTRAPS = 1_000
_ELSEWHERE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata", "tag", "task_alias", "custom_dataset")
"""Fields of a configuration that describe the source of documents, which are identified by their content, and
labels."""
_IDENTITY = ("harness", "config", "documents")
_UNFIT = re.compile(r"[^a-z0-9_]+")
_NUMBERS = re.compile(r"\d{1,9}")


@dataclass(frozen=True, slots=True)
class Asked:
    """The form of the prompts: after `num_fewshot` examples, by default the task's own number, and with `chat` in the
    turns of the base's chat template. The harness keeps a task's own number if it is 0."""

    num_fewshot: int | None = None
    chat: bool = False

    @property
    def config(self) -> dict[str, object]:
        """The part of a suite's content that states it."""
        return {"apply_chat_template": True} if self.chat else {}


PLAINLY = Asked()


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task that the harness has loaded, the form of its prompts, and its suite."""

    suite: HarnessTask
    task: Any
    chat: bool = False


@dataclass(frozen=True, slots=True)
class LoadedGroup:
    """A group whose score is computed from those of its `members`, by the names of their tasks."""

    suite: HarnessTask
    group: Any
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks by their own names, each once, and the groups with a score of their own."""

    tasks: Mapping[str, LoadedTask]
    groups: Sequence[LoadedGroup] = ()

    @property
    def suites(self) -> list[HarnessTask]:
        return [task.suite for task in (*self.tasks.values(), *self.groups)]


@dataclass(slots=True)
class TaskScores:
    """The scores of a task. `examples` has the score of each document in order, if the harness gives one from 0 to 1 of
    `metric`, and the answer; empty otherwise. `skipped` names the metrics that have no score."""

    scores: list[SuiteScore]
    metric: str = ""
    examples: list[dict[str, object]] = field(default_factory=list[dict[str, object]])
    skipped: list[str] = field(default_factory=list[str])
    aggregated: dict[str, object] = field(default_factory=dict[str, Any])


def source() -> str:
    """The harness and its version, as scores name it."""
    return f"{HARNESS} {version(HARNESS)}"


def load_suite(suite: HarnessTask, directory: Path | None = None) -> Plan:
    """Loads the task or the group that a suite was made of, as `load_tasks`. Raises NotSupported if that has
    different content here: another version of the harness, other documents or another configuration."""
    name = suite.config.get("group", suite.config.get("task"))
    asked = Asked(suite.config.get("num_fewshot"), bool(suite.config.get("apply_chat_template")))
    plan = load_tasks([str(name)], directory, asked)
    here = next((known for known in plan.suites if known.name == suite.name), None)
    if here is None or here.digest != suite.digest:
        differs = [part for part in _IDENTITY if here is not None and getattr(here, part) != getattr(suite, part)]
        why = f": {' and '.join(differs)} differ" if differs else ""
        raise NotSupported(
            "harness_differs",
            f"{suite.name} was recorded with {suite.harness.name} {suite.harness.version}; here {source()} gives it "
            f"different content{why}.",
            subject=suite.name,
            next_step="Install the same version where workers run, with the same data; or record the task again.",
        )
    return plan


def load_tasks(names: Sequence[str], directory: Path | None = None, asked: Asked = PLAINLY) -> Plan:
    """Loads tasks and groups by name: those that come with the harness or, with `directory`, those of the YAML files in
    it, whose `!function` runs code of that directory.

    Raises Mismatch for an unknown name, and InvalidFile for one that the harness cannot load.
    """
    from lm_eval.tasks import TaskManager

    if directory and not directory.is_dir():
        message = f"{directory} is not a directory."
        raise Mismatch(
            "harness_task_unknown", message, subject=str(directory), next_step="Name one of task YAML files."
        )
    manager = TaskManager(include_path=str(directory) if directory else None, include_defaults=directory is None)
    tasks: dict[str, LoadedTask] = {}
    groups: dict[str, LoadedGroup] = {}
    for name in dict.fromkeys(names):
        if name not in manager.task_index:
            known = ", ".join(sorted(manager.all_tasks)[:10]) if directory else ""
            where = f"{directory} has {known or 'none'}" if directory else "`lm-eval ls tasks` lists the known ones"
            raise Mismatch(
                "harness_task_unknown",
                f"{HARNESS} does not know the task {name!r}.",
                subject=name,
                next_step=f"{where}.",
            )
        with redirect_stdout(sys.stderr), _translated(name, "load"):
            loaded = manager.load([name])
        for own, task in loaded["tasks"].items():
            if own not in tasks:
                tasks[own] = _task(own, task, asked)
        for own, group in loaded.get("groups", {}).items():
            if group.has_aggregation and own not in groups:
                groups[own] = _group(own, group, tasks, asked)
    if len(tasks) > MAX_TASKS:
        message = f"{', '.join(names)} are {len(tasks)} tasks, and at most {MAX_TASKS} are run at once."
        raise Mismatch("harness_task_unusable", message, subject=names[0], next_step="Name fewer.")
    return Plan(tasks, list(groups.values()))


def run_task(
    model: "HarnessModel",
    loaded: LoadedTask,
    deltas: Deltas,
    journal: "AnswerJournal | None" = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    limit: int | None = None,
) -> TaskScores:
    """The task's scores with `deltas` active; of its first `limit` documents, if that is given. Raises InvalidFile if
    the harness cannot run it."""
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])  # the harness draws from it
    torch.manual_seed(SEEDS[1])
    model.journal, model.progress = journal, progress
    name = loaded.task.task_name
    if loaded.chat and model.tokenizer.chat_template is None:
        raise no_chat_template(loaded.suite.name)
    with deltas_applied(model.model, deltas), redirect_stdout(sys.stderr), _translated(loaded.suite.name, "run"):
        results: Any = evaluate(
            model,
            {"tasks": {name: loaded.task}},
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            apply_chat_template=loaded.chat,
            fewshot_as_multiturn=loaded.chat,  # the default of `lm-eval run`
        )
    outcome = _outcome(loaded.suite, results["results"][name], loaded.task.higher_is_better())
    _add_examples(outcome, loaded.task, results["samples"][name])
    return outcome


def run_group(loaded: LoadedGroup, outcomes: Mapping[str, TaskScores]) -> TaskScores:
    """The group's scores, which the harness computes from those of its members."""
    own = {name: outcomes[name].aggregated for name in loaded.members}
    directions: dict[str, bool] = {}
    for task in loaded.group.get_all_tasks():
        directions |= task.higher_is_better()
    return _outcome(loaded.suite, loaded.group.aggregate(own), directions)


@contextmanager
def _translated(name: str, verb: str) -> Generator[None]:
    """Translates errors of the harness or of a task's own code into InvalidFile."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ComposerError, Interrupted):
        raise
    except Exception as error:
        raise InvalidFile(
            "harness_task_unusable",
            f"{HARNESS} cannot {verb} {name}: {type(error).__name__}: {str(error)[:500]}",
            subject=name,
        ) from error


def _task(name: str, task: Any, asked: Asked) -> LoadedTask:
    stated = task.get_config("num_fewshot")
    own = stated or 0
    shots = own if asked.num_fewshot is None or stated == 0 else asked.num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=SEEDS[1])
    with redirect_stdout(sys.stderr), _translated(name, "load"):
        config = {key: own for key, own in task.dump_config().items() if key not in _ELSEWHERE}
        documents = _documents(task.eval_docs)
        if task.get_config("num_fewshot"):
            config["fewshot_documents"] = _documents(task.fewshot_docs() or []).sha256
        config = json.loads(json.dumps(config | asked.config, sort_keys=True, default=_name_of))
    filters = [ensemble.name for ensemble in getattr(task, "_filters", [])] or ["none"]
    pairs = [(metric, filter_) for metric in task.higher_is_better() for filter_ in filters]
    label = _label(task.VERSION, shots if shots != own else None, chat=asked.chat)
    return LoadedTask(_suite(name, label, config, documents, task.higher_is_better(), pairs), task, asked.chat)


def _group(name: str, group: Any, tasks: Mapping[str, LoadedTask], asked: Asked) -> LoadedGroup:
    members = tuple(task.task_name for task in group.get_all_tasks())
    own = {member: tasks[member].suite.digest for member in members}
    counts = sum(tasks[member].suite.count for member in members)
    digest = sha256("".join(tasks[member].suite.documents.sha256 for member in members).encode()).hexdigest()
    aggregated = json.loads(json.dumps(group.aggregate_metric_list, sort_keys=True, default=_fields_of))
    config: dict[str, object] = {"group": name, "members": own, "aggregate": aggregated} | asked.config
    if asked.num_fewshot is not None:
        config["num_fewshot"] = asked.num_fewshot
    directions: dict[str, bool] = {}
    pairs: dict[tuple[str, str], None] = {}
    for member in members:
        directions |= tasks[member].task.higher_is_better()
        pairs |= {(metric, ensemble.name): None for metric in directions for ensemble in tasks[member].task._filters}
    documents = Documents(count=counts, sha256=digest)
    label = _label(group.version, asked.num_fewshot, chat=asked.chat)
    return LoadedGroup(_suite(name, label, config, documents, directions, list(pairs)), group, members)


def _suite(
    name: str,
    label: str,
    config: dict[str, object],
    documents: Documents,
    directions: Mapping[str, Any],
    pairs: Iterable[tuple[str, str]],
) -> HarnessTask:
    stated = {
        _metric(*pair): "higher" if directions[pair[0]] else "lower"
        for pair in pairs
        if directions[pair[0]] is not None
    }
    return HarnessTask.model_validate(
        {
            "name": _suite_name(name),
            "version": label,
            "task": "harness",
            "harness": HarnessVersion(name=HARNESS, version=version(HARNESS)),
            "config": config,
            "documents": documents,
            "metrics": {metric: better for metric, better in stated.items() if metric not in ("nll", "accuracy")},
        }
    )


def _suite_name(name: str) -> str:
    """The task's name in the characters of suites."""
    text = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")
    if len(text) > 64:
        text = f"{text[:55]}-{sha256(name.encode()).hexdigest()[:8]}"
    if not NAME.fullmatch(text):
        message = f"{name!r} cannot be the name of a suite."
        raise Mismatch("harness_task_unusable", message, subject=name, next_step="Give the task another name.")
    return text


def _label(task_version: object, shots: int | None, *, chat: bool) -> str:
    """A semantic version: the task's, as far as it is one, with that of the harness as its pre-release, and the form
    of the prompts if that is not the task's own."""
    numbers = (
        [str(int(number)) for number in _NUMBERS.findall(str(task_version))][:3] if task_version is not None else []
    )
    build = ".".join(re.sub(r"[^0-9A-Za-z-]", "-", part) for part in version(HARNESS).split(".") if part)
    how = (f".{shots}-shot" if shots is not None else "") + (".chat" if chat else "")
    return f"{'.'.join([*numbers, '0', '0', '0'][:3])}-{HARNESS}.{build}{how}"


def _documents(documents: Iterable[Any]) -> Documents:
    """The number of documents, and one hash over the canonical JSON of each."""
    count, digest = 0, sha256()
    for count, document in enumerate(documents, start=1):  # noqa: B007
        text = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(sha256(text.encode("utf-8", "surrogatepass")).digest())
    return Documents(count=count, sha256=digest.hexdigest())


def _name_of(value: object) -> object:
    """The text for a value that JSON does not have, without its address in memory."""
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _fields_of(value: object) -> object:
    return (
        {key: own for key, own in vars(value).items() if not key.startswith("_")}
        if hasattr(value, "__dict__")
        else str(value)
    )


def _metric(metric: str, filter_name: str) -> str:
    """`exact_match` of the filter strict-match becomes `exact_match_strict_match`; that of no filter stays."""
    text = metric if filter_name == "none" else f"{metric}_{filter_name}"
    return _UNFIT.sub("_", text.lower()).strip("_")[:64]


def _outcome(suite: HarnessTask, values: Mapping[str, Any], directions: Mapping[str, Any]) -> TaskScores:
    outcome, n = TaskScores([], aggregated=dict(values)), int(values.get("sample_len", 0))
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name, better = _metric(metric, filter_name), directions.get(metric)
        number = _number(value)
        if number is None or better is None or not METRIC.fullmatch(name):
            why = "it is not a number" if number is None else "the harness does not state which direction is better"
            outcome.skipped.append(f"{suite.name}: {key} is not recorded: {why}.")
            continue
        stderr = _number(values.get(f"{metric}_stderr,{filter_name}"))
        scored = (suite.name, suite.digest, suite.task, name, number, stderr, n)
        outcome.scores.append(SuiteScore(*scored, higher_is_better=bool(better)))
    return outcome


def _number(value: object) -> float | None:
    """A plain finite float; numpy's own are converted."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
    return number if isfinite(number) else None


def _add_examples(outcome: TaskScores, task: Any, samples: Sequence[Mapping[str, Any]]) -> None:
    """Adds the first score's value of each document, if it has one from 0 to 1 of all."""
    names = {score.metric for score in outcome.scores}
    for key in outcome.aggregated:
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or _metric(metric, filter_name) not in names:
            continue
        own = sorted((sample for sample in samples if sample["filter"] == filter_name), key=lambda one: one["doc_id"])
        values = [_number(sample.get(metric)) for sample in own]
        score = next(known for known in outcome.scores if known.metric == _metric(metric, filter_name))
        if len(values) == score.n and all(value is not None and 0 <= value <= 1 for value in values):
            outcome.metric = score.metric
            outcome.examples = [
                {"score": value, **_answer(task, sample)} for value, sample in zip(values, own, strict=True)
            ]
            return


def _answer(task: Any, sample: Mapping[str, Any]) -> dict[str, object]:
    """The generated text, or the likeliest of several continuations."""
    answers = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice" and len(answers) == len(sample["arguments"]) > 0:
        nats = [float(answer[0]) for answer in answers]
        text = str(sample["arguments"][nats.index(max(nats))][1]).strip()
    elif task.OUTPUT_TYPE == "generate_until" and answers:
        text = str(answers[0])
    else:
        return {}
    return {"answer": text[:MAX_ANSWER_CHARS].replace("\0", "\ufffd")}

"""A callback of transformers' Trainer and TRL's trainers that publishes the adapter they train."""

import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from composer.errors import ComposerError
from registry.errors import Conflict, NotFound, RegistryError, Usage
from registry.formats.references import single_version
from registry.sdk.fit import base_by_name_or_location
from registry.sdk.registry import Registry
from registry.sdk.results import Release, Score
from registry.wire.quality import SuiteOut

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "optim", "weight_decay", "adam_beta1",
    "adam_beta2", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "seed",
    "max_length", "packing", "completion_only_loss", "assistant_only_loss", "loss_type", "beta",
)  # fmt: skip
"""Arguments of transformers, then of TRL, that are kept as hyperparameters. Those of LoRA are in the adapter."""
_NO_METRICS = ("epoch", "_runtime", "_per_second", "_preparation_time", "_num_tokens")
_PREFIX = "eval_"


class AdaptoryCallback(TrainerCallback):
    """Publishes the PEFT adapter at the end of the training, as `target`: REPO:VERSION, or REPO with a `bump`.

    With `every_save`, also publishes each checkpoint when it is saved: as the pre-release `VERSION-step.N` if a version
    was stated, else with the same `bump`. A checkpoint that cannot be published is a warning, and the training goes
    on. At the end the error is raised, after the adapter was saved in `OUTPUT_DIR/adaptory`.

    The release says which arguments it was trained with (SETTINGS, overridden by `hyperparameters`), the steps, the
    last evaluation until then and its step, the names of the `data`, the trainer with its version, and the commit of
    the git repository around the working directory. `provenance` adds the rest, such as `license` and `run_url`, and
    wins. `suite` is a registered suite that the evaluations are of: the metrics that its file declares (`metrics:
    {loss: lower}`) are recorded as reported scores, if they were evaluated at the published step. `url`, `token` and
    `profile` are those of `Registry`.

    Only rank 0 publishes. Before the training starts, it raises what would fail at its end: NotFound for an unknown
    base or suite, Conflict for an existing version, Usage for a model without an adapter.

    >>> from peft import LoraConfig
    >>> from trl import SFTTrainer

    >>> callback = AdaptoryCallback("acme/support", bump="auto", base="smollm2", data=["acme/tickets"])
    >>> lora = LoraConfig(task_type="CAUSAL_LM")
    >>> trainer = SFTTrainer("base", args, train_dataset=train, peft_config=lora, callbacks=[callback])
    >>> trainer.train()
    >>> print(callback.releases)
    """

    def __init__(  # noqa: PLR0913
        self,
        target: str,
        *,
        bump: str | None = None,
        base: str | None = None,
        every_save: bool = False,
        data: Sequence[str | Mapping[str, str]] = (),
        suite: str | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        url: str | None = None,
        token: str | None = None,
        profile: str | None = None,
    ) -> None:
        reference = single_version(target, bump)
        if every_save and reference.version and not reference.version.stable:
            message = f"{target} is a pre-release: those of its checkpoints would come after it."
            raise Usage("bad_target", message, subject=target, next_step="State a stable version, or use a bump.")
        self._target, self._stated, self._bump, self._base = target, reference.version is not None, bump, base
        self._every_save, self._suite = every_save, suite
        self._hyperparameters, self._provenance = dict(hyperparameters or {}), dict(provenance or {})
        self._data = [{"name": source} if isinstance(source, str) else dict(source) for source in data]
        self._where = {"url": url, "token": token, "profile": profile}
        self._commit: str | None = None
        self._evaluations: dict[int, _Evaluation] = {}
        self._directions = {"accuracy": True, "nll": False}  # of every suite
        self._suite_examples = 0
        self._published_step = -1
        self.releases: list[Release] = []
        """What was published, the oldest first."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Raises what would fail at the end."""
        if not state.is_world_process_zero:
            return
        if not hasattr(context["model"], "peft_config"):
            message = "The model that is trained has no PEFT adapter."
            step = "Wrap it with get_peft_model, or give TRL's trainer a peft_config."
            raise Usage("not_peft", message, next_step=step)
        self._commit = _commit_here()
        with Registry(**self._where) as registry:
            if self._base is not None:
                base_by_name_or_location(registry.api, self._base)
            if self._suite is not None:
                suite = registry.api.get(f"/v1/suites/{quote(self._suite, safe='')}", SuiteOut)
                self._suite_examples = suite.examples
                self._directions |= {name: better == "higher" for name, better in suite.metrics.items()}
            if self._stated:
                _refuse_existing(registry, self._target)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Keeps the metrics; those of several data sets come one after the other."""
        step = state.global_step
        self._evaluations.setdefault(step, _Evaluation(step)).add(context["metrics"], context.get("eval_dataloader"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any) -> None:
        """Publishes the checkpoint, or warns that it could not."""
        if not self._every_save or not state.is_world_process_zero:
            return
        step = state.global_step
        target = f"{self._target}-step.{step}" if self._stated else self._target
        try:
            self._publish(Path(args.output_dir or ".") / f"checkpoint-{step}", target, args, step)
        except (RegistryError, ComposerError, OSError) as error:
            warnings.warn(f"The adapter of step {step} was not published: {error}", stacklevel=2)
        else:
            self._published_step = step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Publishes the adapter as it is now, with `load_best_model_at_end` the best one. Raises what keeps it from
        that."""
        if not state.is_world_process_zero:
            return
        best = (
            getattr(state, "best_global_step", None) if args.load_best_model_at_end else None
        )  # older versions lack it
        step = state.global_step if best is None else best
        if not self._stated and self._published_step == step:
            return  # the last checkpoint is this adapter
        directory = Path(args.output_dir or ".") / "adaptory"
        context["model"].save_pretrained(directory)
        if (processing := context.get("processing_class")) is not None:
            processing.save_pretrained(directory)
        try:
            self._publish(directory, self._target, args, step)
        except (RegistryError, ComposerError, OSError) as error:
            bump = f" --bump {self._bump}" if self._bump else ""
            error.add_note(f"The adapter is in {directory}: adaptory push {directory} {self._target}{bump}")
            raise
        shutil.rmtree(directory)

    def _publish(self, directory: Path, target: str, args: TrainingArguments, step: int) -> None:
        """Publishes the adapter as it was after a step."""
        trainer = _trainer(args)
        before = [at for at in self._evaluations if at <= step]
        evaluation = self._evaluations[max(before)] if before else None
        measured: dict[str, float] = {"steps": step}
        if evaluation is not None:
            measured |= evaluation.metrics | {"eval_step": evaluation.step}
        known = {
            "trainer": trainer,
            "code_commit": self._commit,
            "data": self._data,
            "hyperparameters": {**_settings(args), **measured, **self._hyperparameters},
        }
        stated = {name: value for name, value in known.items() if value} | self._provenance
        with Registry(**self._where) as registry:
            release = registry.push(directory, target, bump=self._bump, base=self._base, provenance=stated)
            self.releases.append(release)
            if evaluation is not None and evaluation.step == step and (scores := self._scores(evaluation, trainer)):
                registry.record_scores(release, scores)

    def _scores(self, evaluation: "_Evaluation", source: str) -> list[Score]:
        """The evaluation as scores on the suite; none of a data set whose size is not known, or that has more examples
        than the suite."""
        if self._suite is None or not evaluation.examples:
            return []
        if evaluation.examples > self._suite_examples:
            message = f"The evaluation has {evaluation.examples} examples, {self._suite} only {self._suite_examples}"
            warnings.warn(f"{message}: it is not recorded as scores on that.", stacklevel=2)
            return []
        metrics = {name.removeprefix(_PREFIX): value for name, value in evaluation.metrics.items()}
        return [
            Score(
                suite=self._suite,
                metric=name,
                value=value,
                n=evaluation.examples,
                higher_is_better=self._directions[name],
                reported=True,
                source=source,
            )
            for name, value in metrics.items()
            if name in self._directions
        ]


class _Evaluation:
    """The metrics of the evaluation after a step, and the number of its examples, 0 if that is not known."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.metrics: dict[str, float] = {}
        self.examples = 0

    def add(self, metrics: Mapping[str, Any], loader: Any) -> None:
        self.metrics |= {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and isfinite(value) and not name.endswith(_NO_METRICS)
        }
        with suppress(AttributeError, TypeError):  # a stream of examples has no length
            self.examples = len(loader.dataset)


def _refuse_existing(registry: Registry, target: str) -> None:
    try:
        registry.resolve(target)
    except NotFound:
        return
    message = f"{target} is published already; a release never changes."
    raise Conflict("version_exists", message, subject=target, next_step="State another version, or use a bump.")


def _settings(args: TrainingArguments) -> dict[str, bool | int | float | str]:
    """The stated SETTINGS."""
    settings: dict[str, bool | int | float | str] = {}
    for name in SETTINGS:
        value = getattr(args, name, None)
        value = value.value if isinstance(value, Enum) else value
        if isinstance(value, bool | int | float | str) and value != "" and (name, value) != ("max_steps", -1):
            settings[name] = value
    return settings


def _trainer(args: TrainingArguments) -> str:
    """The distribution whose arguments these are, with its version: `trl 1.16.0`."""
    for ancestor in type(args).__mro__:
        package = ancestor.__module__.partition(".")[0]
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return type(args).__name__


def _commit_here() -> str | None:
    """The commit of the git repository around the working directory, with `-dirty` if files differ from it."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no input of others
    return ran.stdout.strip() or None

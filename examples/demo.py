"""The complete story on a real language model: `make demo`, or `python examples/demo.py --dir .demo`.

Everything is done by the `adaptory` command on an embedded registry. The commands are printed as they run, so that you
can repeat each one. Only the base is kept from one run to the next.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import serve

EXAMPLES = Path(__file__).resolve().parent
ADAPTERS = EXAMPLES / "adapters"
ADAPTORY = Path(sys.executable).with_name("adaptory")
SUITES = ("sql-exact", "terraform-exact", "support-exact", "guard-general")
GUARD = "guard-instructions"
"""Instructions with the base's own answers, which the demo makes."""
TEAMS = {"sql-migration": "sql-exact", "terraform-review": "terraform-exact", "support-macros": "support-exact"}
COMBINED = ("sql-migration", "terraform-review")
LOGIT_TOLERANCE = 0.05
"""Norm of the difference between the two models' logits, relative to the norm of the logits: merging rounds to bf16
once."""


@dataclass
class Story:
    """Runs commands in an environment that contains only the demo's own registry."""

    directory: Path
    started: float = field(default_factory=time.monotonic)
    url: str | None = None
    """The registry's server; without one, commands open the registry themselves."""

    @property
    def base(self) -> Path:
        return self.directory / "base"

    @property
    def home(self) -> Path:
        return self.directory / "registry"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return kept | quiet | {"ADAPTORY_HOME": str(self.home)} | ({"ADAPTORY_URL": self.url} if self.url else {})

    def chapter(self, title: str) -> None:
        print(f"\n[{time.monotonic() - self.started:5.1f} s] {title}", flush=True)

    def run(self, *arguments: str | Path, expect: int = 0) -> None:
        """Runs a command and prints it as a user would type it; any exit code other than the expected one ends the
        demo."""
        print(self.typed(arguments), flush=True)
        code = subprocess.run([ADAPTORY, *arguments], env=self.environment, check=False).returncode
        if code != expect:
            sys.exit(f"demo: expected exit code {expect}, got {code}")
        if expect:
            print(f"(exit code {code})")

    @staticmethod
    def typed(arguments: Sequence[str | Path]) -> str:
        return typed(["adaptory", *map(shown, arguments)])

    def ask(self, *arguments: str | Path) -> Any:
        """Returns the JSON document of a command, without printing it."""
        ran = subprocess.run([ADAPTORY, *arguments, "--json"], env=self.environment, check=True, capture_output=True)
        return json.loads(ran.stdout)


def shown(argument: str | Path) -> str:
    """Quotes the argument as a shell needs it, with paths relative to the directory where the demo was started."""
    text = str(argument)
    if isinstance(argument, Path) and argument.is_relative_to(Path.cwd()):
        text = str(argument.relative_to(Path.cwd()))
    return f"'{text}'" if any(character in text for character in " ><=*") else text


def typed(words: Sequence[str]) -> str:
    """A command as one types it, continued on the next line before it is wider than a terminal of 80 columns. An option
    stays with its value."""
    lines = ["$"]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        together = len(word) + (1 + len(following) if word.startswith("-") else 0)
        is_value = lines[-1].rpartition(" ")[2].startswith("-") and not word.startswith("-")
        if len(lines[-1]) + together > 76 and not is_value:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def prepare(story: Story) -> None:
    story.chapter("A real base: SmolLM2-135M-Instruct as an ordinary checkpoint")
    if not story.base.is_dir():  # the directory appears only when it is complete
        subprocess.run([sys.executable, EXAMPLES / "make_base.py", story.base], check=True)
    shutil.rmtree(story.home, ignore_errors=True)
    shutil.rmtree(story.directory / "broken", ignore_errors=True)
    story.run("base", "add", story.base, "--name", "smollm2", "--alias", "HuggingFaceTB/SmolLM2-135M-Instruct")


def push(story: Story) -> None:
    story.chapter("Three teams push what they have trained")
    for team in TEAMS:
        story.run("push", ADAPTERS / team, f"acme/{team}:1.0.0", "--base", "smollm2")
    story.chapter("A push with a broken prefix is refused, and says why")
    broken = story.directory / "broken"
    subprocess.run(
        [sys.executable, EXAMPLES / "break_adapter.py", "prefix", ADAPTERS / "sql-migration", broken], check=True
    )
    story.run("push", broken, "acme/sql-migration:1.0.1", "--base", "smollm2", expect=6)


def measure(story: Story) -> None:
    story.chapter("Suites, and what the base and each adapter score on them")
    guard = story.directory / f"{GUARD}.yaml"
    guard.unlink(missing_ok=True)
    story.run("suite", "guard", "smollm2", "-o", guard)
    story.run("suite", "add", *(EXAMPLES / "suites" / f"{suite}.yaml" for suite in SUITES), guard)
    story.run("eval", "smollm2", *flags("--suite", SUITES))
    for team, suite in TEAMS.items():
        story.run("eval", f"acme/{team}", *flags("--suite", (suite, "guard-general")))
    story.chapter("Find: what fits this base, touches only q and v, and is good at SQL?")
    question = ("--max-rank", "16", "--targets-within", "q_proj,v_proj", "--score", "sql-exact.accuracy>=0.3")
    story.run("search", "--base", "smollm2", *question)


def promote(story: Story) -> None:
    story.chapter("Promote to prod, behind a gate for the SQL team")
    for team in TEAMS:
        story.run("promote", f"acme/{team}:1.0.0", "--to", "prod", "--reason", "first release")
    rules = (
        "sql-exact.accuracy >= 0.3",
        "sql-exact.nll within 0.05 of served",
        "guard-general.nll within 0.3 of base",
    )
    story.run("gate", "acme/sql-migration@prod", *flags("--rule", rules))
    story.chapter("A better release passes the gate")
    release(story, "1.1.0", "sql-migration-1.1", "trained for 50 steps")
    story.run("promote", "acme/sql-migration:1.1.0", "--to", "prod", "--reason", "twice the accuracy")
    story.chapter("A bad release is refused; forced all the same, it is rolled back")
    bad = release(story, "1.2.0", "sql-migration-bad", "trained on a new export")
    story.run("promote", bad, "--to", "prod", expect=1)
    story.run("promote", bad, "--to", "prod", "--force", "--reason", "the release party is at noon")
    story.run("rollback", "acme/sql-migration@prod", "--reason", "it answers the wrong question")
    story.run("yank", bad, "--reason", "the export had its labels shifted by a row")
    story.run("history", "acme/sql-migration@prod")


def release(story: Story, version: str, adapter: str, notes: str) -> str:
    """Pushes and evaluates one more release of the SQL team."""
    reference = f"acme/sql-migration:{version}"
    story.run("push", ADAPTERS / adapter, reference, "--base", "smollm2", "--notes", notes)
    story.run("eval", reference, *flags("--suite", ("sql-exact", "guard-general")))
    return reference


def compose(story: Story) -> None:
    references = [f"acme/{team}@prod" for team in COMBINED]
    story.chapter("Would two of them fight if they were added up? Measured")
    story.run("conflicts", *references, "--probe", "8", "--guard", GUARD)
    story.chapter("The recipe: a search combines them, and gates judge on other examples")
    recipe = EXAMPLES / "assistant.yaml"
    print(recipe.read_text().rstrip())
    story.run("compose", recipe)
    story.run("show", "acme/assistant-merged")
    story.chapter("All three in one? The gates against the inputs say what would be lost")
    story.run("compose", EXAMPLES / "all-three.yaml", expect=1)
    print("So the assistant is shipped as one model, and support-macros is served as it is.")
    for output in ("assistant", "assistant-merged"):
        story.run("promote", f"acme/{output}:1.0.0", "--to", "prod", "--reason", "keeps what both teams had")


def generate(story: Story) -> None:
    """Runs one prompt per task, before and after, and proves that the merged model is the base with its adapters
    active."""
    import torch

    torch.set_num_threads(1)  # one token at a time is too little work to share between threads, above all on busy cores

    from composer.deltas.variants.load import load_deltas
    from composer.evaluation.generation import generate as complete
    from composer.evaluation.hooks import deltas_applied
    from composer.evaluation.measure import encode
    from composer.evaluation.model import load_model
    from composer.formats.recipes.suite import parse_suite

    story.chapter("The merged checkpoint, pulled and run on one prompt of each task")
    merged_directory, adapter_directory = story.directory / "merged", story.directory / "assistant"
    for directory in (merged_directory, adapter_directory):
        shutil.rmtree(directory, ignore_errors=True)
    story.run("pull", "acme/assistant-merged", "-o", merged_directory)
    story.run("pull", "acme/assistant", "-o", adapter_directory)
    base, merged = load_model(story.base), load_model(merged_directory)
    deltas = load_deltas(adapter_directory, base.architecture).deltas
    worst, agreeing, positions = 0.0, 0, 0
    for suite_name in (TEAMS[team] for team in COMBINED):
        suite = parse_suite(EXAMPLES / "suites" / f"{suite_name}.yaml")
        example = suite.examples[0]
        print(f"\nprompt   {example.prompt}")
        print(f"wanted   {example.completion}")
        print(f"base     {first_line(complete(base, example.prompt, max_new_tokens=20))}")
        print(f"merged   {first_line(complete(merged, example.prompt, max_new_tokens=20))}")
        ids_BT = torch.tensor([encode(base, example, suite.chat).ids])
        with torch.inference_mode():
            merged_BTV = merged.model(ids_BT).logits.float()
            with deltas_applied(base.model, deltas):
                active_BTV = base.model(ids_BT).logits.float()
        worst = max(worst, ((merged_BTV - active_BTV).norm() / active_BTV.norm()).item())
        agreeing += int((merged_BTV.argmax(-1) == active_BTV.argmax(-1)).sum())
        positions += ids_BT.shape[1]
    print("\nmerged, rounded to bf16, against base + adapter active: logits differ by")
    print(f"{worst:.4f} of their norm (tolerance {LOGIT_TOLERANCE}), the next token is the same")
    print(f"at {agreeing} of {positions} positions")
    if worst > LOGIT_TOLERANCE:
        sys.exit("demo: the merged model is not the adapted model")


def first_line(text: str) -> str:
    return " ".join(text.split())[:71]


def flags(name: str, values: Any) -> list[str]:
    return [word for value in values for word in (name, value)]


def farewell(story: Story) -> None:
    story.chapter("Done. Where everything is:")
    print(f"  {shown(story.base)}: the base checkpoint")
    print(f"  {shown(story.home)}: the registry, with its database and its store")
    print(f"  {shown(story.directory / 'merged')}: the merged model, ready for transformers or vLLM")
    print("Three commands to try next:")
    print(f"  export ADAPTORY_HOME={story.home}")
    print(f"  PATH={ADAPTORY.parent}:$PATH")
    for words in (
        ("history", "acme/sql-migration@prod", "--json"),
        ("conflicts", *(f"acme/{team}@prod" for team in COMBINED), "--method", "regmean", "--probe", "8"),
        ("serve",),
    ):
        print(f"  {typed(['adaptory', *words]).removeprefix('$ ')}")
    print("and while it is serving")
    print("  ADAPTORY_URL=http://127.0.0.1:8470 adaptory show acme/sql-migration@prod")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="directory for everything the demo makes")
    story = Story(parser.parse_args().dir.resolve())
    story.directory.mkdir(parents=True, exist_ok=True)
    for chapter in (prepare, push, measure, promote, compose, generate, serve, farewell):
        chapter(story)


if __name__ == "__main__":
    main()

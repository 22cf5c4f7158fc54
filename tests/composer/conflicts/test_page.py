"""The page of a conflict report: read as a browser reads it, and found to need nothing else."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from composer.conflicts.advice import FROM_WEIGHTS
from composer.conflicts.examine import Evidence, examine
from composer.conflicts.metrics import PairMetrics
from composer.conflicts.render.html import page as page_of
from composer.conflicts.render.text import document, explanations
from composer.conflicts.report import ConflictReport, conflicts
from composer.conflicts.view import LEAST_SCALE, MEASURES, cells_of
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.evaluation.model import load_model
from composer.formats.recipes.suite import Example, Suite
from tests.composer.handmade import random_factors, write_adapter
from tests.composer.small_model import save_llama
from tests.device import DEVICE

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "input", "br", "link", "img"}
NASTY = "</style><script>alert('x')</script>&\"'"


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list["Node"] = field(default_factory=list["Node"])

    def find(self, tag: str) -> list["Node"]:
        elements = [self] if self.tag == tag else []
        return elements + [element for child in self.children for element in child.find(tag)]

    def full_text(self) -> str:
        return self.text + "".join(child.full_text() for child in self.children)


class Tree(HTMLParser):
    """A tree of the elements, in which only the last opened element may be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Node("root", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], [node.tag for node in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        assert len(node.attributes) == len(attrs), "no attribute is there twice"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


MODULES = [
    *(f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj")), "lm_head",
]  # fmt: skip


def adapter(directory: Path, name: str, seed: int, modules: Sequence[str] = MODULES) -> LoadedAdapter:
    outputs = {"v_proj": 16, "lm_head": 50}
    factors = {
        module: random_factors(seed + number, outputs.get(module.rpartition(".")[2], 32), 32)
        for number, module in enumerate(modules)
    }
    write_adapter(directory / str(seed), factors)
    return replace(load_deltas(directory / str(seed), None), name=name)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ConflictReport:
    directory = tmp_path_factory.mktemp("adapters")
    named = [adapter(directory, name, 10 * number) for number, name in enumerate(("red", NASTY, "blue"))]
    return conflicts(named, [1.0, 1.0, 0.5])


def page(report: ConflictReport) -> str:
    return page_of(json.loads(json.dumps(document(report))))


def maps(tree: Node) -> list[Node]:
    return [node for node in tree.find("div") if "measure" in str(node.attributes.get("class"))]


def test_a_page_is_well_formed_and_refers_to_nothing_outside(report: ConflictReport) -> None:
    text = page(report)
    tree = Tree(text).root
    assert text.startswith("<!doctype html>")
    for tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form"):
        assert tree.find(tag) == [], tag
    for reference in ("http:", "https:", "//", "url(", "@import", "javascript:"):
        assert reference not in text, reference
    handlers = [
        name for node in every(tree) for name in node.attributes if name.startswith("on") or name in ("src", "href")
    ]
    assert handlers == []


def every(node: Node) -> list[Node]:
    return [node, *(element for child in node.children for element in every(child))]


def test_what_strangers_named_is_text_and_never_markup(report: ConflictReport) -> None:
    text = page(report)
    assert NASTY not in text
    assert len(Tree(text).root.find("style")) == 1
    (heading,) = Tree(text).root.find("h1")
    assert heading.full_text() == f"Conflicts of red, {NASTY}, blue"


def test_a_map_has_a_row_a_layer_a_column_a_kind_and_the_number_in_every_cell(report: ConflictReport) -> None:
    tree = Tree(page(report)).root
    assert len(maps(tree)) == len(report.pairs) * len(MEASURES)
    shown = {str(node.attributes["class"]).split()[-1]: node for node in reversed(maps(tree))}
    cosine = shown["m-cosine"]
    rows = cosine.find("tr")
    assert [cell.full_text() for cell in rows[0].find("th")] == [
        "layer",
        "q_proj",
        "v_proj",
        "lm_head",
    ]
    assert [row.find("th")[0].full_text() for row in rows[1:]] == ["0", "1", "other"]
    first = report.pairs[0]
    module = "model.layers.1.self_attn.v_proj"
    cell = rows[2].find("td")[1]
    assert float(cell.full_text()) == pytest.approx(first.modules[module].cosine, abs=0.0051)
    assert cell.attributes["title"] == f"1 v_proj: {first.modules[module].cosine:.4g}"
    assert [cell.full_text() for cell in rows[3].find("td")[:2]] == ["", ""]


def test_colour_follows_the_distance_from_chance_on_one_scale_for_all_maps(report: ConflictReport) -> None:
    shown = [node for node in maps(Tree(page(report)).root) if node.find("caption")]
    for measure, colouring in MEASURES.items():
        own = [node for node in shown if f"m-{measure}" in str(node.attributes["class"])]
        (scale,) = {str(node.find("caption")[0].full_text()) for node in own}
        most = float(re.search(r"the strongest at ([\d.e+-]+) in all", scale).group(1))  # pyright: ignore
        assert most >= LEAST_SCALE
        for pair, node in zip(report.pairs, own, strict=True):
            cells = [cell for cell in node.find("td") if cell.attributes]
            values = [getattr(numbers, measure) - colouring.origin for numbers in pair.modules.values()]
            shown_values = [float(str(cell.attributes["title"]).rpartition(": ")[2]) for cell in cells]
            assert sorted(shown_values) == pytest.approx(sorted(values), rel=1e-3, abs=1e-5)
            for cell, distance in zip(cells, shown_values, strict=True):
                shade = str(cell.attributes["class"])
                assert abs(int(shade[1:]) - 8 * abs(distance) / most) <= 0.53, measure
                assert shade[1:] == "0" or shade[0] == ("h" if distance >= 0 else "c")


def test_what_chance_gives_has_no_colour(report: ConflictReport) -> None:
    first = report.pairs[0]
    numbers = next(iter(first.modules.values()))
    flat = replace(numbers, cosine=0.004, dominance=0.5, interference=1.0, output_excess=-0.005)
    measures = ("cosine", "dominance", "interference", "output_excess")
    assert [_level(report, measure, flat)[1:] for measure in measures] == ["0"] * 4
    assert _level(report, "cosine", replace(numbers, cosine=-0.9)) == "c8"
    assert _level(report, "dominance", replace(numbers, dominance=1.0)) == "h8"


def _level(report: ConflictReport, measure: str, numbers: PairMetrics) -> str:
    """The shade of a module with these numbers."""
    first = report.pairs[0]
    module = next(iter(first.modules))
    changed = replace(first, modules={**first.modules, module: numbers})
    tree = Tree(page(replace(report, pairs=(changed, *report.pairs[1:])))).root
    node = next(element for element in maps(tree) if f"m-{measure}" in str(element.attributes["class"]))
    kind, layer = cells_of([module])[module]
    title = f"{'other' if layer is None else layer} {kind}: "
    return next(
        str(cell.attributes["class"]) for cell in node.find("td") if str(cell.attributes.get("title")).startswith(title)
    )


def test_every_measure_can_be_chosen_and_one_is(report: ConflictReport) -> None:
    text = page(report)
    radios = Tree(text).root.find("input")
    assert [radio.attributes["id"] for radio in radios] == list(MEASURES)
    assert sum("checked" in radio.attributes for radio in radios) == 1
    for measure in MEASURES:
        assert re.search(rf"body:has\(#{measure}:checked\) \.m-{measure}\{{display:block\}}", text)
    labelled = Tree(text).root.find("label")
    assert all(label.find("input") and label.full_text().strip() for label in labelled)


def test_every_table_has_headings_with_a_scope(report: ConflictReport) -> None:
    for table in Tree(page(report)).root.find("table"):
        assert {str(heading.attributes["scope"]) for heading in table.find("th")} == {"col", "row"}


def test_findings_and_the_verdict_are_words_and_not_only_colours(report: ConflictReport) -> None:
    tree = Tree(page(report)).root
    text = tree.full_text()
    assert "Verdict: unmeasured" in text
    for finding in report.findings:
        assert finding.message in text
        assert finding.code in text


def test_what_is_the_same_for_all_pairs_is_said_once(report: ConflictReport) -> None:
    assert len(report.pairs) > 1
    assert page(report).count(FROM_WEIGHTS) == 1
    assert explanations(report).count(FROM_WEIGHTS) == 1
    assert len(explanations(report)) == 1 + len(report.pairs)
    assert not any(FROM_WEIGHTS in line for line in explanations(report)[1:])


def test_pairs_of_an_old_report_keep_meanings_of_their_own(report: ConflictReport) -> None:
    stored = document(report)
    for number, pair in enumerate(stored["pairs"]):
        pair["meaning"] = f"Risk {number} of 1, from weights alone."
    text = page_of(stored)
    assert [text.count(pair["meaning"]) for pair in stored["pairs"]] == [1, 1, 1]


def test_a_pair_without_common_modules_has_no_map(tmp_path: Path) -> None:
    one, other = adapter(tmp_path, "one", 1, MODULES[:1]), adapter(tmp_path, "other", 2, MODULES[1:2])
    tree = Tree(page(conflicts([one, other], [1.0, 1.0]))).root
    assert (maps(tree), tree.find("input")) == ([], [])


def test_the_probe_and_the_activations_have_tables_of_their_own(tmp_path: Path) -> None:
    loaded = load_model(save_llama(tmp_path / "base"), device=DEVICE)
    adapters = [adapter(tmp_path, name, seed, MODULES[:4]) for seed, name in ((1, "red"), (20, "blue"))]
    suites = [
        Suite(name=f"{name}-exact", kind="target", chat=True, examples=(Example("hi", name), Example("you", name)))
        for name in "ab"
    ]
    probed = Evidence(load=lambda: loaded, suites=suites, k=2)
    prompted = Evidence(load=lambda: loaded, prompts=["hello"])
    for evidence, title, other in ((probed, "Losses", "Activations"), (prompted, "Activations", "Losses")):
        tree = Tree(page(examine(adapters, [1.0, 1.0], evidence=evidence))).root
        titles = [node.full_text() for node in tree.find("h3")]
        assert titles.count(title) == 1
        assert other not in titles


STORED = json.loads((Path(__file__).parent / "schema_2.json").read_text(encoding="utf-8"))


def schema_1() -> dict[str, Any]:
    """A stored report of schema 1: without summary, advice for the set, verdict or limits of the measurement."""
    stored = deepcopy(STORED)
    (pair,) = stored["pairs"]
    for part in (pair, *pair["probe"]["effects"]):
        for later in ("verdict", "tolerated", "answers_required", "answers_interval"):
            part.pop(later, None)
    stored["whole"].pop("advice")
    return {name: value for name, value in stored.items() if name not in ("summary", "by_default")} | {"schema": 1}


@pytest.mark.parametrize("stored", [STORED, schema_1()], ids=["schema 2", "schema 1"])
def test_a_stored_report_of_an_earlier_schema_is_drawn_without_the_dropped_numbers(stored: dict[str, Any]) -> None:
    text = page_of(stored)
    tree = Tree(text).root
    assert f"Verdict: {stored['verdict']}" in tree.full_text()
    assert "+0.30 [+0.28, +0.32]" in text
    assert len(maps(tree)) == len(MEASURES)
    for gone in ("crowding", "c_max", "sign", "amplification", "norm"):
        assert gone not in tree.full_text().replace(str(tree.find("style")[0].text), ""), gone
    earlier = "by the rules of an earlier version" in text
    assert earlier is (stored["schema"] == 1), "what schema 1 called ok may never have been measured"


ASK = """<script>
const seen = () => [...document.querySelectorAll("section.pair")].map(pair => [...pair.querySelectorAll(".measure")]
  .filter(map => getComputedStyle(map).display !== "none").map(map => map.className.split("m-")[1]));
const style = getComputedStyle(document.body);
const state = {first: seen(), paper: style.backgroundColor, ink: style.color, wide: document.body.scrollWidth};
document.getElementById("dominance").click();
state.chosen = seen();
document.title = JSON.stringify(state);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_chosen_measure_alone_in_light_and_in_dark(
    report: ConflictReport, tmp_path: Path, dark: bool
) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(report).replace("</body>", f"{ASK}</body>"), encoding="utf-8")
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
        f"--user-data-dir={tmp_path / 'profile'}", *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    (title,) = Tree(shown).root.find("title")
    measured = json.loads(title.full_text())
    assert measured["first"] == [["input_excess"]] * len(report.pairs)
    assert measured["chosen"] == [["dominance"]] * len(report.pairs)
    paper, ink = (sum(map(int, re.findall(r"\d+", measured[name])[:3])) / 765 for name in ("paper", "ink"))
    assert (paper < 0.2 < 0.8 < ink) if dark else (ink < 0.2 < 0.8 < paper)
    assert measured["wide"] <= 1200, "what is wide scrolls by itself"

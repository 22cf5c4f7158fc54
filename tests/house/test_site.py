"""The site that `make docs` builds from docs/: its link check, its pages, and where documents outside of it lead."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.house.test_house import ROOT, tracked

SITE = ROOT / "zensical.toml"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}
"""Attributes that make a browser fetch an address."""
ITEM = re.compile(r"- |\d+\. ")
"""The beginning of an item of a list."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a dead link or anchor in docs/ fails here, with its file, line and column."""
    directory = tmp_path_factory.mktemp("site")
    shutil.copy(SITE, directory)
    shutil.copytree(ROOT / "docs", directory / "docs")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", built.stdout + built.stderr)
    return directory / "build" / "docs"


class _Fetched(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if (address := values.get(LOADED.get(tag, ""))) and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.add(address)


def test_every_link_of_the_documentation_leads_somewhere_and_its_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    addresses: set[tuple[str, str]] = set()
    for page in pages:
        parser = _Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        addresses |= {(page.name, address) for address in parser.addresses}
    assert [address for address in addresses if "//" in address[1] and not address[1].startswith("data:")] == []
    missing = {
        (page.name, address)
        for page in pages
        if page.name != "404.html"  # its addresses are absolute
        for name, address in addresses
        if name == page.name and not address.startswith("data:")
        if not any((other.parent / address.partition("?")[0]).exists() for other in pages if other.name == name)
    }
    assert missing == set()
    assert len(pages) > 30


def test_every_page_of_the_documentation_is_in_the_navigation_of_the_site() -> None:
    listed = list(_pages(tomllib.loads(SITE.read_text(encoding="utf-8"))["project"]["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages(below)


def test_a_list_of_the_documentation_begins_after_an_empty_line() -> None:
    """Without one, the site shows it as a paragraph."""
    run_on: list[str] = []
    for page in (ROOT / "docs").rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        lines = text.splitlines()
        for before, line in pairwise(lines):
            if ITEM.match(line) and before.strip() and not ITEM.match(before) and not before.startswith("  "):
                run_on.append(f"{page.relative_to(ROOT)}: {line}")
    assert run_on == []


def test_links_and_names_of_documents_outside_of_the_site_lead_somewhere() -> None:
    """Links of README.md and the like, and every `docs/…` that code, messages and settings name."""
    dead: list[str] = []
    for path in tracked():
        if path.suffix not in (".md", ".py", ".yaml", ".toml", ".service", ".json") or ROOT / "docs" in path.parents:
            continue
        text = path.read_text(encoding="utf-8")
        named = {ROOT / name for name in re.findall(r"(?<![\w/.-])docs/[\w/-]+\.[a-z.]+[a-z]", text)}
        if path.suffix == ".md":
            linked = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)
            named |= {path.parent / link for link in linked if "://" not in link}
        dead += [f"{path.relative_to(ROOT)}: {target.relative_to(ROOT)}" for target in named if not target.exists()]
    assert dead == []


def test_links_of_notebooks_lead_somewhere() -> None:
    notebooks = [path for path in tracked() if path.suffix == ".ipynb"]
    links = {
        path.parent / link
        for path in notebooks
        for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", path.read_text(encoding="utf-8"))
    }
    assert notebooks
    assert {link for link in links if not link.exists()} == set()


def test_anchors_in_links_from_outside_of_the_site_exist() -> None:
    dead: list[str] = []
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"):
        for link, anchor in re.findall(r"\]\(([^)\s#]+\.md)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
            headings = re.findall(r"^#+ (.+)$", (path.parent / link).read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }:
                dead.append(f"{path.name}: {link}#{anchor}")
    assert dead == []

"""Package, changelog, deployed images and the tag, if there is one, have the same version."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 60


def test_package_changelog_and_manifests_name_one_version() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version("adaptory") == stated, "install the package again: pip install --editable ."
    assert re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == stated
    overlays = [path.read_text() for path in (ROOT / "deploy").rglob("kustomization.yaml")]
    assert {tag for text in overlays for tag in re.findall(r"newTag: ([\d.]+)", text)} == {stated}
    command = ["git", "tag", "--points-at", "HEAD"]
    tags = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tags.stdout.split()) <= {f"v{stated}"}


def test_a_release_is_described_in_sixty_lines() -> None:
    sections = re.split(r"^## (?=\d)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert {
        section.splitlines()[0]: len(section.strip().splitlines())
        for section in sections
        if section.count("\n") > MAX_LINES
    } == {}

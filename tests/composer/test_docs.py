"""The documentation's example runs unchanged."""

import re
from pathlib import Path

import pytest

import composer
from tests.composer.tiny import MakeAdapter, MakeModel

DOCS = Path(composer.__file__).parents[1] / "docs"


def test_the_example_of_the_library_runs(
    make_model: MakeModel,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_model()
    for seed, name in enumerate(("sql", "terraform")):
        make_adapter(base, name, seed=seed)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / "compose-in-python.md").read_text(), re.DOTALL)
    exec(compile(code, "compose-in-python.md", "exec"), {})  # noqa: S102 - our own file
    assert (tmp_path / "both" / "adapter_config.json").is_file()
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file() or list(
        tmp_path.glob("merged/*.safetensors")
    )
    assert "energy_kept" in capsys.readouterr().out

"""A set as the configuration of other semantic routers: golden, since none of these is run here."""

from pathlib import Path

import pytest
import yaml

from composer.errors import Mismatch
from composer.formats.sets.adapter_set import AdapterSet
from composer.formats.sets.router import BASE
from composer.formats.sets.semantic_routers import FORMS
from tests.composer.formats.sets.test_adapter_set import MEMBERS
from tests.composer.formats.sets.test_router import CRON, ROUTER, SQL, TALK

GOLDEN = Path(__file__).parent / "golden"
MADE, NAME = AdapterSet.of(MEMBERS, ROUTER), "acme/assistants@1.0.0"
PROMPTS = {"sql": SQL, "cron": [*CRON, "Wie oft: „täglich“?"], BASE: TALK}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_file_has_the_form_that_its_project_documents(form: str) -> None:
    made = FORMS[form](MADE, NAME, PROMPTS, "smol")
    assert made == (GOLDEN / f"{form}.yaml").read_text()
    assert yaml.safe_load(made)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"sql": SQL}, "cron has no example prompts"),
        ({"sql": SQL, "cron": CRON, "hr": TALK}, "The set has no member hr: sql, cron, base"),
        ({"sql": SQL, "cron": CRON, BASE: []}, "base has no example prompts"),
    ],
)
def test_each_member_needs_examples_and_only_members_have_some(
    form: str, prompts: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(Mismatch, match=message):
        FORMS[form](MADE, NAME, prompts, "smol")


@pytest.mark.parametrize("form", sorted(FORMS))
def test_examples_for_the_base_may_be_missing(form: str) -> None:
    assert "acme/sql@1.2.0" in FORMS[form](MADE, NAME, {"sql": SQL, "cron": CRON}, "smol")

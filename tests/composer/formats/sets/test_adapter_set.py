"""The file of a set."""

import json
from pathlib import Path
from typing import Any

import pytest

from composer.errors import InvalidFile
from composer.formats.sets.adapter_set import SET_FILE, AdapterSet, SetMember, parse_set, read_set
from composer.formats.sets.router import BASE, fit
from tests.composer.formats.sets.test_router import CRON, ROUTER, SQL

SQL_MEMBER = SetMember(repository="acme/sql", version="1.2.0", commit="a" * 40)
CRON_MEMBER = SetMember(repository="acme/cron", version="0.1.0", commit="b" * 40)
MEMBERS = {"sql": SQL_MEMBER, "cron": CRON_MEMBER}


def test_a_set_that_was_written_is_read_with_the_same_members_and_the_same_choices(tmp_path: Path):
    made = AdapterSet.of(MEMBERS, ROUTER)
    (tmp_path / SET_FILE).write_bytes(made.to_bytes())
    known = read_set(tmp_path / SET_FILE)
    assert known == made
    assert known.members == MEMBERS
    prompts = [*SQL, *CRON, "What is the capital of Peru?", ""]
    assert [known.routes.choose(prompt) for prompt in prompts] == [ROUTER.choose(prompt) for prompt in prompts]


def test_a_set_without_prompts_for_the_base_sends_it_what_no_member_knows():
    made = AdapterSet.of(MEMBERS, fit({"sql": SQL, "cron": CRON}))
    assert made.routes.choose("水曜日") == BASE


def _changed(**changes: Any) -> bytes:
    document = json.loads(AdapterSet.of(MEMBERS, ROUTER).to_bytes())
    return json.dumps({**document, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"format": 1, "format": 1}', "it is not JSON"),
        (_changed(format=2), "format: 2 is not one of 1"),
        (_changed(members={}), "members: it has 0 entries"),
        (_changed(members={"base": SQL_MEMBER.model_dump()}), "members: 'base' cannot name a member"),
        (_changed(members={"sql": SQL_MEMBER.model_dump()}), "router.classes: it needs a class for each member"),
        (_changed(members={"sql": {**SQL_MEMBER.model_dump(), "commit": "../etc"}}), "members.sql.commit: "),
        (_changed(members={"sql": {**SQL_MEMBER.model_dump(), "repository": "../x"}}), "members.sql.repository: "),
        (_changed(members={"sql": {**SQL_MEMBER.model_dump(), "version": "1\n2"}}), "members.sql.version: "),
        (_changed(members={f"m{n}": SQL_MEMBER.model_dump() for n in range(65)}), "members: it has more than 64"),
        (_changed(router={"classes": {"sql": {"sel": float("inf")}}}), "router.classes.sql.sel: "),
        (_changed(more=1), "unknown field 'more'"),
    ],
)
def test_a_damaged_file_is_refused_with_its_field(content: bytes, problem: str):
    with pytest.raises(InvalidFile, match=r"adapter_set\.json: ") as refused:
        parse_set(content)
    assert refused.value.code == "bad_set"
    assert problem in refused.value.message

"""Licences have one name, however they are spelled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.formats.licenses import choices, meets, spdx, spellings


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("Apache  2.0", "Apache-2.0"),
        ("MIT License", "MIT"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("mit or apache-2.0", "MIT OR Apache-2.0"),
        ("odc-by", "ODC-By-1.0"),
        ("llama3.1", "llama3.1"),
        ("other", "other"),
        ("(", "("),
    ],
)
def test_a_licence_has_its_spdx_name_where_there_is_one(stated: str, name: str) -> None:
    assert spdx(stated) == name
    assert {stated, name} <= set(spellings(stated))


@given(st.text(max_size=40))
def test_any_text_is_a_name_and_a_name_stays(stated: str) -> None:
    assert spdx(spdx(stated)) == spdx(stated)


@pytest.mark.parametrize(
    "stated",
    [
        "GPL-3.0", "gpl-3.0", "GPL-3.0-only", "GPL-3.0-or-later", "GPL-3.0+", "GPLv3", "gpl-3", "GPL v3", "GNU GPLv3+",
        "GPL-3.0 or later", "GNU General Public License v3.0", "GPL-3.0 AND MIT", "(MIT AND GPLv3)", "GPL-3.0 OR GPLv3",
        "GPL-3.0-only WITH GCC-exception-3.1", "GPL-3.0-with-GCC-exception", "GPL-3.0 AND", "(llama3.1 AND (GPLv3)",
    ],
)  # fmt: skip
def test_every_spelling_of_a_licence_meets_the_same_rule(stated: str) -> None:
    for rule in ("GPL-3.0", "GPL-3.0-only", "GPL-3.0-or-later", "GPLv3"):
        assert all(meets(rule, choice) for choice in choices(stated)), rule


@pytest.mark.parametrize(
    ("stated", "rule"),
    [
        ("LGPL-3.0", "GPL-3.0"), ("AGPL-3.0-only", "GPL-3.0"), ("GPL-2.0-only", "GPL-3.0"), ("llama3.1", "llama3"),
        ("openrail", "openrail++"), ("GPL-2.0", "GPL-2.0 WITH Classpath-exception-2.0"), ("MIT OR GPL-3.0", "GPL-3.0"),
        ("(MIT OR ISC) AND (GPL-3.0 OR Apache-2.0)", "GPL-3.0"),
    ],
)  # fmt: skip
def test_a_rule_is_about_no_other_licence_and_not_about_what_need_not_be_chosen(stated: str, rule: str) -> None:
    assert not all(meets(rule, choice) for choice in choices(stated))


@given(st.text(alphabet="()ANDORWITH mitgpl-3.0+", max_size=200))
def test_any_text_has_a_choice(stated: str) -> None:
    assert choices(stated)


@pytest.mark.parametrize("name", ["llama3.1", "openrail", "creativeml-openrail-m", "other", "research and education"])
def test_a_name_that_spdx_does_not_know_meets_itself(name: str) -> None:
    assert choices(name) == choices(name.upper())

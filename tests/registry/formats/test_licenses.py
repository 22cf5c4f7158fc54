"""Licences have one name, however they are spelled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.formats.licenses import spdx, spellings


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

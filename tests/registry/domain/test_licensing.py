"""Licences judged by a policy: a user's possible choices decide, over all rules together."""

from typing import Any

import pytest

from registry.domain.channels.policy.requirements import Stated, judge_stated
from registry.formats.channel_policy import Licenses
from registry.formats.licenses import spdx

COMBINATIONS = [{"base": "llama3.1", "adapter": "MIT"}, {"base": "llama3.1", "adapter": "ISC"}]


@pytest.mark.parametrize(
    ("stated", "rules", "broken"),
    [
        ({"adapter": "MIT OR GPL-3.0-only"}, {"refuse": ["GPLv3"]}, []),
        ({"adapter": "MIT OR GPL-3.0-only"}, {"refuse": ["GPLv3", "MIT"]}, ["no GPLv3", "no MIT"]),
        ({"adapter": "MIT AND GPL-3.0-only"}, {"refuse": ["GPLv3"]}, ["no GPLv3"]),
        ({"adapter": "MIT, GPL-3.0"}, {"refuse": ["GPLv3"]}, ["no GPLv3"]),
        ({"adapter": "MIT/GPL-3.0-only"}, {"refuse": ["GPLv3"]}, ["no GPLv3"]),
        ({"adapter": "The GPL-3.0 License."}, {"refuse": ["GPLv3"]}, ["no GPLv3"]),
        ({"adapter": "GPL v3 or newer"}, {"refuse": ["GPLv3"]}, ["no GPLv3"]),
        ({"adapter": "\uff27\uff30\uff2c\u20113.0\u200b"}, {"refuse": ["GPLv3"]}, ["no GPLv3"]),
        ({"adapter": "CC BY-NC 4.0"}, {"refuse": ["CC-BY-NC-4.0"]}, ["no CC-BY-NC-4.0"]),
        ({"adapter": "MIT AND ISC AND Zlib"}, {"refuse": ["Zlib AND MIT"]}, ["no Zlib AND MIT"]),
        ({"adapter": "MIT AND ISC"}, {"refuse": ["Zlib AND MIT"]}, []),
        ({"adapter": "Acme, Inc. licence"}, {"allow": ["acme, inc. licence"]}, []),
        ({"adapter": "MIT OR GPL-3.0"}, {"refuse": ["MIT OR GPL-3.0"]}, ["no MIT OR GPL-3.0"]),
        ({"adapter": "MIT OR GPL-3.0"}, {"allow": ["MIT"]}, []),
        ({"adapter": "MIT AND ISC"}, {"allow": ["MIT"]}, ["licences in MIT"]),
        ({"adapter": "MIT AND ISC"}, {"allow": ["MIT", "ISC"]}, []),
        ({"adapter": "GPL-3.0-or-later"}, {"allow": ["GPL-3.0"]}, []),
        ({"adapter": "GPL-2.0 WITH Classpath-exception-2.0"}, {"allow": ["GPL-2.0"]}, []),
        ({"adapter": "GPL-2.0"}, {"allow": ["GPL-2.0 WITH Classpath-exception-2.0"]}, [
            "licences in GPL-2.0 WITH Classpath-exception-2.0",
        ]),
        ({"adapter": "llama3.1"}, {"allow": ["llama3.1"]}, []),
        ({"adapter": "MIT OR ISC"}, {"allow": ["MIT"], "refuse": ["MIT"]}, ["no MIT"]),
        ({"base": "llama3.1", "adapter": "MIT OR ISC"}, {"refuse": COMBINATIONS[:1]}, []),
        ({"base": "llama3.1", "adapter": "MIT OR ISC"}, {"refuse": COMBINATIONS}, [
            "no base llama3.1 with adapter MIT", "no base llama3.1 with adapter ISC",
        ]),
        ({"base": "llama3.1 OR ISC", "adapter": "MIT OR ISC"}, {"refuse": COMBINATIONS}, []),
    ],
)  # fmt: skip
def test_a_licence_is_refused_if_every_choice_is(
    stated: dict[str, str], rules: dict[str, Any], broken: list[str]
) -> None:
    parts = [Stated(part, spdx(name)) for part, name in stated.items()]
    results = judge_stated(Licenses.model_validate(rules), parts)
    assert [result.rule for result in results if not result.passed] == broken


def test_a_hidden_licence_is_judged_and_its_text_is_not_shown() -> None:
    rules = {"refuse": ["GPL-3.0"], "allow": ["MIT"], "stated": ["adapter"]}
    results = judge_stated(Licenses.model_validate(rules), [Stated("adapter", "secret-licence", hidden=True)])
    assert [result.passed for result in results] == [True, False, True]
    assert not [result.detail for result in results if "secret" in result.detail]

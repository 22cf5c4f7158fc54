"""Names of licences: SPDX's where it has one, else as stated."""

from functools import lru_cache

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

_OTHER_NAMES = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "bsd-3": "BSD-3-Clause",
    "cc0": "CC0-1.0",
    "etalab-2.0": "etalab-2.0",
    "mit license": "MIT",
    "odbl": "ODbL-1.0",
    "odc-by": "ODC-By-1.0",
    "pddl": "PDDL-1.0",
}
"""What model cards write for a licence that SPDX has under another name."""


@lru_cache(1024)
def spdx(stated: str) -> str:
    """The SPDX name or expression, however it is spelled; the text itself if SPDX has none, as for `llama3.1`."""
    text = " ".join(stated.split())
    known = _OTHER_NAMES.get(text.casefold(), text)
    try:
        return str(canonicalize_license_expression(known))
    except InvalidLicenseExpression:
        return text


def spellings(name: str) -> list[str]:
    """The texts under which a release may state this licence: cards write lower case."""
    known = spdx(name)
    others = [other for other, same in _OTHER_NAMES.items() if same == known]
    return list(dict.fromkeys([name, known, known.lower(), *others]))

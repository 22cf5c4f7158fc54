"""Names of licences: SPDX's if it has one, else as stated; and the choices that a licence expression offers."""

import re
import unicodedata
from functools import lru_cache
from itertools import product

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
"""Names in model cards for licences that SPDX has under another name."""


@lru_cache(1024)
def spdx(stated: str) -> str:
    """The SPDX name or expression for any spelling of it; the text itself if SPDX has none, as for `llama3.1`."""
    text = " ".join(stated.split())
    known = _OTHER_NAMES.get(text.casefold(), text)
    return _canonical(known) or text


def _canonical(text: str) -> str | None:
    """The expression in SPDX's form; None if a part of it has no SPDX name."""
    try:
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        return None


def spellings(name: str) -> list[str]:
    """The texts under which a release may state this licence: cards write lower case."""
    known = spdx(name)
    others = [other for other, same in _OTHER_NAMES.items() if same == known]
    return list(dict.fromkeys([name, known, known.lower(), *others]))


MAX_CHOICES = 256
"""Limit on the choices of one expression. Ignoring further ones can only refuse more."""
_MAX_PARENTHESES = 20
_OPERATOR = re.compile(r"([()]|(?<![^\s()])(?:and|or|with)(?![^\s()]))", re.IGNORECASE)
_LATER = re.compile(r"(?<=\S)\s+or\s+(?:any\s+)?(?:later|newer)(?:\s+versions?)?(?![^\s()])", re.IGNORECASE)
_GNU = re.compile(
    r"(?:the )?(?:gnu[ -])?(?:(?P<letter>[al])?gpl|(?P<word>affero |lesser )?general public licen[cs]e)"
    r"[ ,-]*(?:version |v)?(?P<major>\d)(?:\.(?P<minor>\d))?(?:\+|[ -]only|-or-later)?(?P<exception>-with-.+)?"
)
_SEPARATOR = re.compile(r"\s*[,;/|&]\s*")
_WORDS = re.compile(r"^the |(?: licen[cs]e)?[.\s]*$", re.IGNORECASE)
"""Words that people write around a name."""
_SUFFIX = re.compile(r"(?:\+|-only|-or-later)$")

Choice = frozenset[str]
"""Licences that apply together, as keys: lower case, and equal for `only` and `or later` versions."""


@lru_cache(1024)
def choices(stated: str) -> tuple[Choice, ...]:
    """The choices of a user of something under this licence: each item of an `OR` is a choice, and all items of an
    `AND` apply together. A text that is not an expression has one choice, with every licence that it names."""
    text = _LATER.sub("-or-later", " ".join(_plain(stated).split()))
    tokens = [part.strip() for part in _OPERATOR.split(text) if part.strip()]
    if text.count("(") <= _MAX_PARENTHESES:
        try:
            left, offered = _either(tokens)
            if not left:
                return tuple(dict.fromkeys(offered))
        except IndexError:  # an operand is missing
            pass
    return (frozenset[str]().union(*(_keys(token) for token in tokens if not _OPERATOR.fullmatch(token))),)


def meets(rule: str, choice: Choice) -> bool:
    """Whether a rule, which names one or more licences that apply together, covers the choice. A licence in a rule also
    covers the same licence with an exception."""
    offered = choices(rule)
    return len(offered) == 1 and all(
        any(part == key or part.startswith(f"{key} with ") for part in choice) for key in offered[0]
    )


def _either(tokens: list[str]) -> tuple[list[str], list[Choice]]:
    """Reads an expression. Returns the tokens after it, and its choices."""
    tokens, offered = _together(tokens)
    while tokens and tokens[0].casefold() == "or":
        tokens, more = _together(tokens[1:])
        offered = [*offered, *more][:MAX_CHOICES]
    return tokens, offered


def _together(tokens: list[str]) -> tuple[list[str], list[Choice]]:
    tokens, offered = _one(tokens)
    while tokens and tokens[0].casefold() == "and":
        tokens, more = _one(tokens[1:])
        offered = [choice | other for choice, other in product(offered, more)][:MAX_CHOICES]
    return tokens, offered


def _one(tokens: list[str]) -> tuple[list[str], list[Choice]]:
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        rest, offered = _either(rest)
        if rest[0] != ")":
            raise IndexError
        return rest[1:], offered
    if _OPERATOR.fullmatch(first):
        raise IndexError
    if rest and rest[0].casefold() == "with":
        return rest[2:], [frozenset({f"{_key(first)} with {rest[1].casefold()}"})]
    return rest, [_keys(first)]


def _keys(name: str) -> Choice:
    """The key of a name, or the keys of a list of known names, such as `MIT, GPL-3.0`."""
    listed = [part for part in _SEPARATOR.split(name) if part]
    if len(listed) > 1 and all(_is_known(key) for key in listed):
        return frozenset(map(_key, listed))
    return frozenset({_key(name)})


def _is_known(name: str) -> bool:
    """Whether the licence is one of SPDX's or GNU's."""
    return _canonical(name) is not None or _GNU.fullmatch(name.casefold()) is not None


def _plain(stated: str) -> str:
    """The text with normalized letters and hyphens, and without invisible characters."""
    categories = ((character, unicodedata.category(character)) for character in unicodedata.normalize("NFKC", stated))
    return "".join("-" if category == "Pd" else character for character, category in categories if category != "Cf")


def _key(name: str) -> str:
    """A key that is equal for all spellings of a licence: `GPLv3`, `GPL-3.0`, `GPL-3.0-only` and `GPL-3.0-or-later`."""
    name = _WORDS.sub("", name)
    text = (_canonical(re.sub("[ _]+", "-", name)) or spdx(name)).casefold()  # `CC BY-NC 4.0`
    gnu = _GNU.fullmatch(text)
    if gnu is None:
        return _SUFFIX.sub("", text)
    letter = gnu["letter"] or (gnu["word"] or "")[:1]
    exception = (gnu["exception"] or "").replace("-with-", " with ", 1)
    return f"{letter}gpl-{gnu['major']}.{gnu['minor'] or 0}{exception}"

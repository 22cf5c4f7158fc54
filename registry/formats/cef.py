"""Rows of the audit log in ArcSight's Common Event Format (CEF:0, implementation standard version 25), for systems that
collect security events."""

import json
from collections.abc import Mapping
from typing import Any

_LABELS = ("subject", "namespace", "token", "before", "after", "detail")
_NOT_GRANTED = (":refuse", ":takedown", ":remove", ":revoke", ":delete", ":discard")


def cef_line(row: Mapping[str, Any], version: str) -> str:
    """One line without its end. `row` is a row of the audit log as REST returns it; `version` is that of the product.

    The severity, of 10, is 6 for refusals and for what takes something away, otherwise 3.
    """
    act = str(row["act"])
    severity = 6 if act.endswith(_NOT_GRANTED) else 3
    header = ("CEF:0", "Adaptory", "registry", version, act, act.replace(":", " "), str(severity))
    at = row["at"]
    address, _, client = str(row["source"] or "").partition(" ")
    extension = {
        "externalId": row["id"],
        "rt": int(at.timestamp() * 1000),
        "suser": row["actor"],
        "src": address,
        "requestClientApplication": client,
        "reason": row["reason"],
    }
    for number, name in enumerate(_LABELS, 1):
        value = row[name]
        if value not in (None, {}):
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
            extension |= {f"cs{number}Label": name, f"cs{number}": text}
    pairs = (f"{key}={_extension(str(value))}" for key, value in extension.items() if value not in (None, ""))
    return "|".join(map(_header, header)) + "|" + " ".join(pairs)


def _header(value: str) -> str:
    return value.replace("\\", "\\\\").replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def _extension(value: str) -> str:
    return value.replace("\\", "\\\\").replace("=", "\\=").replace("\r", "\\r").replace("\n", "\\n")

"""Rows of the audit log in ArcSight's Common Event Format (CEF:0, implementation standard version 25), for systems that
collect security events."""

import json

from registry.formats.audit_chain import AuditContent

_NOT_GRANTED = (":refuse", ":takedown", ":remove", ":revoke", ":delete", ":discard")


def cef_line(row: AuditContent, version: str) -> str:
    """One line without its end. `row` is a row of the audit log as REST returns it; `version` is that of the product.

    The severity, of 10, is 6 for refusals and for what takes something away, otherwise 3.
    """
    act = row["act"]
    severity = 6 if act.endswith(_NOT_GRANTED) else 3
    header = ("CEF:0", "Adaptory", "registry", version, act, act.replace(":", " "), str(severity))
    address, _, client = (row["source"] or "").partition(" ")
    extension = {
        "externalId": row["id"],
        "rt": int(row["at"].timestamp() * 1000),
        "suser": row["actor"],
        "src": address,
        "requestClientApplication": client,
        "reason": row["reason"],
    }
    custom = {
        "subject": row["subject"],
        "namespace": row["namespace"],
        "token": row["token"],
        "before": row["before"],
        "after": row["after"],
        "detail": row["detail"],
    }
    for number, (name, value) in enumerate(custom.items(), 1):
        if value not in (None, {}):
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
            extension |= {f"cs{number}Label": name, f"cs{number}": text}
    pairs = (f"{key}={_extension(str(value))}" for key, value in extension.items() if value not in (None, ""))
    return "|".join(map(_header, header)) + "|" + " ".join(pairs)


def _header(value: str) -> str:
    return value.replace("\\", "\\\\").replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def _extension(value: str) -> str:
    return value.replace("\\", "\\\\").replace("=", "\\=").replace("\r", "\\r").replace("\n", "\\n")

"""Errors: their families, the codes of each, and how errors of others become ours."""

from registry.errors.families import (
    FAMILIES,
    NO_SPACE,
    Conflict,
    Invalid,
    NotAllowed,
    NotFound,
    Refused,
    RegistryError,
    Stale,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
    Usage,
)

__all__ = [
    "FAMILIES", "NO_SPACE", "Conflict", "Invalid", "NotAllowed", "NotFound", "Refused", "RegistryError", "Stale",
    "TooLarge", "TooMany", "Unauthenticated", "Unavailable", "Usage",
]  # fmt: skip

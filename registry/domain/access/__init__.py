"""Namespaces, members, roles, tokens and the audit log."""

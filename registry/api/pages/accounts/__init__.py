"""Signing in, tokens, members and the audit trail."""

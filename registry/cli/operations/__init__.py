"""Servers, storage, backups, jobs, access and profiles."""

"""Bytes and rows together: uploads, publishing, collection, fsck."""

"""Bytes that are kept elsewhere: blobs in a directory or in S3, checkpoints in buckets, repositories of a hub."""

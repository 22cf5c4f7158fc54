"""Addresses of checkpoints in a bucket."""

import pytest

from registry.errors import Usage
from registry.formats.addresses import S3Address, parse_s3_address


@pytest.mark.parametrize(
    ("text", "bucket", "prefix", "name"),
    [
        ("s3://models/llama", "models", "llama", "llama"),
        ("s3://my.models-2/team/llama 3".replace(" ", "-"), "my.models-2", "team/llama-3", "llama-3"),
        ("s3://models/llama/", "models", "llama", "llama"),
        ("s3://models/ünïcode", "models", "ünïcode", "ünïcode"),
    ],
)
def test_an_address_has_a_bucket_and_a_prefix(text: str, bucket: str, prefix: str, name: str) -> None:
    address = parse_s3_address(text)
    assert (address, address.name) == (S3Address(bucket, prefix), name)
    assert parse_s3_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "s3://", "s3://models", "s3://models/", "s3:///llama", "s3://models//llama", "s3://models/a//b",
        "s3://models/../other", "s3://models/a/./b", "s3://models/a/..", "s3://models/a b", "s3://models/a\nb",
        "s3://models/a?versionId=1", "s3://models/a#b", "s3://a/b", "s3://mo dels/llama", "S3://models/llama",
        "s3://user:password@models/llama", f"s3://models/{'a' * 701}", "https://models/llama", "s3://models/a\\b",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(Usage, match="does not name a checkpoint in a bucket"):
        parse_s3_address(text)

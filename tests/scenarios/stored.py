"""Changes and removes bytes in a registry's store, bypassing our own store class, as a disk would."""

from tests.scenarios.traces import home_of, keeps_blobs_in_s3, s3_of
from tests.scenarios.world import Cli


def read(cli: Cli, sha256: str) -> bytes:
    if keeps_blobs_in_s3(cli):
        client, bucket, prefix = s3_of(cli)
        return client.get_object(Bucket=bucket, Key=prefix + _key(sha256))["Body"].read()
    return (home_of(cli) / "store" / _key(sha256)).read_bytes()


def overwrite(cli: Cli, sha256: str, content: bytes) -> None:
    if keeps_blobs_in_s3(cli):
        client, bucket, prefix = s3_of(cli)
        client.put_object(Bucket=bucket, Key=prefix + _key(sha256), Body=content)
        return
    path = home_of(cli) / "store" / _key(sha256)
    path.chmod(0o644)
    path.write_bytes(content)


def damage(cli: Cli, sha256: str) -> None:
    """Flips one bit."""
    content = bytearray(read(cli, sha256))
    content[-1] ^= 1
    overwrite(cli, sha256, bytes(content))


def lose(cli: Cli, sha256: str) -> None:
    if keeps_blobs_in_s3(cli):
        client, bucket, prefix = s3_of(cli)
        client.delete_object(Bucket=bucket, Key=prefix + _key(sha256))
        return
    (home_of(cli) / "store" / _key(sha256)).unlink()


def _key(sha256: str) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"

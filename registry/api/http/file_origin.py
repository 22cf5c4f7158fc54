"""Files of users from an origin of their own: another host name of this server, for signed addresses alone.

However a browser interprets such a file, it cannot act on the pages of the registry.
"""

import hmac
import time
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from registry.environment.settings import Settings
from registry.errors import NotFound
from registry.formats.references import Digest

FILES_PATH = "/v1/files/"


@dataclass(frozen=True, slots=True)
class FileOrigin:
    """The origin's address, and the secret that all servers sign its addresses with."""

    url: str
    secret: bytes

    @classmethod
    def of(cls, settings: Settings) -> "FileOrigin | None":
        """None without `files_url`."""
        if settings.files_url is None or settings.files_secret is None:
            return None
        return cls(settings.files_url.rstrip("/"), settings.files_secret.get_secret_value().encode())

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    def address(self, sha256: Digest, expires_s: int, disposition: str | None) -> str:
        """The address of the file, valid until then without a token."""
        expires, disposition = int(time.time()) + expires_s, disposition or ""
        query = {"expires": expires, "signature": self._signature(sha256, expires, disposition)}
        query |= {"disposition": disposition} if disposition else {}
        return f"{self.url}{FILES_PATH}{sha256}?{urlencode(query)}"

    def has_signed(self, sha256: Digest, expires: int, disposition: str, signature: str) -> bool:
        """Checks that this registry signed the address and that it has not expired."""
        own = self._signature(sha256, expires, disposition)
        return hmac.compare_digest(own.encode(), signature.encode()) and expires >= time.time()

    def _signature(self, sha256: Digest, expires: int, disposition: str) -> str:
        signed = f"file\n{sha256}\n{expires}\n{disposition}"
        return hmac.new(self.secret, signed.encode(), "sha256").hexdigest()


def no_such_address(sha256: Digest) -> NotFound:
    """The error for an address that this registry did not sign, that has expired, or whose file is gone."""
    return NotFound(
        "address_expired", "This address of a file has expired, or is not from this registry.", subject=sha256
    )

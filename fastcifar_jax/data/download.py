"""Downloads over HTTP: one attempt, a time limit for the connection, and a check of size and SHA-256."""

import hashlib
import logging
import threading
from typing import Any

from fastcifar_jax.data.checks import DataError

CONNECT_SECONDS = 10  # time within which a server must answer

logger = logging.getLogger("fastcifar_jax.data")


def open_url(url: str, advice: str) -> Any:
    """The `requests.Response` within `CONNECT_SECONDS`, or a DataError that ends with `advice`."""
    import requests  # slow to import

    answers: list[Any] = []

    def ask():
        try:
            answers.append(requests.get(url, stream=True, timeout=CONNECT_SECONDS))
        except Exception as error:
            answers.append(error)

    # In a thread, because looking up the server's address has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    answer = answers[0] if answers else TimeoutError(f"no answer within {CONNECT_SECONDS} seconds")
    if not isinstance(answer, Exception):
        if answer.ok:
            return answer
        answer.close()
        answer = f"HTTP status {answer.status_code}"
    raise DataError(f"cannot download {url} ({answer!s:.300}); {advice}, or use digits, which need no network")


def download(url: str, size: int, sha256: str, advice: str) -> bytes:
    """The file at `url`, if it has `size` bytes and the checksum `sha256` (hexadecimal); see `open_url`."""
    data = bytearray()
    with open_url(url, advice) as response:
        logger.info("downloading %s (%.1f MB)", url, size / 1e6)
        try:
            for block in response.iter_content(1 << 20):
                data += block
                if len(data) > size:
                    break
        except Exception as error:
            raise DataError(f"the download of {url} broke off ({error!s:.200}); try again, or {advice}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{url} sent {len(data)} bytes or more; expected the known file of {size} bytes; {advice}")
    return bytes(data)

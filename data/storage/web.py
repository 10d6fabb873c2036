"""Files on web servers, of which parts can be read."""

import errno
from typing import Any


def ranged_facts(driver: Any, url: str) -> dict[str, Any]:
    """Returns the size and the headers of a file of which one byte was requested.

    Raises OSError for a server that answers with all of it: what is divided or read again after a
    failure is read in parts.
    """
    from fsspec.asyn import sync

    facts: dict[str, Any] = sync(driver.loop, _request, driver, url)
    return facts


async def _request(driver: Any, url: str) -> dict[str, Any]:
    session = await driver.set_session()
    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    async with session.get(driver.encode_url(url), headers=headers) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        if answer.status == 416:  # a file without a byte
            return {"size": 0, **answer.headers}
        answer.raise_for_status()
        _, _, size = answer.headers.get("Content-Range", "").partition("/")
        if not size.isdigit():
            raise OSError(
                errno.EINVAL,
                "its server does not read parts of files; download it and name the copy",
                url,
            )
        return {"size": int(size), **answer.headers}

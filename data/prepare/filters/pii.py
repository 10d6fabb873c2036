"""E-mail addresses and public IP addresses, as datatrove's PIIFormatter replaces them.

What differs, and why:

- The replacement is a function of the text: datatrove's takes turns among several, so that it
  depends on the documents before. Addresses are those reserved for documentation (RFC 2606, 5737,
  3849), which belong to nobody, and are left as they are, so that a second run changes nothing.
- The time is linear in the text; datatrove's expression needs quadratic time on long runs of
  letters and signs without an @, such as embedded images.
- The domain of an address ends in letters, so that `react@18.2.0` is none. Numbers with more than
  four parts, such as 1.2.3.4.5, are no IP addresses.
- Public IPv6 addresses (2000::/3, global) are replaced as well.
"""

import re
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Network, ip_address

from data.config import FiltersConfig, SourceConfig
from data.manifest import MAX_EXAMPLES, Example, FilterStats
from data.prepare.corpus import Document
from data.text import Special

E_MAIL, IPV4, IPV6 = "email@example.com", "192.0.2.1", "2001:db8::1"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"@((?:{_LABEL}\.){{1,8}}[A-Za-z]{{2,63}})(?![A-Za-z0-9-])")
_LOCAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}\Z")
_LOCAL_CHARACTERS = 64
_RESERVED = re.compile(
    r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost)$", re.IGNORECASE
)
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
# No part of a longer number, nor of a name such as pkg-1.2.3.4.
_IPV4 = re.compile(
    rf"(?<![A-Za-z0-9_.])(?<![A-Za-z]-)(?:{_BYTE}\.){{3}}{_BYTE}(?![A-Za-z0-9_]|\.[A-Za-z0-9])"
)
_IPV6 = re.compile(
    r"(?<![A-Za-z0-9_:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,33}[0-9A-Fa-f:]"
    r"(?![A-Za-z0-9_]|[:.][A-Za-z0-9])"
)
_UNICAST = IPv6Network("2000::/3")
_CONTEXT = 100  # characters of an example before the first address
_NAMES = {E_MAIL: "e-mail addresses", IPV4: "IPv4 addresses", IPV6: "IPv6 addresses"}


class Masker:
    """Finds and replaces personal information in the documents of a source.

    Attributes:
        is_masking: whether documents are rewritten.
    """

    def __init__(self, filters: FiltersConfig | None, source: SourceConfig) -> None:
        is_on = filters is not None and source.domain in filters.pii_domains
        self.is_on = is_on and filters is not None and filters.pii is not None
        self.is_masking = self.is_on and filters is not None and filters.pii == "mask"

    def masked(self, document: Document) -> Document:
        """The document as everything else sees it; the same object where nothing changes."""
        if not self.is_masking:
            return document
        if document.segments is None:
            text = masked(document.text)
            return document if text == document.text else Document(text)
        segments = tuple(
            part if isinstance(part, Special) else masked(part) for part in document.segments
        )
        return document if segments == document.segments else _joined(segments)

    def shown(self, text: str) -> str:
        """The text as examples show it."""
        return masked(text) if self.is_on else text

    def contents(self, text: str) -> str | None:
        """How many of which kind a text has, as a reason; None where it has none."""
        return contents(text) if self.is_on else None

    def stats(self, raw: Document, document: Document, earlier: FilterStats) -> FilterStats:
        """`earlier` and a document that was masked; an example shows it around the first mask."""
        examples: tuple[Example, ...] = ()
        if len(earlier.examples) < MAX_EXAMPLES:
            pairs = enumerate(zip(raw.text, document.text, strict=False))
            first = max(0, next((i for i, (a, b) in pairs if a != b), 0) - _CONTEXT)
            text = document.text[first : first + 3 * _CONTEXT]
            examples = (Example(text=text, detail=contents(raw.text) or ""),)
        size = len(document.text.encode())
        return earlier.plus(FilterStats(documents=1, bytes=size, examples=examples))


def _joined(segments: tuple[str, ...]) -> Document:
    return Document("".join(segments), segments)


def masked(text: str) -> str:
    """The text with replacements."""
    return _replace(text, lambda replacement: None)


def contents(text: str) -> str | None:
    """How many addresses of which kind a text has; None without any."""
    counts: Counter[str] = Counter()
    _replace(text, lambda replacement: counts.update([_NAMES[replacement]]))
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or None


def _replace(text: str, count: Callable[[str], None]) -> str:
    if "@" in text:
        text = _replace_e_mail(text, count)

    def replace(match: re.Match[str]) -> str:
        replacement = IPV6 if ":" in match[0] else IPV4
        if not _is_public(match[0]):
            return match[0]
        count(replacement)
        return replacement

    return _IPV6.sub(replace, _IPV4.sub(replace, text))


def _replace_e_mail(text: str, count: Callable[[str], None]) -> str:
    parts, end = [], 0
    for domain in _DOMAIN.finditer(text):
        first = max(end, domain.start() - _LOCAL_CHARACTERS)
        local = _LOCAL.search(text[first : domain.start()])
        if local is None or _RESERVED.search(domain[1]):
            continue
        count(E_MAIL)
        parts += [text[end : first + local.start()], E_MAIL]
        end = domain.end()
    return "".join([*parts, text[end:]])


def _is_public(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    is_unicast = not address.is_multicast if address.version == 4 else address in _UNICAST
    return address.is_global and is_unicast

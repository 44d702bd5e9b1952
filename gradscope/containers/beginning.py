"""A file as far as it must be read to say what it is."""

from __future__ import annotations

from functools import cached_property

from gradscope.containers.files import read_start, stamp, unreadable
from gradscope.containers.zip import member_names
from gradscope.containers.zip_bounds import first_end

_START = 65_536
#: An index of shards is a few megabytes; more is not searched for its one telling key.
_JSON_CAP = 100_000_000


class Beginning:
    """A file of which only the beginning was read, and of a zip archive the directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = stamp(path)[0]
        self.start = read_start(path, _START)

    @cached_property
    def members(self) -> list[str] | None:
        """The names in the zip archive that it begins with; None for another file.

        Raises InputError when it is damaged.
        """
        if not self.start.startswith((b"PK\x03\x04", b"PK\x07\x08PK\x03\x04")):
            return None
        try:
            with open(self.path, "rb") as file:
                return member_names(file, self.path, first_end(file, self.path, self.size))
        except OSError as error:
            raise unreadable(self.path, error) from None

    def has(self, base: str) -> bool:
        """Whether a zip archive has a member of this name, in any folder."""
        return any(n == base or n.endswith("/" + base) for n in self.members or ())

    @cached_property
    def json(self) -> bytes:
        """The text of a JSON file, up to a generous limit; nothing for another file."""
        text = self.start.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not text.startswith((b"{", b"[")) or not is_plain_text(self.start):
            return b""
        whole = self.size <= len(self.start) or self.size > _JSON_CAP
        return self.start if whole else read_start(self.path, _JSON_CAP)


def is_plain_text(data: bytes) -> bool:
    """UTF-8 without control characters; a last character that was cut is forgiven."""
    try:
        text = data[:4096].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(data), 4096) - 3:
            return False
        text = data[: error.start].decode("utf-8")
    return not any(char < " " and char not in "\t\n\r\f\x1b" for char in text)

"""Which pages are free, which are in use, and which hold a prefix that somebody may ask for again.

A full page can be published under the key of its content. It is then shared: whoever starts with the same content takes
it instead of computing it. A published page that nobody uses any more stays until its room is needed; the one whose
last use is longest ago goes first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict


class PageAllocator:
    """Not thread-safe: the engine holds its lock around every call."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages))
        self._users = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and published ones that nobody uses."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.pages - self.available

    def take(self) -> int | None:
        """A page for one user alone; None if all are used. The lowest free one: those in use stay close together."""
        if self._free:
            page = heapq.heappop(self._free)
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page published under ``key``, with one user more; None where there is none."""
        page = self._page_of.get(key)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] += 1
        return page

    def publish(self, page: int, key: bytes) -> None:
        """Let others share a full page, which is never written again. The first page under a key stays."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, page: int) -> None:
        """One user less."""
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)

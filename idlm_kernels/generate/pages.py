"""The page pool: which pages of the KV cache are free, and which prompts share the same ones. Host only."""

from __future__ import annotations

from collections.abc import Sequence


def page_size_for(wanted: int, num_slots: int) -> int:
    """The page size of a cache for requests of at most num_slots: larger pages than that hold no more.

    A power of two then, since a kernel is compiled for each size of page.
    """
    return min(wanted, 1 << (num_slots - 1).bit_length())


class PagePool:
    """Pages 0 .. num_pages - 1, each free or held by one or more requests.

    A full page of prompt tokens can be shared: its keys and values depend on the tokens up to its end and, as rows are
    row-invariant, on nothing else, so a page that another request has filled holds the very bits that this one would
    write. Pages are known by (page before, tokens of the page): equality of tokens, not of hashes, decides.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {num_pages} pages of {page_size} tokens: wanted at least 1 of each")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, num_slots: int) -> int:
        """Pages that hold this many slots."""
        return -(-num_slots // self.page_size)

    def take(self, count: int) -> list[int] | None:
        """Hold `count` free pages; None, and nothing is held, if there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, tokens: Sequence[int]) -> list[int]:
        """Hold the published pages of the longest prefix of `tokens`, in order.

        The last token is left out: it is pending and runs in the first step, whoever computed the others.
        """
        pages: list[int] = []
        before = -1
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            page = self._page_of.get((before, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            self._holders[page] += 1
            pages.append(page)
            before = page
        return pages

    def publish(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Let others share the full pages of a prefilled prompt. Pending's page stays private: it is written yet."""
        before = -1
        for index in range((len(tokens) - 1) // self.page_size):
            start = index * self.page_size
            key = (before, tuple(tokens[start : start + self.page_size]))
            if self._page_of.setdefault(key, pages[index]) != pages[index]:
                # Another request holds a page of equal content. Ours, and those after it, stay private: under that
                # page they would outlive it.
                return
            before = pages[index]
            self._key_of[before] = key

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages; those that nobody holds any more become free, last first."""
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise AssertionError(f"page {page} is released but held by nobody")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                key = self._key_of.pop(page, None)
                if key is not None:
                    del self._page_of[key]
                self._free.append(page)

"""The page pool under any sequence of calls: no page is lost, handed out twice, or shared by different tokens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idlm_kernels.generate.pages import PagePool

PAGE_SIZE = 2


class Pool(RuleBasedStateMachine):
    """Requests come, share and publish prompts, grow and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, PAGE_SIZE)
        self.held: list[tuple[list[int], list[int]]] = []  # (prompt, pages)
        self.content: dict[int, tuple[int, ...]] = {}  # all tokens up to the end of a published page

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9), extra=st.integers(0, 3))
    def admit(self, prompt: list[int], extra: int) -> None:
        shared = self.pool.share(prompt)
        assert len(shared) * PAGE_SIZE < len(prompt), "pending's page is never shared"
        for i, page in enumerate(shared):
            assert self.content[page] == tuple(prompt[: (i + 1) * PAGE_SIZE])
        free = self.pool.free_pages
        own = self.pool.take(self.pool.pages_for(len(prompt)) - len(shared) + extra)
        if own is None:
            assert free == self.pool.free_pages, "a refused request holds nothing"
            self.pool.release(shared)
            return
        assert not {p for _, pages in self.held for p in pages} & set(own)
        self.held.append((prompt, shared + own))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        prompt, pages = data.draw(st.sampled_from(self.held))
        before = set(self.pool._key_of)
        self.pool.publish(prompt, pages)
        for i, page in enumerate(pages):
            if page in self.pool._key_of and page not in before:
                self.content[page] = tuple(prompt[: (i + 1) * PAGE_SIZE])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index)[1])

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        held = [p for _, pages in self.held for p in pages]
        counts = [held.count(page) for page in range(12)]
        assert counts == self.pool._holders
        assert sorted(self.pool._free) == [page for page in range(12) if not counts[page]]
        assert set(self.pool._key_of) <= set(held), "a free page is known to nobody"
        assert set(self.pool._page_of.values()) == set(self.pool._key_of)


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestPool = Pool.TestCase


def test_misuse_is_caught() -> None:
    pool = PagePool(2, 4)
    pages = pool.take(2)
    assert pages is not None and pool.take(1) is None and pool.take(0) == []
    pool.release(pages)
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.release(pages[:1])
    with pytest.raises(ValueError, match="at least 1"):
        PagePool(0, 4)

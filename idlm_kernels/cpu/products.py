"""Batched products and sums on a CPU whose bits do not depend on the shape around a row.

Nothing of the kind is documented of torch or of the BLAS behind it. So a fast way is used where, on random numbers of
the very shape, it gives the bits of a way that is invariant by its construction; the check is made once per process,
shape and number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], object]  # a [batch, rows, K], b [batch, K, N], out [batch, rows, N]

_verdicts: dict[tuple[object, ...], bool] = {}


def _verified(key: tuple[object, ...], check: Callable[[], bool]) -> bool:
    """The outcome of a check that is made once per key and thread count."""
    key = (*key, torch.get_num_threads())
    verdict = _verdicts.get(key)
    if verdict is None:
        verdict = _verdicts[key] = check()
    return verdict


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def batched_product(batch: int, rows: int, inner: int, columns: int, *, transposed: bool) -> Product:
    """A function a [batch, rows, inner] @ b [batch, inner, columns] in which every row has the same bits as in the
    functions returned for other batches and rows. `transposed`: b comes as the transpose of a contiguous tensor.

    That is torch.bmm where it agrees with `_product_in_slabs` on random matrices of this shape; that one, if there a
    row's bits do not depend on its place; else `_product_by_tree`. Batches above 8 are taken to behave as 8 do.
    """

    def random_b(batch: int) -> Tensor:
        return _random(batch, columns, inner).transpose(1, 2) if transposed else _random(batch, inner, columns)

    def in_slabs(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty(*a.shape[:2], columns)
        _product_in_slabs(a, b, out)
        return out

    def slabs_are_invariant() -> bool:
        a, b = _random(4, 2 * SLAB, inner), random_b(4)
        want = in_slabs(a, b)
        turned = in_slabs(a.flip(0, 1), b.flip(0)).flip(0, 1)
        return torch.equal(want, turned) and all(
            torch.equal(want[1:4, some], in_slabs(a[1:4, some], b[1:4]))
            for some in (slice(0, 1), slice(3, 8), slice(5, 24))
        )

    def bmm_agrees() -> bool:
        a, b = _random(min(batch, 8), rows, inner), random_b(min(batch, 8))
        return torch.equal(torch.bmm(a, b), in_slabs(a, b))

    shape = (inner, columns, transposed)
    if not _verified(("slabs", *shape), slabs_are_invariant):
        return _product_by_tree
    return _bmm if _verified(("bmm", *shape, rows, min(batch, 8)), bmm_agrees) else _product_in_slabs


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.bmm(a, b, out=out)


SLAB = 16  # rows


def _product_in_slabs(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b by calls of exactly [2, SLAB, K] @ [2, K, N]: no shape around a row ever changes."""
    for i in range(0, a.shape[0], 2):
        pair = torch.arange(i, i + 2).clamp(max=a.shape[0] - 1)
        b_pair = b.transpose(1, 2)[pair].transpose(1, 2) if b.stride(2) != 1 else b[pair]
        for j in range(0, a.shape[1], SLAB):
            block = a[i : i + 2, j : j + SLAB]
            slab = a.new_zeros(2, SLAB, a.shape[2])
            slab[: block.shape[0], : block.shape[1]] = block
            out[i : i + 2, j : j + SLAB] = torch.bmm(slab, b_pair)[: block.shape[0], : block.shape[1]]


def _product_by_tree(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b by single multiplications and additions in a fixed tree: invariant on any machine, and slow."""
    for row in range(a.shape[1]):
        terms = a[:, row, :, None] * b  # [batch, K, N]
        while terms.shape[1] > 1:
            half = (terms.shape[1] + 1) // 2
            rest = terms[:, half:]
            terms = terms[:, :half].clone()
            terms[:, : rest.shape[1]] += rest
        out[:, row] = terms[:, 0]


SUMMED_AT_ONCE = 16  # torch adds up to so many rows one after the other, more in blocks


def leaf_sum(leaves: int, inner: int) -> Callable[[Tensor], Tensor]:
    """A function that adds the leaves of x [Hkv, G, L, ...], with `inner` numbers each, in blocks, each in order.

    Zero leaves at the end then change nothing. Within a block it is torch's sum where that goes in order too.
    """
    if leaves == 1:
        return lambda x: x.select(2, 0)

    def goes_in_order(length: int) -> bool:
        x = _random(2, length, inner)
        return torch.equal(x.sum(1), _add_in_order(x, 1))

    lengths = {min(leaves, SUMMED_AT_ONCE), (leaves - 1) % SUMMED_AT_ONCE + 1}
    add: Callable[[Tensor, int], Tensor] = _add_in_order
    if all(_verified(("sum", length, inner), functools.partial(goes_in_order, length)) for length in lengths):
        add = torch.sum
    if leaves <= SUMMED_AT_ONCE:
        return lambda x: add(x, 2)
    return lambda x: functools.reduce(torch.add, [add(block, 2) for block in x.split(SUMMED_AT_ONCE, dim=2)])


def _add_in_order(x: Tensor, dim: int) -> Tensor:
    return functools.reduce(torch.add, x.unbind(dim))

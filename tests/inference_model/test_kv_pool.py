"""No page is ever given to two, none is lost, and tokens are where the table says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_convert.errors import UsageError
from qwen3vl_convert.inference.engine.kv_pool import KVPool, ReqToTokenPool, TokenToKVPoolAllocator, pages_for


@settings(deadline=None)
@given(st.integers(2, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6))))
def test_pages_are_given_once_and_come_back(num_pages: int, steps: list[tuple[bool, int]]) -> None:
    allocator, taken = TokenToKVPoolAllocator(num_pages), list[int]()
    for give_back, count in steps:
        if give_back:
            back, taken = taken[:count], taken[count:]
            allocator.free(back)
        else:
            pages = allocator.alloc(count)
            assert (pages is None) == (count > num_pages - 1 - len(taken))
            taken += pages or []
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(1, num_pages))
        assert (allocator.used, allocator.available) == (len(taken), num_pages - 1 - len(taken))


@pytest.mark.parametrize("pages", [[0], [3, 3], [1], [7], [-1]])
def test_what_was_not_given_out_is_not_taken_back(pages: list[int]) -> None:
    allocator = TokenToKVPoolAllocator(7)
    taken = allocator.alloc(6)
    assert taken is not None
    allocator.free([1])
    with pytest.raises(ValueError, match="page"):
        allocator.free([2, *pages])
    assert allocator.available == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_kept_by_layer_and_slot(dtype: torch.dtype) -> None:
    pool = KVPool(4, 3, layers=2, kv_heads=2, head_dim=5, dtype=dtype, device="cpu")
    keys, values = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    loc = torch.tensor([7, 3, 11])
    pool.set_kv_buffer(1, loc, keys, values)
    k, v = pool.get_kv_buffer(1)
    assert k.shape == v.shape == (12, 2, 5)
    assert k[loc].equal(keys.to(dtype))
    assert v[loc].equal(values.to(dtype))
    assert k.abs().sum(dim=(1, 2)).count_nonzero() == 3
    assert not any(one.any() for one in pool.get_kv_buffer(0))
    assert pool.nbytes == 2 * 2 * 12 * 2 * 5 * dtype.itemsize


def test_a_pool_needs_a_page_beside_the_dummy() -> None:
    with pytest.raises(UsageError, match="at least 2 pages"):
        KVPool(1, 16, 1, 1, 1, torch.float32, "cpu")


def test_rows_are_given_once_and_never_the_one_for_padding() -> None:
    pool = ReqToTokenPool(3, max_context_len=10, page_size=4, device="cpu")
    assert pool.page_table.shape == (4, 3)
    assert sorted(pool.alloc() for _ in range(3)) == [1, 2, 3]
    with pytest.raises(ValueError, match="at most 3 sequences"):
        pool.alloc()
    pool.free(2)
    with pytest.raises(ValueError, match="row 2"):
        pool.free(2)
    with pytest.raises(ValueError, match="row 0"):
        pool.free(0)
    assert pool.alloc() == 2


def test_the_table_takes_many_pages_at_once() -> None:
    pool = ReqToTokenPool(3, max_context_len=10, page_size=4, device="cpu")
    pool.write({(2, 0): 5, (2, 2): 6, (1, 1): 7})
    pool.write({(2, 0): 8})
    pool.write({})
    assert pool.page_table.tolist() == [[0, 0, 0], [0, 7, 0], [8, 0, 6], [0, 0, 0]]


@pytest.mark.parametrize(("tokens", "size", "pages"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (3, 1, 3)])
def test_pages_for(tokens: int, size: int, pages: int) -> None:
    assert pages_for(tokens, size) == pages

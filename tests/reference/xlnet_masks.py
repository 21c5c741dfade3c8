"""XLNet's targets and its mask of who sees whom on plain lists, as zihangdai/xlnet's data_utils.py makes them."""

from __future__ import annotations

from collections.abc import Callable


def sample_mask(
    starts: list[bool], goal: int, uniform: Callable[[], float], *, alpha: int, longest: int
) -> list[int]:
    """The places of the targets of one half of a row, `_sample_mask`; a draw below is a uniform number."""
    seg_len = len(starts)
    total = sum(1.0 / k for k in range(1, longest + 1))
    mask = [False] * seg_len
    num_predict = 0
    cur_len = 0
    while cur_len < seg_len:
        if num_predict >= goal:
            break
        u, n = uniform(), 0
        below = 0.0
        while n < longest and below <= u:
            n += 1
            below = sum(1.0 / k for k in range(1, n + 1)) / total
        n = min(n, goal - num_predict)
        ctx_size = n * alpha
        l_ctx = int(uniform() * ctx_size)
        r_ctx = ctx_size - l_ctx
        beg = cur_len + l_ctx
        while beg < seg_len and not starts[beg]:
            beg += 1
        if beg >= seg_len:
            break
        end = beg + 1
        cnt_ngram = 1
        while end < seg_len:
            # their loop asks the first token, which begins a word, again and again
            if starts[beg]:
                cnt_ngram += 1
                if cnt_ngram > n:
                    break
            end += 1
        if end >= seg_len:
            break
        for place in range(beg, end):
            mask[place] = True
            num_predict += 1
        cur_len = end + r_ctx
    while num_predict < goal:
        i = int(uniform() * seg_len)
        if not mask[i]:
            mask[i] = True
            num_predict += 1
    return [i for i in range(seg_len) if mask[i]]


def local_perm(index: list[int], masked: list[bool], functional: list[bool]) -> list[list[bool]]:
    """Whether i may attend to j in one half of a row, `_local_perm`: the query stream; the content stream also sees itself."""
    size = len(index)
    non_mask = [not masked[i] and not functional[i] for i in range(size)]
    rev_index = [-1 if non_mask[i] else index[i] for i in range(size)]
    target = [not non_mask[i] and not functional[i] for i in range(size)]
    self_rev = [rev_index[i] if target[i] else rev_index[i] + 1 for i in range(size)]
    return [
        [not (self_rev[i] <= rev_index[j] and not non_mask[j]) for j in range(size)]
        for i in range(size)
    ]


def two_halves(first: list[list[bool]], second: list[list[bool]]) -> list[list[bool]]:
    """The first half sees nothing of the second, which sees all of it."""
    a, b = len(first), len(second)
    return [row + [False] * b for row in first] + [[True] * a + row for row in second]

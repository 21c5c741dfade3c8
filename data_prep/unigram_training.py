"""Learns the pieces of a Unigram model from counted words, all words at once, by numpy (Kudo 2018, section 3.2).

    seeds      the substrings of words with the largest count * letters, and all letters
    EM         a piece's count is what its words give it, over all their segmentations by probability
    pruning    a quarter of the pieces goes, those whose words fare best with others; and EM again
    end        the best of them, when there are few enough

    end        0   1   2   3       words are columns, the longest first; so those that have a letter at a place are the
    word 0       c   a   t         first of them. A hit is a piece between two places of a word. Hits of one end and
    word 1       a   t             one length are a group, whose words are all different.

As the trainers of sentencepiece and tokenizers, with two differences. A seed counts as often as its words, where theirs
counts in how many different words it is. And sums are added in one order, so the same words give the same pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

MOST_LETTERS = 16  # of a piece
MOST_PLACES = 32  # of a word; longer ones are cut, else their probability is no number
SEEDS = 2**20
ROUNDS_OF_EM = 2  # between two prunings
KEPT_SHARE = 0.75  # of the pieces, by a pruning
PRUNED_TO = 1.1  # times the pieces that are wanted
LEAST_COUNT = 0.5  # of a piece that stays
HITS_AT_ONCE = 2**22  # that are added up

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_TABLE_BITS = 24


def learn_pieces(
    counts: Mapping[str, int], *, wanted: int, least: int = 1, without: Collection[str] = ()
) -> list[tuple[str, float]]:
    """The pieces and their log-probabilities, the most probable first.

    counts: of words
    wanted: so many pieces; fewer where the words give no more, and more where there are more letters
    least: count of a word that stands for others, so that what is in no second one makes no piece
    without: names of special tokens
    """
    if not counts:
        return []
    words = _columns_of(counts)
    pieces = _seeds(words, least_count=2 * least)
    # as many more as may be taken out by their names
    most = int(wanted * PRUNED_TO) + len(without)
    while True:
        hits = _hits(words.letters, pieces.hashes_P)
        for _ in range(ROUNDS_OF_EM):
            expected_P = _expected(hits, pieces, words.counts_W)
            stays_P = (expected_P >= LEAST_COUNT) | (pieces.lengths_P == 1)
            expected_P = np.maximum(expected_P, LEAST_COUNT)[stays_P]
            hits = hits.of(stays_P)
            # a sparse prior: digamma of counts in place of their logarithm
            logs = _digamma(expected_P) - _digamma(expected_P.sum(keepdims=True))
            pieces = pieces.of(stays_P, logs)
        if len(pieces.hashes_P) <= most:
            break
        stays_P = _pruned(words, hits, pieces, most=most)
        if stays_P.all():
            break
        pieces = pieces.of(stays_P, pieces.logs_P[stays_P])
    return _best(words, pieces, wanted=wanted, without=without)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Words by place: letters[p] are the code points at place p of the words that have one, which are the first."""

    letters: list[np.ndarray]  # uint64
    counts_W: np.ndarray  # float64


def _columns_of(counts: Mapping[str, int]) -> _Columns:
    parts = []
    for word, count in counts.items():
        for begin in range(0, len(word), MOST_PLACES):
            parts.append((word[begin : begin + MOST_PLACES], count))
    # an order that does not depend on that of the words
    parts.sort(key=lambda part: (-len(part[0]), part))
    words = [word for word, _ in parts]
    lengths_W = np.fromiter(map(len, words), np.int64, count=len(words))
    joined = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
    starts_W = np.cumsum(lengths_W) - lengths_W
    columns = []
    for place in range(int(lengths_W[0])):
        first = np.searchsorted(-lengths_W, -place, side="left")
        columns.append(joined[starts_W[:first] + place].astype(np.uint64))
    return _Columns(letters=columns, counts_W=np.array([count for _, count in parts], np.float64))


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """Pieces in the order of their hashes, and where each of them is found in a word. P pieces."""

    hashes_P: np.ndarray
    words_P: np.ndarray
    begins_P: np.ndarray
    lengths_P: np.ndarray
    logs_P: np.ndarray

    def of(self, stays_P: np.ndarray, logs: np.ndarray) -> _Pieces:
        """Those that stay, with other log-probabilities."""
        return _Pieces(
            hashes_P=self.hashes_P[stays_P],
            words_P=self.words_P[stays_P],
            begins_P=self.begins_P[stays_P],
            lengths_P=self.lengths_P[stays_P],
            logs_P=logs,
        )


def _rolled(letters: list[np.ndarray], begin: int, length: int) -> Iterator[np.ndarray]:
    """Hashes of the substrings from a place on, of 1, 2, ... letters; of words that go on so far.

    64 bits each: two of 100 million different substrings share one with a chance of 1 in 4,000.
    """
    hashes = np.zeros(len(letters[begin]), np.uint64)
    for column in letters[begin : begin + length]:
        mixed = (column + np.uint64(1)) * _MIX
        mixed ^= mixed >> np.uint64(29)
        hashes = hashes[: len(column)] * _STEP + mixed
        yield hashes


def _seeds(words: _Columns, *, least_count: int) -> _Pieces:
    """The SEEDS substrings with the largest count * letters, and all letters, with shares of it as probabilities.

    words: counted
    least_count: of a substring of two and more letters
    """
    found = []
    scores = []
    places = len(words.letters)
    longest = min(MOST_LETTERS, places)
    rolls = [_rolled(words.letters, begin, longest) for begin in range(places)]
    for length in range(1, longest + 1):
        # all substrings of this length, at whatever place they begin
        hashes = [next(roll) for roll in rolls[: places - length + 1]]
        sizes = np.array([len(part) for part in hashes])
        hashes = np.concatenate(hashes)
        weights = np.concatenate([words.counts_W[:size] for size in sizes])
        # equal ones stand together now: their counts add up
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        firsts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        counts = np.add.reduceat(weights[order], firsts)
        kept = np.flatnonzero((counts >= least_count) | (length == 1))
        score = counts[kept] * length
        if len(kept) > SEEDS:
            kept = kept[np.sort(np.argsort(-score, kind="stable")[:SEEDS])]
            score = counts[kept] * length
        # the first place where each is found, so that its letters can be read
        at = order[firsts[kept]]
        begins = np.searchsorted(np.cumsum(sizes), at, side="right")
        rows = at - (np.cumsum(sizes) - sizes)[begins]
        found.append((ordered[firsts[kept]], rows, begins, np.full(len(kept), length)))
        scores.append(score)
    hashes, rows, begins, lengths = (np.concatenate(part) for part in zip(*found))
    scores = np.concatenate(scores)
    order = np.argsort(-scores, kind="stable")
    # all letters, and the best others
    is_letter = lengths[order] == 1
    order = np.concatenate([order[is_letter], order[~is_letter]])[: max(SEEDS, is_letter.sum())]
    order = order[np.argsort(hashes[order], kind="stable")]
    scores = scores[order]
    return _Pieces(
        hashes_P=hashes[order],
        words_P=rows[order],
        begins_P=begins[order],
        lengths_P=lengths[order],
        logs_P=np.log(scores) - np.log(scores.sum()),
    )


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Hits [begin, end) of pieces of `length` letters that end at `place`."""

    place: int
    length: int
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class _Hits:
    """Pieces in words, by groups in the order of their ends. K hits."""

    sizes: list[int]  # words that reach place 0, 1, ...
    groups: list[_Group]
    rows_K: np.ndarray  # int32, of words
    ids_K: np.ndarray  # int32, of pieces

    def of(self, stays_P: np.ndarray) -> _Hits:
        """Hits of the pieces that stay, under their new ids."""
        if stays_P.all():
            return self
        stays_K = stays_P[self.ids_K]
        groups = []
        begin = 0
        for group in self.groups:
            end = begin + np.count_nonzero(stays_K[group.begin : group.end])
            groups.append(_Group(place=group.place, length=group.length, begin=begin, end=end))
            begin = end
        ids_P = (np.cumsum(stays_P) - 1).astype(np.int32)
        return _Hits(
            sizes=self.sizes,
            groups=groups,
            rows_K=self.rows_K[stays_K],
            ids_K=ids_P[self.ids_K[stays_K]],
        )


def _hits(letters: list[np.ndarray], hashes_P: np.ndarray, *, of_whole: bool = True) -> _Hits:
    """The pieces in words.

    letters: of the words, by place
    hashes_P: of the pieces, ascending
    of_whole: False leaves out a piece that is a whole word
    """
    sizes = [len(column) for column in letters]
    sizes = [sizes[0], *sizes, 0] if sizes else [0, 0]
    # most substrings are no piece: a table of the hashes' first bits says so for 15 in 16 before a search
    shift = np.uint64(64 - _TABLE_BITS)
    table = np.zeros(2**_TABLE_BITS, bool)
    table[(hashes_P >> shift).astype(np.int64)] = True
    found = {}
    for begin in range(len(letters)):
        for length, hashes in enumerate(_rolled(letters, begin, MOST_LETTERS), start=1):
            rows = np.flatnonzero(table[(hashes >> shift).astype(np.int64)])
            # words that end here are the last ones
            if begin == 0 and not of_whole:
                rows = rows[rows < sizes[length + 1]]
            ids = np.searchsorted(hashes_P, hashes[rows])
            is_hit = hashes_P[np.minimum(ids, len(hashes_P) - 1)] == hashes[rows]
            found[begin + length, length] = (
                rows[is_hit].astype(np.int32),
                ids[is_hit].astype(np.int32),
            )
    count = sum(len(rows) for rows, _ in found.values())
    rows_K = np.empty(count, np.int32)
    ids_K = np.empty(count, np.int32)
    groups = []
    begin = 0
    for place, length in sorted(found):
        # taken out, so that they are in memory once
        rows, ids = found.pop((place, length))
        end = begin + len(rows)
        rows_K[begin:end] = rows
        ids_K[begin:end] = ids
        groups.append(_Group(place=place, length=length, begin=begin, end=end))
        begin = end
    return _Hits(sizes=sizes, groups=groups, rows_K=rows_K, ids_K=ids_K)


def _expected(hits: _Hits, pieces: _Pieces, counts_W: np.ndarray) -> np.ndarray:
    """How often each piece is expected [P], by forward and backward sums over the segmentations of each word.

        forward[i]  = sum over pieces that end at place i    of forward[their begin] * p
        backward[i] = sum over pieces that begin at place i  of backward[their end] * p
        expected(piece) = sum over its hits of count * forward[begin] * p * backward[end] / backward[0]

    Groups come in the order of their ends, so what a sum needs is there. In a group a word stands once.
    """
    # a factor for each letter keeps the sums near one; it cancels
    chances_P = np.exp(pieces.logs_P + _nats_a_letter(pieces) * pieces.lengths_P)
    values_K = chances_P[hits.ids_K]
    forward = [np.ones(hits.sizes[0])]
    forward += [np.zeros(size) for size in hits.sizes[1:-1]]
    for group in hits.groups:
        rows = hits.rows_K[group.begin : group.end]
        values = values_K[group.begin : group.end]
        forward[group.place][rows] += forward[group.place - group.length][rows] * values
    # one at the end of each word
    backward = [np.zeros(size) for size in hits.sizes[:-1]]
    for place in range(1, len(backward)):
        backward[place][hits.sizes[place + 1] :] = 1.0
    for group in reversed(hits.groups):
        rows = hits.rows_K[group.begin : group.end]
        # in place: from here on p * backward[end]
        values = values_K[group.begin : group.end]
        values *= backward[group.place][rows]
        backward[group.place - group.length][rows] += values
    # a word that no pieces make up gives nothing
    sums_W = backward[0]
    scale_W = np.divide(counts_W, sums_W, out=np.zeros_like(sums_W), where=sums_W > 0)
    for group in hits.groups:
        rows = hits.rows_K[group.begin : group.end]
        values = values_K[group.begin : group.end]
        values *= forward[group.place - group.length][rows]
        values *= scale_W[rows]
    expected_P = np.zeros(len(pieces.hashes_P))
    # ids become 64 bits wide here
    for begin in range(0, len(values_K), HITS_AT_ONCE):
        part = slice(begin, begin + HITS_AT_ONCE)
        expected_P += np.bincount(hits.ids_K[part], values_K[part], minlength=len(expected_P))
    return expected_P


def _nats_a_letter(pieces: _Pieces) -> float:
    """What a letter costs in nats, in the mean over pieces by their probability."""
    chances_P = np.exp(pieces.logs_P)
    return float(-(chances_P * pieces.logs_P).sum() / (chances_P * pieces.lengths_P).sum())


@dataclass(frozen=True, kw_only=True)
class _Paths:
    """The best segmentation of each word."""

    rows: np.ndarray  # word of each piece in them
    ids: np.ndarray
    scores_W: np.ndarray


def _paths(hits: _Hits, logs_P: np.ndarray) -> _Paths:
    """Viterbi's algorithm over all words at once; a word that no pieces make up has no path and a score of -inf.

    hits: of the pieces in the words
    logs_P: of the pieces
    """
    logs_K = logs_P[hits.ids_K]
    best = [np.zeros(hits.sizes[0])]
    best += [np.full(size, -np.inf) for size in hits.sizes[1:-1]]
    ids = [np.zeros(size, np.int32) for size in hits.sizes[:-1]]
    steps = [np.zeros(size, np.int8) for size in hits.sizes[:-1]]
    for group in hits.groups:
        rows = hits.rows_K[group.begin : group.end]
        scores = best[group.place - group.length][rows] + logs_K[group.begin : group.end]
        better = scores > best[group.place][rows]
        rows = rows[better]
        best[group.place][rows] = scores[better]
        ids[group.place][rows] = hits.ids_K[group.begin : group.end][better]
        steps[group.place][rows] = group.length

    # all places of all words in one line, and where each word ends
    firsts = np.concatenate([[0], np.cumsum(hits.sizes[:-1])[:-1]])
    flat_ids = np.concatenate(ids)
    flat_steps = np.concatenate(steps)
    rows = np.arange(hits.sizes[0])
    places = np.zeros(hits.sizes[0], np.int64)
    for place in range(1, len(best)):
        places[: hits.sizes[place]] = place
    scores_W = np.concatenate(best)[firsts[places] + rows]
    is_open = np.isfinite(scores_W)
    rows = rows[is_open]
    places = places[is_open]
    # a piece back at a time, in all words that have not come to their begin
    all_rows = []
    all_ids = []
    while len(rows):
        at = firsts[places] + rows
        all_rows.append(rows)
        all_ids.append(flat_ids[at])
        places = places - flat_steps[at]
        rows = rows[places > 0]
        places = places[places > 0]
    none = np.zeros(0, np.int64)
    return _Paths(
        rows=np.concatenate([none, *all_rows]),
        ids=np.concatenate([none, *all_ids]),
        scores_W=scores_W,
    )


def _pruned(words: _Columns, hits: _Hits, pieces: _Pieces, *, most: int) -> np.ndarray:
    """Which pieces stay: letters, and those without which the best segmentations would lose most, bool [P].

        with it       freq * log(freq / total)
        without it    each of the n pieces in its place occurs freq times more:
                      freq * sum over them of log((their freq + freq) / (total + freq (n - 1)))

    words, hits, pieces: as in learn_pieces
    most: of the pieces are wanted; a pruning takes no more than a quarter
    """
    count = len(pieces.hashes_P)
    paths = _paths(hits, pieces.logs_P)
    freq_P = np.bincount(paths.ids, words.counts_W[paths.rows], minlength=count)
    # what would stand in a piece's place: its own best segmentation by others
    order_P = np.argsort(-pieces.lengths_P, kind="stable")
    others = _hits(_letters_of(words, pieces, order_P), pieces.hashes_P, of_whole=False)
    instead = _paths(others, pieces.logs_P)
    owner = order_P[instead.rows]
    pieces_P = np.bincount(owner, minlength=count)
    total = freq_P.sum()
    logs = np.log(np.maximum(freq_P[instead.ids] + freq_P[owner], 1e-300))
    sums_P = np.bincount(owner, logs, minlength=count)
    logs_P = np.log(np.maximum(freq_P, 1e-300)) - np.log(total)
    total_P = np.log(total + freq_P * (pieces_P - 1))
    loss_P = freq_P * (logs_P - (sums_P - pieces_P * total_P))
    loss_P[freq_P == 0] = -np.inf
    loss_P[pieces.lengths_P == 1] = np.inf
    letters = np.count_nonzero(pieces.lengths_P == 1)
    size = max(most, int(KEPT_SHARE * count), letters)
    stays_P = np.zeros(count, bool)
    stays_P[np.argsort(-loss_P, kind="stable")[:size]] = True
    return stays_P & ((freq_P > 0) | (pieces.lengths_P == 1))


def _letters_of(words: _Columns, pieces: _Pieces, order: np.ndarray) -> list[np.ndarray]:
    """The pieces as words."""
    sizes = np.array([len(column) for column in words.letters])
    firsts = np.cumsum(sizes) - sizes
    flat = np.concatenate(words.letters)
    rows = pieces.words_P[order]
    begins = pieces.begins_P[order]
    lengths = pieces.lengths_P[order]
    columns = []
    for place in range(int(lengths[0])):
        count = np.count_nonzero(lengths > place)
        columns.append(flat[firsts[begins[:count] + place] + rows[:count]])
    return columns


def _best(
    words: _Columns, pieces: _Pieces, *, wanted: int, without: Collection[str]
) -> list[tuple[str, float]]:
    """All letters, and the most probable others."""
    order = np.argsort(-pieces.lengths_P, kind="stable")
    texts = _texts_of(_letters_of(words, pieces, order))
    entries = zip(texts, pieces.logs_P[order].tolist(), strict=True)
    ranked = sorted(entries, key=lambda entry: (-entry[1], entry[0]))
    singles = [entry for entry in ranked if len(entry[0]) == 1]
    others = [entry for entry in ranked if len(entry[0]) > 1 and entry[0] not in without]
    kept = singles + others[: max(0, wanted - len(singles))]
    return sorted(kept, key=lambda entry: (-entry[1], entry[0]))


def _texts_of(letters: list[np.ndarray]) -> list[str]:
    texts = [""] * len(letters[0])
    for column in letters:
        for row, code in enumerate(column.tolist()):
            texts[row] += chr(code)
    return texts


def _digamma(values: np.ndarray) -> np.ndarray:
    """The logarithmic derivative of the gamma function, of numbers above 0."""
    values = values.copy()
    below = np.zeros_like(values)
    while (small := values < 7).any():
        below[small] -= 1 / values[small]
        values[small] += 1
    values -= 0.5
    squares = 1 / values**2
    return (
        below
        + np.log(values)
        + squares / 24
        - 7 / 960 * squares**2
        + 31 / 8064 * squares**3
        - 127 / 30720 * squares**4
    )

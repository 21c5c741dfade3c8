"""Words of printable ASCII to the best pieces of a Unigram model, thousands of words at once, by numpy.

    row   word 0   word 1       words are columns, the longest first; place = row * words + column
    0     c        a            pieces that begin at a place: c ca cat, found letter by letter in a trie
    1     a        t            best[end] = the largest best[start] + score of the pieces that end there, row after row
    2     t

The ids are those of tokenizers (encode_optimized of its Unigram model): scores of a path add up from left to right in
float64, and of equal sums the one whose last piece is longest wins. Words with an unknown letter are not taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.word_rules import SPACE_MARK, WordRules

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# of a block of words, whose arrays stay in a core's cache
MOST_PLACES = 2**16
# of a word; longer ones are few, and a block of few words costs more than the library
MOST_LETTERS = 256
MOST_TABLE_ENTRIES = 2**24  # 64 MiB a process
# a sum of such scores is far from the largest number
MOST_SCORE = 1e100
# pieces of so many letters have a row each, of all places; longer ones are listed
ROWS_OF_SCORES = 4

# in pieces, for the mark that begins a word
_LEAD = b" "
_PRINTABLE = bytes(range(33, 127)).decode()


@dataclass(frozen=True, kw_only=True)
class Trie:
    """The pieces letter by letter. Nodes: those that only go on (0 is the root), go on and are pieces, only are pieces."""

    # of each byte: its number among the letters of pieces; 0 for none
    letters: np.ndarray
    letter_count: int  # with 0
    # of node * letter_count + letter, -1 for none; int32
    next_nodes: np.ndarray
    first_piece: int  # from here on nodes are pieces
    first_leaf: int  # from here on they do not go on
    # of each node; of those that are no piece -inf and 0, and once more at the end, for -1
    scores: np.ndarray  # float64
    ids: np.ndarray  # uint32
    longest: int  # letters of the longest piece

    @property
    def single(self) -> np.ndarray:
        """Which bytes are pieces by themselves, bool [256]."""
        return (self.next_nodes[: self.letter_count] >= self.first_piece)[self.letters]


def trie_of(pieces: Mapping[bytes, int], scores: np.ndarray) -> Trie:
    """The trie of pieces with their ids, by which `scores` are found; one piece at least."""
    words = list(pieces)
    data = np.frombuffer(b"".join(words), np.uint8)
    lengths_W = np.fromiter(map(len, words), np.int64, count=len(words))
    starts_W = np.cumsum(lengths_W) - lengths_W
    used = np.unique(data)
    letters = np.zeros(256, np.uint8)
    letters[used] = np.arange(1, len(used) + 1)
    letter_count = len(used) + 1

    # one letter of all pieces after another; where a piece is so far, by node and letter
    node_W = np.zeros(len(words), np.int64)
    steps = []
    nodes = 1
    for depth in range(int(lengths_W.max())):
        longer = np.flatnonzero(lengths_W > depth)
        step = node_W[longer] * letter_count + letters[data[starts_W[longer] + depth]]
        different, which = np.unique(step, return_inverse=True)
        node_W[longer] = nodes + which
        steps.append(different)
        nodes += len(different)
    parents, last_letters = np.divmod(np.concatenate(steps), letter_count)

    # by kind, the root first
    is_piece = np.zeros(nodes, bool)
    is_piece[node_W] = True
    goes_on = np.zeros(nodes, bool)
    goes_on[parents] = True
    kinds = np.where(goes_on, is_piece.astype(np.int8), 2)
    numbers = np.empty(nodes, np.int64)
    numbers[np.argsort(kinds, kind="stable")] = np.arange(nodes)

    first_leaf = int(goes_on.sum())
    next_nodes = np.full(first_leaf * letter_count, -1, np.int32)
    next_nodes[numbers[parents] * letter_count + last_letters] = numbers[1:]
    ids = np.zeros(nodes + 1, np.uint32)
    ids[numbers[node_W]] = list(pieces.values())
    scores_of_nodes = np.full(nodes + 1, -np.inf)
    scores_of_nodes[numbers[node_W]] = scores[list(pieces.values())]
    return Trie(
        letters=letters,
        letter_count=letter_count,
        next_nodes=next_nodes,
        first_piece=int((kinds == 0).sum()),
        first_leaf=first_leaf,
        scores=scores_of_nodes,
        ids=ids,
        longest=int(lengths_W.max()),
    )


class Viterbi:
    """Ids of words of printable ASCII."""

    def __init__(self, trie: Trie, *, lead: bytes, lowercase: bool) -> None:
        """What the model sees: `lead` and a word, its large letters as small ones where `lowercase`."""
        self._trie = trie
        self._letters = trie.letters.copy()
        self._known = trie.single.copy()
        if lowercase:
            self._letters[65:91] = self._letters[97:123]
            self._known[65:91] = self._known[97:123]
        self._known[list(_LEAD)] = False
        # the number of the letter before each word
        self._lead = trie.letters[list(lead)]
        # of two letters: first * letter_count + second
        first = trie.next_nodes[: trie.letter_count].astype(np.int64)
        rows = np.where((first >= 0) & (first < trie.first_leaf), first, 0)
        pairs = trie.next_nodes.reshape(-1, trie.letter_count)[rows]
        pairs[rows == 0] = -1
        self._first_nodes = first.astype(np.int32)
        self._first_scores = trie.scores[first]
        self._pair_nodes = pairs.reshape(-1)
        self._pair_scores = trie.scores[self._pair_nodes]

    def takes(self, data: np.ndarray, ends_W: np.ndarray) -> np.ndarray:
        """Which words `encode` takes, bool [W]; data: their bytes end to end, uint8; no word is empty."""
        takes_W = np.diff(ends_W, prepend=0) <= MOST_LETTERS
        unknown = np.flatnonzero(~self._known[data])
        takes_W[np.searchsorted(ends_W, unknown, side="right")] = False
        return takes_W

    def encode(
        self, data: np.ndarray, starts_W: np.ndarray, lengths_W: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all words end to end [T] uint32, tokens per word [W] int64); of words that `takes` has found.

        data: bytes, uint8
        starts_W: where words begin in it
        lengths_W: bytes of each word
        """
        letters = self._letters[data]
        order = np.argsort(-lengths_W, kind="stable")
        counts_W = np.zeros(len(order), np.int64)
        # of each place in a word, from its last: the words that have it, and their ids
        found: list[tuple[int, np.ndarray, np.ndarray]] = []
        begin = 0
        while begin < len(order):
            rows = int(lengths_W[order[begin]]) + len(self._lead)
            words = order[begin : begin + MOST_PLACES // rows]
            begin += len(words)
            grid = self._grid(letters, starts_W[words], lengths_W[words])
            ends = self._ends(grid, rows)
            _choose(ends, lengths_W[words] + len(self._lead))
            for back, (columns, ids) in enumerate(self._paths(ends, lengths_W[words])):
                counts_W[words[columns]] += 1
                found.append((back, words[columns], ids))

        ends_W = np.cumsum(counts_W)
        ids_T = np.zeros(int(counts_W.sum()), np.uint32)
        for back, words, ids in found:
            ids_T[ends_W[words] - 1 - back] = ids
        return ids_T, counts_W

    def _grid(self, letters: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Letters of words, the longest first, below one another [rows, words]; 0 behind a word, and in as many rows as the
        longest piece has letters."""
        rows = int(lengths[0])
        lead = len(self._lead)
        grid = np.zeros((lead + rows + self._trie.longest, len(starts)), np.uint8)
        if lead:
            grid[0] = self._lead[0]
        below = np.arange(rows)[:, None]
        # behind the last word there is nothing to read
        np.take(letters, starts + below, mode="clip", out=grid[lead : lead + rows])
        if lengths[-1] < rows:
            grid[lead : lead + rows][below >= lengths] = 0
        return grid

    def _ends(self, grid: np.ndarray, rows: int) -> _Ends:
        """The pieces that end at each place of the first rows of a grid."""
        trie = self._trie
        words = grid.shape[1]
        letters = grid.reshape(-1)
        first = letters[: rows * words]
        scores = np.full((ROWS_OF_SCORES, (rows + 1) * words), -np.inf)
        nodes = np.full((ROWS_OF_SCORES + 1, (rows + 1) * words), -1, np.int32)

        # pieces of one letter and of two, of all places at once
        scores[0, words:] = self._first_scores[first]
        nodes[0, words:] = self._first_nodes[first]
        pairs = first[:-words].astype(np.int64) * trie.letter_count + first[words:]
        scores[1, 2 * words :] = self._pair_scores[pairs]
        nodes[1, 2 * words :] = self._pair_nodes[pairs]

        # longer ones from the places where a piece may go on; no node has -1 as uint32
        node = nodes[1, 2 * words :]
        on = np.flatnonzero(node.view(np.uint32) < trie.first_leaf)
        node = node[on]
        end = on + 2 * words
        listed = _Listed()
        for length in range(3, trie.longest + 1):
            if not len(node):
                break
            node = trie.next_nodes[node.astype(np.int64) * trie.letter_count + letters[end]]
            end += words
            is_piece = np.flatnonzero(node >= trie.first_piece)
            if length <= ROWS_OF_SCORES:
                scores[length - 1, end[is_piece]] = trie.scores[node[is_piece]]
                nodes[length - 1, end[is_piece]] = node[is_piece]
            else:
                listed.add(end[is_piece], node[is_piece], length)
            on = np.flatnonzero(node.view(np.uint32) < trie.first_leaf)
            node = node[on]
            end = end[on]
        return _Ends(
            words=words, scores=scores, nodes=nodes, longer=listed.by_rows(trie, rows, words)
        )

    def _paths(self, ends: _Ends, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The last pieces of all words, then those before them, and so on: (columns, ids); lengths: bytes of the words."""
        columns = np.arange(ends.words)
        at = (lengths + len(self._lead)) * ends.words + columns
        nodes = ends.nodes.reshape(-1)
        while len(at):
            length = ends.chosen[at].astype(np.int64)
            row = np.minimum(length - 1, ROWS_OF_SCORES)
            yield columns, self._trie.ids[nodes[row * ends.nodes.shape[1] + at]]
            at -= length * ends.words
            # the first row of ends is that of no letters
            left = np.flatnonzero(at >= ends.words)
            at = at[left]
            columns = columns[left]


@dataclass(frozen=True, kw_only=True)
class _Longer:
    """Pieces of more than ROWS_OF_SCORES letters in a block, by the row where they end, then by their letters. L in all."""

    ends_L: np.ndarray
    starts_L: np.ndarray
    scores_L: np.ndarray
    nodes_L: np.ndarray
    lengths_L: np.ndarray  # letters, uint8
    bounds: list[int]  # where the pieces of each row begin among them, and those of the last end


class _Listed:
    """Pieces of more than ROWS_OF_SCORES letters as they are found, the shortest first."""

    def __init__(self) -> None:
        self._ends = [np.zeros(0, np.int64)]
        self._nodes = [np.zeros(0, np.int32)]
        self._lengths = [np.zeros(0, np.uint8)]

    def add(self, ends: np.ndarray, nodes: np.ndarray, length: int) -> None:
        """Pieces of so many letters."""
        self._ends.append(ends)
        self._nodes.append(nodes)
        self._lengths.append(np.full(len(ends), length, np.uint8))

    def by_rows(self, trie: Trie, rows: int, words: int) -> _Longer:
        """All that were added to a block of so many rows and words."""
        ends_L = np.concatenate(self._ends)
        rows_L = (ends_L // words).astype(np.uint16)
        # a stable sort of 16 bits is by their counts
        order = np.argsort(rows_L, kind="stable")
        ends_L = ends_L[order]
        nodes_L = np.concatenate(self._nodes)[order]
        lengths_L = np.concatenate(self._lengths)[order]
        return _Longer(
            ends_L=ends_L,
            starts_L=ends_L - lengths_L.astype(np.int64) * words,
            scores_L=trie.scores[nodes_L],
            nodes_L=nodes_L,
            lengths_L=lengths_L,
            bounds=np.searchsorted(rows_L[order], np.arange(rows + 2)).tolist(),
        )


class _Ends:
    """The pieces of a block by the places where they end, of which `_choose` chooses one each. E places, the first row's are
    those before any letter."""

    def __init__(
        self, *, words: int, scores: np.ndarray, nodes: np.ndarray, longer: _Longer
    ) -> None:
        """Of the pieces of one to ROWS_OF_SCORES letters:

        words: columns of the block
        scores: by letters and place [ROWS_OF_SCORES, E]; -inf for none
        nodes: in the trie, the same; the row more is for a longer one that is chosen [ROWS_OF_SCORES + 1, E]
        longer: the other pieces
        """
        self.words = words
        self.scores = scores
        self.nodes = nodes
        self.longer = longer
        # letters of the piece that is chosen at each place
        self.chosen = np.ones(scores.shape[1], np.uint8)


def _choose(ends: _Ends, lengths: np.ndarray) -> None:
    """Chooses the last piece of the best path to each place; lengths: letters of the words, from most to fewest."""
    words = ends.words
    best = np.zeros(len(ends.chosen))
    # how many words have a row's letter
    widths = np.searchsorted(-lengths, -np.arange(int(lengths[0]) + 1), side="right").tolist()
    for row in range(1, len(widths)):
        here = slice(row * words, row * words + widths[row])
        best_here = best[here]
        chosen_here = ends.chosen[here]
        # every letter is a piece, so there is a path
        np.add(best[_rows_before(here, words)], ends.scores[0, here], out=best_here)
        for length in range(2, min(row, ROWS_OF_SCORES) + 1):
            sums = best[_rows_before(here, length * words)] + ends.scores[length - 1, here]
            # of equal ones the longest
            lengths_here = (sums >= best_here).view(np.uint8)
            lengths_here *= length
            np.maximum(chosen_here, lengths_here, out=chosen_here)
            np.maximum(best_here, sums, out=best_here)
        _choose_longer(ends, best, row)


def _rows_before(here: slice, places: int) -> slice:
    return slice(here.start - places, here.stop - places)


def _choose_longer(ends: _Ends, best: np.ndarray, row: int) -> None:
    """The same for the longer pieces that end in a row, after the others."""
    longer = ends.longer
    found = slice(longer.bounds[row], longer.bounds[row + 1])
    if found.start == found.stop:
        return
    at = longer.ends_L[found]
    sums = best[longer.starts_L[found]] + longer.scores_L[found]
    np.maximum.at(best, at, sums)
    won = np.flatnonzero(sums == best[at])
    # of several at a place the last counts, which is the longest
    ends.chosen[at[won]] = longer.lengths_L[found][won]
    ends.nodes[ROWS_OF_SCORES, at[won]] = longer.nodes_L[found][won]


def viterbi_of(tokenizer: Tokenizer, rules: WordRules) -> Viterbi | None:
    """For a Unigram model whose ids can be found so; else None."""
    from tokenizers import models

    if rules.plain is None or not isinstance(tokenizer.model, models.Unigram):
        return None
    # the library's own scores: it may read the last digit of a file's otherwise
    model = json.loads(tokenizer.to_str())["model"]
    scores = np.array([score for _, score in model["vocab"]], np.float64)
    if not np.all(np.abs(scores) < MOST_SCORE):
        return None
    lead = _LEAD if rules.prefix else b""
    pieces = {}
    # of equal pieces the last counts
    for number, (piece, _) in enumerate(model["vocab"]):
        letters = piece.removeprefix(SPACE_MARK) if lead else piece
        if piece and not letters.strip(_PRINTABLE):
            mark = lead if len(letters) < len(piece) else b""
            pieces[mark + letters.encode("ascii")] = number
    # a path over what is unknown is not ours, nor one over a piece of more letters than `chosen` can hold
    if not pieces or lead and lead not in pieces or model["unk_id"] in pieces.values():
        return None
    if max(map(len, pieces)) > 255:
        return None
    trie = trie_of(pieces, scores)
    if len(trie.next_nodes) > MOST_TABLE_ENTRIES:
        return None
    return Viterbi(trie, lead=lead, lowercase=rules.plain == "lower")

"""Trains a tokenizer.json on a sample of text: byte-level BPE, WordPiece or Unigram, with the special tokens of a family.

kind         a text becomes                                    as
bpe          NFC, GPT-2's split in words, bytes                ModernBERT, RoBERTa
wordpiece    BERT's clean-up and split, pieces ##as these      BERT, ELECTRA, DistilBERT
unigram      NFKC, single spaces, which are U+2581             ALBERT, XLNet
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.byte_level_words import ByteLevelCounter
from data_prep.config import (
    ArrowSource,
    ColumnSource,
    CsvSource,
    HubSource,
    JsonlSource,
    MdsSource,
    ParquetSource,
    Source,
    TextSource,
    TsvSource,
)
from data_prep.counted_words import CountedWords, count_words
from data_prep.long_texts import by_chars
from data_prep.output import output
from data_prep.readers import InputFile, Parsed, find_files, numbered, parse, read_blocks
from data_prep.readers.blocks import without_skip
from data_prep.readers.cures import OPTION_SOURCE
from data_prep.readers.packed import PACKED_ENDINGS
from data_prep.tokenization import text_hash
from data_prep.tokenizer_files import SPECIALS, added_token, refuse_others, write_tokenizer_json
from data_prep.unigram_training import learn_pieces
from data_prep.words import WordCounter
from encoder.base.errors import ConfigError, UserError
from encoder.base.log import say
from encoder.base.tokenizer_json import Frame, template
from encoder.data.shard_format import INDEX

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

MOST_SAMPLE_MB = 1_000_000
MOST_CHARACTERS = 1000  # of a WordPiece alphabet, as BERT's; rarer ones are unknown
PREFIX = "##"  # of a WordPiece inside of a word
COUNTED_CHARS = 2**22  # whose words are counted at a time
# characters of all different words that are learned from; 10 us and 0.15 KB for each of Unigram
MOST_WORD_CHARS = {"bpe": 2**24, "unigram": 2**23, "wordpiece": 2**24}
REPEATED_CHARS = 2**16  # of words given to the library at a time
NEVER_CHOSEN = -1000.0  # score of a Unigram entry that no text gives


@dataclass(frozen=True, kw_only=True)
class SpecialNames:
    """The special tokens of a family, and the ids that they have in its published vocabularies."""

    roles: dict[str, str]
    first: tuple[str, ...]  # ids 0, 1, ...
    last: tuple[str, ...] = ()  # the last ids
    frame: Frame = "both_ends"


NAMES = {
    "bert": SpecialNames(
        roles={"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"},
        first=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    ),
    "roberta": SpecialNames(
        roles={"cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"},
        first=("<s>", "<pad>", "</s>", "<unk>"),
        last=("<mask>",),
    ),
    "albert": SpecialNames(
        roles={"cls": "[CLS]", "sep": "[SEP]", "pad": "<pad>", "mask": "[MASK]", "unk": "<unk>"},
        first=("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"),
    ),
    "xlnet": SpecialNames(
        roles={"cls": "<cls>", "sep": "<sep>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"},
        first=("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"),
        frame="end",
    ),
}
NAMES_OF_KIND = {"bpe": "bert", "wordpiece": "bert", "unigram": "albert"}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What is to be trained."""

    kind: str = "bpe"
    names: str | None = None  # of the special tokens; None: those of the kind
    vocab_size: int = 8192  # entries, special tokens included
    unused: int = 0  # of them [unused0], ..., for tokens that come later
    lowercase: bool = False  # and without accents
    sample_mb: float = 100.0  # of the text

    def __post_init__(self) -> None:
        # special and unused entries, and the smallest alphabet: 256 bytes, or one letter
        least = len(self.special.first + self.special.last) + self.unused
        least += 256 if self.kind == "bpe" else 1
        if self.vocab_size < least:
            of_bytes = "256 bytes and " if self.kind == "bpe" else "a letter and "
            others = least - (256 if self.kind == "bpe" else 1)
            raise ConfigError(
                f"--vocab-size is {self.vocab_size}; needed: at least {least} "
                f"({of_bytes}{others} special tokens)."
            )
        if not 0 < self.sample_mb <= MOST_SAMPLE_MB:
            raise ConfigError(
                f"--sample-mb is {self.sample_mb:g}; needed: more than 0 and at most"
                f" {MOST_SAMPLE_MB:,}."
            )

    @property
    def special(self) -> SpecialNames:
        """The special tokens; behind a byte-level BPE with BERT's names they are the last, as ModernBERT has them."""
        name = self.names or NAMES_OF_KIND[self.kind]
        if self.kind == "bpe" and name == "bert":
            return SpecialNames(roles=NAMES[name].roles, first=(), last=SPECIALS)
        return NAMES[name]

    @property
    def unused_names(self) -> tuple[str, ...]:
        return tuple(f"[unused{number}]" for number in range(self.unused))


def train_tokenizer(
    sources: Sequence[Source], root: Path, out: Path, config: TrainingConfig
) -> None:
    """Trains a tokenizer of exactly `vocab_size` entries.

    sources: the text, of which a sample is read
    root: above their files
    out: the tokenizer.json to write
    config: kind, names and sizes

    Raises ConfigError, also where the text gives fewer entries.
    """
    special = config.special
    tokenizer = _untrained(config)
    # `inside` stand before the learned entries, `appended` behind; the trainer counts the former
    inside = _inside(config)
    appended = [*special.last, *([] if inside else config.unused_names)]
    vocab_size = config.vocab_size - len(appended)
    refuse_others(out)
    sample = _Sample(sources, root, int(config.sample_mb * 1e6))
    with output(out.parent, [out.name]):
        notes = _learn(
            tokenizer, sample, config, vocab_size=vocab_size, inside=inside, appended=appended
        )
        # too little text gives fewer entries; an alphabet alone may be more
        learned = tokenizer.get_vocab_size()
        if learned != config.vocab_size - len(appended):
            found = learned + len(appended)
            advice = "Give more text, or a smaller --vocab-size."
            if found > config.vocab_size:
                advice = f"Its letters alone take that many: --vocab-size {found} or more."
            raise ConfigError(
                f"{sample.documents:,} documents ({sample.bytes / 1e6:.1f} MB) give "
                f"{found:,} entries; needed: {config.vocab_size:,}. {''.join(notes)}{advice}"
            )
        content = json.loads(tokenizer.to_str())
        _put_specials(content, config, appended, first_id=learned)
        replaced = write_tokenizer_json(content, out)
    line = (
        f"{out}: {config.vocab_size:,} entries, trained on {sample.documents:,} documents"
        f" ({sample.bytes / 1e6:.1f} MB). {''.join(notes)}"
    )
    say(line.rstrip() + replaced)


def _learn(
    tokenizer: Tokenizer,
    sample: _Sample,
    config: TrainingConfig,
    *,
    vocab_size: int,
    inside: Sequence[str],
    appended: Sequence[str],
) -> list[str]:
    """Puts a trained model into a tokenizer; sentences on what was left out, each with a space behind it.

    tokenizer: with its normalizer and splits
    sample: the text
    config: kind and names
    vocab_size: entries to be learned, `inside` included
    inside: entries that stand first
    appended: entries that stand behind, and are put there later
    """
    words = _words(tokenizer, sample, config)
    notes = []
    if not words.is_whole:
        notes.append(
            f"Of about {words.met:,} different words {len(words.counts):,} were learned from: all"
            " frequent ones, and some rare ones that count for the others. "
        )
    if config.kind == "bpe":
        trainer = _trainer(config, vocab_size=vocab_size, special=inside, letters=None)
        _train_on_words(tokenizer, words, trainer)
        return notes
    if config.kind == "wordpiece":
        letters = _letters(words)
        trainer = _trainer(config, vocab_size=vocab_size, special=inside, letters=letters)
        _train_on_words(tokenizer, words, trainer)
        if letters.unknown:
            notes.append(
                f"{letters.unknown:,} letters are in no entry, {letters.unknown_share:.2%} of the"
                f" text's: a WordPiece has the {MOST_CHARACTERS:,} most frequent. --kind bpe and"
                " unigram have all. "
            )
        return notes

    pieces = learn_pieces(
        words.counts,
        wanted=vocab_size - len(inside),
        least=words.least,
        without={*inside, *appended},
    )
    _put_pieces(tokenizer, pieces, config, special=inside)
    return notes


def _train(tokenizer: Tokenizer, texts: Iterator[str], trainer: Any) -> None:
    """In a thread of its own: the library's minutes are one call, in which this thread would hear no Ctrl-C."""
    failed: list[BaseException] = []

    def train() -> None:
        try:
            tokenizer.train_from_iterator(texts, trainer)
        except BaseException as error:
            failed.append(error)

    # a daemon: the process does not wait for it
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _put_pieces(
    tokenizer: Tokenizer,
    pieces: Sequence[tuple[str, float]],
    config: TrainingConfig,
    *,
    special: Sequence[str],
) -> None:
    """Gives a tokenizer the Unigram model of these pieces.

    tokenizer: with its normalizer and splits
    pieces: each with its log-probability
    config: names
    special: entries that stand first
    """
    from tokenizers import models

    entries = [*((name, 0.0) for name in special), *pieces]
    unk_id = special.index(config.special.roles["unk"])
    tokenizer.model = models.Unigram(entries, unk_id, False)
    tokenizer.add_special_tokens(_special_tokens(config, special))


def _special_tokens(config: TrainingConfig, names: Sequence[str]) -> list[AddedToken]:
    from tokenizers import AddedToken

    # [MASK] takes the space before it into itself
    mask = config.special.roles["mask"]
    return [AddedToken(name, special=True, normalized=False, lstrip=name == mask) for name in names]


def _train_on_words(tokenizer: Tokenizer, words: CountedWords, trainer: Any) -> None:
    """As `_train` on the texts of these words: the library has no way in for counts, so they are repeated."""
    from tokenizers import pre_tokenizers

    normalizer = tokenizer.normalizer
    pre_tokenizer = tokenizer.pre_tokenizer
    # these are done, and no word holds a line end
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    _train(tokenizer, _repeated(words), trainer)
    # not after Ctrl-C: the library still holds the tokenizer, and would raise another error
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer


def _repeated(words: CountedWords) -> Iterator[str]:
    """Lines of words, each as often as it counts."""
    for word, count in words.counts.items():
        lines_at_once = max(1, REPEATED_CHARS // len(word))
        for done in range(0, count, lines_at_once):
            yield (word + "\n") * min(lines_at_once, count - done)


def _untrained(config: TrainingConfig) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # what lower case does to letters
    plain = [normalizers.StripAccents(), normalizers.Lowercase()]
    if config.kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=config.special.roles["unk"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer
    if config.kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        letters = [normalizers.NFKD(), *plain] if config.lowercase else [normalizers.NFKC()]
        spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        tokenizer.normalizer = normalizers.Sequence([*letters, *spaces])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    # letters are taken apart, bared of accents, and put together again
    tokenizer.normalizer = normalizers.NFC()
    if config.lowercase:
        steps = [normalizers.NFD(), *plain, normalizers.NFC()]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _inside(config: TrainingConfig) -> list[str]:
    """Entries that stand before the learned ones; BERT's unused ones follow [PAD], so that 99 of them give BERT's ids."""
    first = config.special.first
    return [*first[:1], *config.unused_names, *first[1:]] if first else []


def parsed_blocks(source: Source, file: InputFile) -> Iterator[Parsed]:
    """The blocks of a file. Raises ConfigError for the first thing that is wrong in it: nothing is skipped here."""
    try:
        for block in read_blocks(source, file):
            parsed = parse(block)
            if parsed.problem:
                raise ConfigError(parse(numbered(block, file)).problem)
            yield parsed
    except UserError as error:
        raise ConfigError(without_skip(str(error))) from error


@dataclass(frozen=True, kw_only=True)
class _Letters:
    """The alphabet of a sample, and those of its letters that stand behind another in a word."""

    alphabet: list[str]
    inside: list[str]
    unknown: int  # letters of the sample that are not in it
    unknown_share: float  # of all letters that stand in the sample


def _letters(words: CountedWords) -> _Letters:
    """The most frequent letters of words as a WordPiece tokenizer sees them.

    The library numbers the letters inside of words in the order in which it meets them, another one each time. They are
    given to it in this order instead, which is that of Unicode.
    """
    counts: Counter[str] = Counter()
    behind: set[str] = set()
    for word, count in words.counts.items():
        for letter in word:
            counts[letter] += count
        behind.update(word[1:])
    # the most frequent; of equally frequent ones the order of Unicode decides
    kept = sorted(counts, key=lambda letter: (-counts[letter], letter))[:MOST_CHARACTERS]
    return _Letters(
        alphabet=sorted(kept),
        inside=sorted(behind.intersection(kept)),
        unknown=len(counts) - len(kept),
        unknown_share=1 - sum(counts[letter] for letter in kept) / max(1, counts.total()),
    )


def _words(tokenizer: Tokenizer, sample: _Sample, config: TrainingConfig) -> CountedWords:
    """The words of a sample as the model sees them, of not much more than MOST_WORD_CHARS."""
    most_chars = MOST_WORD_CHARS[config.kind]
    if config.kind == "bpe":
        of_bytes = ByteLevelCounter(tokenizer, lowercase=config.lowercase)
        return count_words(_counted_words(of_bytes, sample.texts()), most_chars=most_chars)

    raw = count_words(_counted_words(WordCounter(tokenizer), sample.texts()), most_chars=most_chars)
    counts: Counter[str] = Counter()
    # such a word may be several to the model
    for word, count in raw.counts.items():
        normal = tokenizer.normalizer.normalize_str(word)
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            counts[piece] += count
    return CountedWords(counts=dict(counts), met=raw.met, is_whole=raw.is_whole, least=raw.least)


def _counted_words(
    counter: WordCounter | ByteLevelCounter, texts: Iterator[str]
) -> Iterator[tuple[str, int]]:
    """The words of texts and how often they stand there: a word may come again, COUNTED_CHARS later."""
    for batch in by_chars(texts, most_chars=COUNTED_CHARS):
        yield from counter(batch)


def _trainer(
    config: TrainingConfig, *, vocab_size: int, special: Sequence[str], letters: _Letters | None
) -> Any:
    """The library's trainer.

    config: kind and names
    vocab_size: entries to be learned, `special` included
    special: entries that stand first
    letters: of a WordPiece
    """
    from tokenizers import pre_tokenizers, trainers

    first = [*special, *([PREFIX + letter for letter in letters.inside] if letters else [])]
    common = {
        "vocab_size": vocab_size,
        "show_progress": False,
        "special_tokens": _special_tokens(config, first),
    }
    if letters:
        size = len(letters.alphabet)
        return trainers.WordPieceTrainer(
            initial_alphabet=letters.alphabet, limit_alphabet=size, **common
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trainers.BpeTrainer(initial_alphabet=alphabet, **common)


def _put_specials(
    content: dict[str, Any], config: TrainingConfig, appended: Sequence[str], *, first_id: int
) -> None:
    """The appended entries, the post-processor, and unused entries that are plain ones."""
    special = config.special
    unused = {*config.unused_names}
    named = {*special.first, *special.last}
    # unused entries inside stay in the vocabulary, where no text gives them
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] in named
    ]
    for number, name in enumerate(appended, start=first_id):
        lstrip = name == special.roles["mask"]
        content["added_tokens"].append(
            added_token(number, name, special=name not in unused, lstrip=lstrip)
        )
    # Unigram chooses by scores
    if config.kind == "unigram":
        content["model"]["vocab"] = [
            [piece, NEVER_CHOSEN if piece in unused else score]
            for piece, score in content["model"]["vocab"]
        ]
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    # ModernBERT's has no segments
    second = 0 if config.kind == "bpe" else 1
    content["post_processor"] = template(special.roles, ids, frame=special.frame, second=second)


def sources_of(patterns: Sequence[str], *, text: str = "text") -> list[Source]:
    """File names and globs as sources by their endings, those of packing left out; everything else as plain text.

    patterns: of files
    text: the column of those that have columns
    """
    kinds = {
        ".jsonl": JsonlSource,
        ".json": JsonlSource,
        ".csv": CsvSource,
        ".tsv": TsvSource,
        ".parquet": ParquetSource,
        ".arrow": ArrowSource,
    }

    def source(index: int, pattern: str) -> Source:
        path = Path(pattern)
        bare = path
        if path.suffix in PACKED_ENDINGS:
            bare = path.with_suffix("")
        kind = MdsSource if path.name == INDEX else kinds.get(bare.suffix, TextSource)
        made = kind(name=f"{OPTION_SOURCE}{index}", files=(pattern,))
        if isinstance(made, ColumnSource):
            return dataclasses.replace(made, text=text)
        return made

    return [source(i, p) for i, p in enumerate(patterns)]


class _Sample:
    """About `wanted_bytes` of the documents of all sources, chosen by the hash of their text, in order."""

    def __init__(self, sources: Sequence[Source], root: Path, wanted_bytes: int) -> None:
        self.documents = self.bytes = 0
        if hub := next((source for source in sources if isinstance(source, HubSource)), None):
            raise ConfigError(
                f"source {hub.name} lies on the hub, and a sample of it would read all of it;"
                " needed: files. Give --files."
            )
        self._files = []
        for source in sources:
            self._files += [(source, file) for file in find_files(source, root)]
        self._wanted = wanted_bytes
        # files count as they lie, so packed ones give more: `texts` ends at twice the sample
        self._share = min(1.0, wanted_bytes / max(1, sum(file.bytes for _, file in self._files)))

    def texts(self) -> Iterator[str]:
        """The documents, each time from the first on."""
        self.documents = self.bytes = 0
        for source, file in self._files:
            for parsed in parsed_blocks(source, file):
                for text in parsed.texts:
                    if text_hash(text) < self._share * 2.0**64 and self.bytes <= 2 * self._wanted:
                        self.documents += 1
                        self.bytes += len(text.encode("utf-8"))
                        yield text

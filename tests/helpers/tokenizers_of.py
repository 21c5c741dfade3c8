"""Small tokenizers of the families, made by transformers and tokenizers, as their published folders are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXTS = [
    "The cat sat on the mat, and the dog did not sit there.",
    "A naïve café on the 3rd floor: it's unbelievably small!",
    "Tokenizers read words, parts of words and single letters.",
    "Unhappily the unhappy reader was not reading; words were read.",
    "12 numbers, 345 digits and 6,789 commas.",
]
NAMES = ("bert", "roberta", "albert", "xlnet")


def train(family: str, folder: Path) -> Any:
    """A transformers tokenizer of the family, trained on TEXTS and saved in a folder with all of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"bert": _bert, "roberta": _roberta, "albert": _albert, "xlnet": _xlnet}[family](folder)
    made.save_pretrained(folder)
    return made


def _bert(folder: Path) -> Any:
    import tokenizers
    import transformers

    trained = tokenizers.BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(TEXTS, vocab_size=150, min_frequency=1, show_progress=False)
    trained.save_model(str(folder))
    return transformers.BertTokenizerFast.from_pretrained(folder)


def _roberta(folder: Path) -> Any:
    import tokenizers
    import transformers

    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        TEXTS, vocab_size=320, min_frequency=1, show_progress=False, special_tokens=special
    )
    trained.save_model(str(folder))
    # as in the published folder, in every version of transformers
    mask = tokenizers.AddedToken("<mask>", lstrip=True, special=True)
    return transformers.RobertaTokenizerFast.from_pretrained(folder, mask_token=mask)


def _albert(folder: Path) -> Any:
    import transformers
    from tokenizers import normalizers

    letters = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    backend = _unigram(letters, special)
    backend.post_processor = _template(
        backend, "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special[2:4]
    )
    return transformers.AlbertTokenizerFast(tokenizer_object=backend)


def _xlnet(folder: Path) -> Any:
    import transformers
    from tokenizers import normalizers

    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    backend = _unigram([normalizers.NFKD(), normalizers.StripAccents()], special)
    backend.post_processor = _template(
        backend, "$A:0 <sep>:0 <cls>:2", "$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2", special[3:5]
    )
    return transformers.XLNetTokenizerFast(tokenizer_object=backend)


def _unigram(letters: list[Any], special: list[str]) -> Any:
    """As transformers' SpmConverter builds it, but for the compiled table of SentencePiece."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    backend = Tokenizer(models.Unigram())
    quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    spaces = [normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence([*quotes, *letters, *spaces])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _template(backend: Any, single: str, pair: str, special: list[str]) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(name, backend.token_to_id(name)) for name in special],
    )

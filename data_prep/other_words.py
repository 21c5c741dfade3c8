"""Other programs' words for what a preparation file says: Hugging Face datasets', llm-foundry's, datatrove's, Megatron's."""

from __future__ import annotations

# what to write here -> the words that others have for it
_WORDS = {
    "max_tokens_per_document: 8192; longer documents are cut into pieces, nothing is dropped": (
        "max_length max_seq_length max_seq_len seq_length seq_len block_size concat_tokens "
        "max_tokens"
    ),
    "sources.0.text: text, the column that holds the text": (
        "text_column text_field text_key content_key json_keys column"
    ),
    "sources: [{name: web, format: jsonl, files: [web/*.jsonl]}]": (
        "data_files input inputs data path"
    ),
    "root: corpus, with the files below it named in sources": "input_dir data_folder input_folder",
    "out: shards": "output_dir out_root out_dir output output_folder output_prefix save_dir",
    "processes: 8": "num_proc num_workers workers tasks batch_size",
    "tokenizer: corpus/tokenizer.json": (
        "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_file vocab_file"
    ),
    "sources: [{name: web, format: hub, dataset: organisation/name}]": (
        "dataset_name dataset hf_dataset"
    ),
    "sources.0.config: SUBSET of a source with format hub": "dataset_config_name subset",
    "no setting: a source with format hub is streamed": "streaming",
    "held_out_share: 0.01": "validation_split_percentage test_size val_ratio valid_share",
    "shard_bytes: 67108864": "size_limit shard_size max_shard_size",
    "no setting: every shard has its SHA-256": "hashes",
    "no setting: what is held out follows from the text of a document, the order from the run file's seed": (
        "seed"
    ),
    "no setting: the order of documents is drawn when a run reads them": "shuffle",
    "mixtures: {first: {tokens: 1B, sources: {web: 1B}}}": "proportion weights weight",
    "no setting: [CLS] and [SEP] are stored with each document": "eos_text bos_text",
    "on_error: skip": "skip_errors",
}
OTHER_WORDS = {word: here for here, words in _WORDS.items() for word in words.split()}

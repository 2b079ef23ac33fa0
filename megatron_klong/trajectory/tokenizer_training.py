"""Texts -> a small byte-level BPE tokenizer with GLM-4.5's control tokens, as a Hugging Face `tokenizer.json`.

For tiny models and tests; a real run uses the base model's own tokenizer.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_klong.files import write_atomically
from megatron_klong.trajectory.tokenizer import CONTROL_TOKENS, TokenizerError


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int, folder: Path, isolated: str | None = None) -> int:
    """Write `tokenizer.json` into `folder` and return the size of the vocabulary, control tokens included.

    `vocabulary_size` is an upper bound: training stops early when no pair of tokens is left to merge. `isolated` is a
    regular expression: what it matches is kept apart, and all else may merge across words, so that a set phrase becomes
    one token. Without it, text is cut into words first.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(CONTROL_TOKENS)
    if vocabulary_size < smallest:
        raise TokenizerError(
            f"vocabulary size {vocabulary_size} is below {smallest}, the bytes and control tokens alone"
        )
    tokenizer = Tokenizer(models.BPE())
    if isolated is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(isolated), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(CONTROL_TOKENS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Appended after training, so that no text can be merged into one.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    write_atomically(folder / "tokenizer.json", tokenizer.to_str())
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def read_texts(inputs: Iterable[Path]) -> Iterator[str]:
    """The content of every file, folders searched. Raises FileNotFoundError, UnicodeDecodeError."""
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of texts")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            yield file.read_text("utf-8")

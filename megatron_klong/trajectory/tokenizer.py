"""A tokenizer file (Hugging Face `tokenizer.json` or SentencePiece `.model`) -> ids, control tokens apart from text.

Always: `encode` yields ordinary tokens only. Text that spells a control token ("<|user|>", "</think>") is encoded
as the characters it is made of, so no document can forge a role; control tokens enter only through `control`.
Ids of control tokens are looked up in the file, never assumed. Which tokens are control tokens: GLM-4.5's, by
`load_tokenizer`; by `load_template_tokenizer`, those the file declares special and those another chat template writes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The tokens GLM-4.5's chat format is made of, in the order in which missing ones are appended to a vocabulary.
CONTROL_TOKENS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)


# How chat templates spell control tokens, so that a tokenizer that lacks them is not taken for the template's own.
_CONTROL_SHAPE = re.compile("<[|\uff5c][^<>|\uff5c\\s]+[|\uff5c]>")


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """encode: text -> ids of ordinary tokens.  control: control token -> id.  vocabulary_size: largest id + 1.

    encode_with_offsets: the same ids, each with the range of characters it stands for; None for SentencePiece files.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    control: Mapping[str, int]
    vocabulary_size: int
    sha256: str
    path: str
    encode_with_offsets: Callable[[str], tuple[list[int], list[tuple[int, int]]]] | None = None


def load_tokenizer(path: str | Path, *, add_special_tokens: bool = False) -> Tokenizer:
    """Load a `tokenizer.json`, a SentencePiece `.model`, or a folder that holds one of them.

    A vocabulary without GLM-4.5's control tokens is refused, or, with `add_special_tokens`, extended by them behind
    its largest id. Raises TokenizerError.
    """
    file = _find_file(Path(path))
    content = file.read_bytes()
    if file.suffix == ".json":
        loaded = _load_hugging_face(file, content, CONTROL_TOKENS.__contains__, CONTROL_TOKENS)
    else:
        loaded = _load_sentencepiece(file, content)
    known = {token: loaded.special[token] for token in CONTROL_TOKENS if token in loaded.special}
    missing = [token for token in CONTROL_TOKENS if token not in known]
    if missing and not add_special_tokens:
        raise TokenizerError(
            f"{file}: the vocabulary lacks {len(missing)} of GLM-4.5's control tokens ({', '.join(missing[:4])}, ...); "
            "pass --add-special-tokens to append them, or choose a GLM-4.5 tokenizer"
        )
    added = {token: loaded.vocabulary_size + number for number, token in enumerate(missing)}
    control = {token: added.get(token, known.get(token, -1)) for token in CONTROL_TOKENS}
    digest = hashlib.sha256(content + json.dumps(added, sort_keys=True).encode()).hexdigest()
    _refuse_forgeries(file, loaded, known)
    return _tokenizer(file, loaded, control, loaded.vocabulary_size + len(added), digest)


def load_template_tokenizer(path: str | Path, literals: str) -> Tokenizer:
    """Load the `tokenizer.json` that belongs to a chat template; `literals` is the text the template may write.

    Its control tokens are those the file declares special, and added tokens that occur in `literals`. Raises
    TokenizerError.
    """
    file = _find_file(Path(path))
    if file.suffix != ".json":
        raise TokenizerError(
            f"{file}: a chat template needs to know which characters a token stands for, which a SentencePiece model "
            "does not tell; pass the tokenizer.json of the same model (transformers' save_pretrained writes one)"
        )
    content = file.read_bytes()
    loaded = _load_hugging_face(file, content, literals.__contains__)
    missing = sorted(set(_CONTROL_SHAPE.findall(literals)) - set(loaded.special))
    if missing:
        raise TokenizerError(
            f"{file}: the chat template writes {', '.join(missing[:4])}, which this vocabulary has not among its added "
            "tokens; choose the tokenizer that belongs to the template"
        )
    _refuse_forgeries(file, loaded, loaded.special)
    _refuse_other_joins(file, loaded)
    digest = hashlib.sha256(content + json.dumps(sorted(loaded.special)).encode()).hexdigest()
    return _tokenizer(file, loaded, loaded.special, loaded.vocabulary_size, digest)


def _tokenizer(file: Path, loaded: "_Loaded", control: Mapping[str, int], size: int, digest: str) -> Tokenizer:
    return Tokenizer(
        encode=loaded.encode,
        decode=_decode_with_control(loaded.decode, control),
        control=control,
        vocabulary_size=size,
        sha256=digest,
        path=str(file),
        encode_with_offsets=loaded.encode_with_offsets,
    )


def _refuse_forgeries(file: Path, loaded: "_Loaded", control: Mapping[str, int]) -> None:
    for token, identifier in control.items():
        if identifier in loaded.encode(token):
            raise TokenizerError(
                f"{file}: text that spells {token} is encoded as that control token, so a document could forge it; "
                "take it out of the merges (or user-defined symbols) and keep it among the added tokens"
            )


def _refuse_other_joins(file: Path, loaded: "_Loaded") -> None:
    """Segments are encoded apart from their control tokens, which must be what encoding the whole text gives."""
    for token, identifier in loaded.special.items():
        apart = [*loaded.encode("a \n"), identifier, *loaded.encode("\n a")]
        if loaded.encode_whole(f"a \n{token}\n a") != apart:
            raise TokenizerError(
                f"{file}: text beside {token} is encoded otherwise than alone (the token strips white space, or a "
                "prefix space is added to the first word only); such tokenizers are not supported, so take lstrip, "
                "rstrip and normalized off the token, or the prefix off the pre-tokenizer"
            )


def _find_file(path: Path) -> Path:
    if path.is_dir():
        candidates = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise TokenizerError(f"{path}: no tokenizer.json and no *.model in this folder; name the tokenizer file itself")
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file; pass a tokenizer.json, a SentencePiece .model, or their folder")
    if path.suffix != ".json" and ".model" not in path.name:
        raise TokenizerError(f"{path}: neither a tokenizer.json nor a SentencePiece .model")
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    """special: the tokens that text is never encoded as.  encode_whole: text in which they count, for checks."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    special: Mapping[str, int]
    vocabulary_size: int
    encode_whole: Callable[[str], list[int]]
    encode_with_offsets: Callable[[str], tuple[list[int], list[tuple[int, int]]]] | None = None


def _load_hugging_face(
    file: Path, content: bytes, is_control: Callable[[str], bool], wanted: Sequence[str] = ()
) -> _Loaded:
    """is_control: for added tokens the file does not declare special.  wanted: special wherever they stand."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        definition = json.loads(content)
        added = definition.get("added_tokens") or []
        # A tokenizer that knows its special tokens would find them in ordinary text. Whitespace runs and the like,
        # which some vocabularies also keep among the added tokens, stay: text is encoded with them.
        special = [token["content"] for token in added if token.get("special") or is_control(token["content"])]
        definition["added_tokens"] = [token for token in added if token["content"] not in special]
        definition["post_processor"] = None
        plain = HuggingFaceTokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise TokenizerError(f"{file}: not a Hugging Face tokenizer.json ({error})") from error
    whole = HuggingFaceTokenizer.from_str(content.decode())
    vocabulary = whole.get_vocab(with_added_tokens=True)

    # One text at a time, for which the threads that a batch would be given to are of no use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def encode(text: str) -> list[int]:
        # a batch of one: only for batches can the library leave out offsets, which take a fifth of the time
        ids: list[int] = plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def encode_whole(text: str) -> list[int]:
        ids: list[int] = whole.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(ids: Sequence[int]) -> str:
        return str(plain.decode(list(ids), skip_special_tokens=False))

    return _Loaded(
        encode=encode,
        decode=decode,
        special={token: vocabulary[token] for token in [*special, *wanted] if token in vocabulary},
        vocabulary_size=max(vocabulary.values()) + 1,
        encode_whole=encode_whole,
        encode_with_offsets=encode_with_offsets,
    )


def _load_sentencepiece(file: Path, content: bytes) -> _Loaded:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise TokenizerError(f"{file}: not a SentencePiece model ({error})") from error
    known = {}
    for token in CONTROL_TOKENS:
        identifier = int(processor.piece_to_id(token))
        # Asking for an absent piece answers the unknown token.
        if processor.id_to_piece(identifier) == token:
            known[token] = identifier

    def encode(text: str) -> list[int]:
        return list(processor.encode(text))

    def decode(ids: Sequence[int]) -> str:
        return str(processor.decode(list(ids)))

    size = int(processor.vocab_size())
    return _Loaded(encode=encode, decode=decode, special=known, vocabulary_size=size, encode_whole=encode)


def _decode_with_control(
    decode: Callable[[Sequence[int]], str], control: Mapping[str, int]
) -> Callable[[Sequence[int]], str]:
    """Make `decode` spell control tokens out, so that a printed window reads like the template."""
    names = {identifier: token for token, identifier in control.items()}

    def decode_all(ids: Sequence[int]) -> str:
        pieces: list[str] = []
        run: list[int] = []
        for identifier in ids:
            if identifier in names:
                pieces += [decode(run) if run else "", names[identifier]]
                run = []
            else:
                run.append(int(identifier))
        return "".join([*pieces, decode(run) if run else ""])

    return decode_all

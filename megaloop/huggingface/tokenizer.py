"""Tokenizers out to Hugging Face directories and in from them; a sentencepiece BPE as a fast tokenizer that gives the same ids."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece

from megaloop.errors import MegaloopError
from megaloop.tokenizer import HuggingFaceTokenizer, Tokenizer, find_tokenizer, load_tokenizer, tokenizer_files
from megaloop.tokenizer.files import SENTENCEPIECE
from megaloop.tokenizer.huggingface import SETTINGS, TOKENIZER_JSON

__all__ = ["export_tokenizer", "find_model_tokenizer"]

_SPACE = "\u2581"
_PADDING = 1024
"""Rows of an embedding are at most rounded up to a multiple of this (as published models are)."""


def export_tokenizer(path: Path, folder: Path, max_length: int) -> dict[str, int | None]:
    """Write a checkpoint's tokenizer into a Hugging Face directory.

    The files of one of Hugging Face are copied byte by byte, chat template included; a sentencepiece model is converted.

    Returns:
        ``bos_token_id`` and ``eos_token_id`` of the model's configuration.

    Raises:
        MegaloopError: a sentencepiece model that cannot be converted.
    """
    tokenizer = load_tokenizer(path)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for file in tokenizer_files(path):
            shutil.copyfile(file, folder / file.name)
    else:
        _write_converted(path, folder, max_length)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {key: token if token >= 0 else None for key, token in ids.items()}


def find_model_tokenizer(source: Path, rows: int) -> Path | None:
    """The tokenizer of a model directory (or a file that was named), checked against the rows of the model's embedding.

    Of a directory that megaloop exported, it is the sentencepiece model that the tokenizer.json was made from. None: there is none.

    Raises:
        MegaloopError: a damaged tokenizer, or one that is not this model's.
    """
    path = find_tokenizer(source)
    if path is None:
        return None
    if path.name == TOKENIZER_JSON and (model := path.with_name(SENTENCEPIECE)).is_file() and _made_of(path, model):
        path = model
    tokenizer: Tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > rows or rows > -(-tokenizer.vocab_size // _PADDING) * _PADDING:
        raise MegaloopError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens and the model {rows} rows in its embedding: they do not belong "
            "together; name the model's own with --tokenizer, or leave it out with --without-tokenizer"
        )
    _check_as_transformers(tokenizer)
    return path


_PROBES = (
    "a",
    " a",
    "a  b\n\nc",
    "The year 2024",
    "caf\u00e9 \u4f60\u597d \U0001f389",
    "don't \u2581 <0x41>",
    "def f(x):\n    return x",
)


_CLASSES = (
    "PreTrainedTokenizerFast",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizerFast",
    "GPT2TokenizerFast",
    "Qwen2TokenizerFast",
)
"""Classes of transformers for which a Llama's tokenizer.json is made; each reads that file and its settings, and nothing else."""


def _check_as_transformers(ours: Tokenizer) -> None:
    """Refuse a tokenizer whose settings make transformers give other ids than its tokenizer.json does.

    Its classes may change what the file says (a space put before a text, tokens that are special in the settings alone). A
    class is taken by name from those above: others are not compared, as what they would read is not known.
    """
    path = ours.path
    settings = path.with_name(SETTINGS)
    if path.name != TOKENIZER_JSON or not settings.is_file():
        return
    import transformers

    name = str(
        json.loads(settings.read_bytes()).get("tokenizer_class") or "LlamaTokenizer"
    )  # a Llama's, where it says nothing
    name = f"{name.removesuffix('Fast')}Fast"
    if name not in _CLASSES:
        return
    try:
        theirs = getattr(transformers, name).from_pretrained(str(path.parent), local_files_only=True)
        special = [str(token) for token in theirs.all_special_tokens]
        found = [(text, theirs(text).input_ids) for text in (*_PROBES, *(f"a{token}b" for token in special))]
    except Exception:  # transformers cannot open it: there is nothing to be equal to
        return
    for text, ids in found:
        mine = ours.encode_prompt(text)
        if ids[: len(mine)] != mine:  # it may add what ends a text, which we leave to training
            raise MegaloopError(
                f"tokenizer {path}: {type(theirs).__name__} of transformers gives {text!r} other tokens than the file alone does, "
                f"because of {SETTINGS} ({len(ids)} tokens, and {len(mine)}); make the two agree, or name another with --tokenizer"
            )


def _made_of(written: Path, model: Path) -> bool:
    """Whether a tokenizer.json is what an export makes of this sentencepiece model."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _write_converted(model, Path(folder), 1)
            made: object = json.loads((Path(folder) / TOKENIZER_JSON).read_bytes())
        return bool(made == json.loads(written.read_bytes()))
    except (MegaloopError, RuntimeError, OSError, ValueError, RecursionError):
        return False


def _write_converted(model: Path, out: Path, max_length: int) -> None:
    """Write ``tokenizer.json``, its configuration and a copy of the model into ``out``.

    Text is taken as it is and no special token is added, as in training.

    Raises:
        MegaloopError: a model that normalises text or is no byte-fallback BPE, which the ids would not survive.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    _check(processor, model)
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    special = [t for t in range(len(pieces)) if processor.is_control(t) or processor.is_unknown(t)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(processor, vocabulary, set(special)),
            unk_token=pieces[processor.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # known as special, so that decoding can leave them out; written in a text they are text, as in sentencepiece
    tokenizer.add_special_tokens([AddedToken(pieces[token], special=True, normalized=False) for token in special])
    tokenizer.encode_special_tokens = True
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        "unk_token": pieces[processor.unk_id()],
        **({"bos_token": pieces[processor.bos_id()]} if processor.bos_id() >= 0 else {}),
        **({"eos_token": pieces[processor.eos_id()]} if processor.eos_id() >= 0 else {}),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
    (out / "tokenizer.model").write_bytes(model.read_bytes())


def _check(processor: sentencepiece.SentencePieceProcessor, path: Path) -> None:
    probe = "  A\u00c5\ufb01  b "  # a ligature and double spaces: anything that normalises changes them
    if processor.decode(processor.encode(probe)) != probe or not any(map(processor.is_byte, range(512))):
        raise MegaloopError(
            f"tokenizer {path}: it normalises text or has no byte fallback, which cannot be written as a fast tokenizer "
            "with the same ids; use a tokenizer that 'megaloop prep --vocab-size' trained"
        )


def _merges(
    processor: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int], special: set[int]
) -> list[tuple[str, str]]:
    """The merges behind the pieces. sentencepiece merges the pair whose product has the best score, first come first."""
    merges = []
    for piece, token in vocabulary.items():
        if token in special or processor.is_byte(token):
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(processor.get_score(token), pair) for pair in known]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores stay together
    return [pair for _, pair in merges]

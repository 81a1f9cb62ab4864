"""Text to tokens and back: tokenizers trained on the data at hand, and those that come with a model.

Three kinds are trained. ``bpe``: pairs of bytes merged by frequency (Sennrich et al., arXiv 1508.07909, on
bytes as GPT-2 does it), digits one by one; any text can be written, and it comes back as it was.
``byte``: no merges. ``word``: split at spaces, for made-up languages in which a word is a symbol.

A text is taken literally: what looks like a special token in it becomes plain text, so that no document
can end itself. Special tokens come from what is not a text: the prompt of a model (``prompt``), or its chat template,
which puts them around messages (``chat``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from reason.datasets.fetch import build_once, cache_dir
from reason.errors import ConfigError, DataError, unknown
from reason.files import atomic, read_json, write_json
from reason.memory import PARSED, Budget

KINDS = ("bpe", "byte", "word")
RECIPE = 1  # raise it when the same texts would give another tokenizer
END = "<end of document>"  # holds spaces, so that neither a word nor a merge can be spelt like it
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"  # a file and a folder of them
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
READ = 64_000_000  # characters that merges are learned from: documents spread evenly, beyond that

Span = tuple[int, int]


class Tokens:
    """A tokenizer, and the token that ends a document.

    Args:
        tokenizer: of the library ``tokenizers``. It is set to take texts literally, whole and unpadded.
        eos: id of the token that ends a document, which begins the next one too.
        templates: chat templates (Jinja) by name; that of the name "default" is used where none is asked for.
        named: special tokens that templates refer to, such as {"bos_token": "<s>"}.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos: int, templates: Mapping[str, str] | None = None,
        named: Mapping[str, str] | None = None,
    ):  # fmt: skip
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.tokenizer, self.eos = tokenizer, eos
        self.templates, self.named = dict(templates or {}), dict(named or {})
        self._pieces: dict[tuple[int | None, int], bytes] = {}

    # --- from texts, or from a folder -------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Sequence[str], kind: str, vocab: int, *, cache: bool = True) -> Tokens:
        """The tokenizer that ``texts`` give. The same texts give the same one.

        Args:
            texts: documents; a tokenizer of kind "word" knows their words and no others.
            kind: "bpe", "byte" or "word".
            vocab: tokens at most, the end of a document among them. Few texts give fewer; "byte" has 257.
            cache: keep it in the cache folder, and take it from there.

        Raises:
            ConfigError: unknown kind, or a vocabulary that is too small.
            DataError: no texts, or a text that is no valid Unicode.
        """
        if kind not in KINDS:
            raise unknown("kind of tokenizer", kind, KINDS)
        if kind == "byte":  # the same for all texts
            return cls(*_byte())
        digest, train = _digest(texts), {"bpe": _bpe, "word": _word}[kind]
        if not cache:
            return cls(*train(texts, vocab))
        recipe = f"{RECIPE} {tokenizers.__version__} {kind} {vocab} {digest}"
        place = cache_dir() / "tokenizers" / f"{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}"
        return cls.from_folder(build_once(place, lambda folder: cls(*train(texts, vocab)).save(folder)))

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokens:
        """That of a model folder in Hugging Face's format, or what ``save`` wrote.

        Raises:
            DataError: there is none, it cannot be read, or nothing says which token ends a text.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise DataError(
                f"{folder} has no tokenizer.json.",
                'If transformers can read its tokenizer, create the file with: python -c "from '
                "transformers import AutoTokenizer as T; T.from_pretrained('FOLDER').save_pretrained('FOLDER')\"",
            )
        Budget(file).spend(file.stat().st_size * PARSED)
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{file} cannot be read: {error}.", "Download or save the model again."
            ) from error
        config = _read(folder / "tokenizer_config.json")
        named = {k: _spelling(config.get(k)) for k in NAMED}
        return cls(
            tokenizer,
            _end_of(folder, tokenizer),
            _templates(folder, config),
            {k: v for k, v in named.items() if v},
        )

    def save(self, folder: Path | str) -> None:
        """Write it for ``from_folder`` (and for transformers' ``AutoTokenizer``) into an existing folder."""
        folder = Path(folder)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **self.named,
                "eos_token": self.tokenizer.id_to_token(self.eos),
            },
        )
        for name, template in self.templates.items():
            file = folder / TEMPLATE if name == "default" else folder / TEMPLATES / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
            file.write_text(template, encoding="utf-8")
        with atomic(folder / "tokenizer.json") as f:
            f.write(self.tokenizer.to_str(pretty=True))

    def copy(self) -> Tokens:
        """Another one, to which tokens can be added."""
        return Tokens(Tokenizer.from_str(self.tokenizer.to_str()), self.eos, self.templates, self.named)

    # --- use --------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """sha256 of which ids stand for which text, and which ends one; chat templates are left out."""
        return hashlib.sha256(f"{self.eos} {self.tokenizer.to_str()}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """For each text its ids, without an end, and for each id the characters it stands for (start, end).

        A character that is cut into several tokens belongs to all of them.

        Raises:
            DataError: a text that is no valid Unicode, or a word that a tokenizer of words does not know.
        """
        try:
            found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower, and does not say where
            raise self._refused(texts, error) from error
        return [(one.ids, one.offsets) for one in found]

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to continue, with the special tokens that its model wants in front of one.

        Raises:
            DataError: as ``encode``.
        """
        front = self.front
        if not front and self.tokenizer.id_to_token(self.eos) == END:
            front = [self.eos]
        return [*front, *self.encode([text])[0][0]]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], template: str = "default", **variables: Any
    ) -> list[int]:
        """Ids of a conversation whose next message is the model's, as the model's chat template writes it.

        Args:
            messages: {"role": ..., "content": ...} in order. What looks like a special token in them stays text.
            template: the name of the template.
            variables: whatever else the template reads, such as enable_thinking.

        Raises:
            ConfigError: the model has no such template.
            DataError: the template refuses the messages, or cannot be used.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if template not in self.templates:
            if not self.templates:
                raise ConfigError(
                    "This model has no chat template.",
                    "Give it the text itself, or use a model that was tuned to chat.",
                )
            raise unknown("chat template", template, self.templates)
        special = sorted(self._special, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, special))) if special else None
        said = json.dumps(messages, ensure_ascii=False)
        mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in said)  # for private use
        shown = [
            {k: pattern.sub(lambda m: m[0][0] + mark + m[0][1:], v) if pattern and k != "role" and isinstance(v, str) else v
             for k, v in message.items()}
            for message in messages
        ]  # fmt: skip
        names = {**self.named, "eos_token": self.tokenizer.id_to_token(self.eos)}
        try:
            found = render_jinja_template(
                [shown],
                chat_template=self.templates[template],
                add_generation_prompt=True,
                **(names | variables),
            )
        except Exception as error:  # whatever is wrong in a template, or is refused by it
            raise DataError(
                f"The chat template of the model refuses these messages: {error}.",
                "Check roles and their order; some templates know no system message.",
            ) from error
        text: str = found[0][0]
        return self._marked(text, mark, pattern)

    def add(self, names: Sequence[str]) -> list[int]:
        """Ids of special tokens of these spellings; new ones come behind all others, whose ids stay as they are."""
        new = [name for name in dict.fromkeys(names) if self.tokenizer.token_to_id(name) is None]
        before = self.size
        self.tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in new])
        ids = [cast(int, self.tokenizer.token_to_id(name)) for name in names]
        if sorted(set(ids) - set(range(before))) != list(range(before, before + len(new))):
            raise DataError(
                "The tokenizer has unused ids in between, which new tokens would take.",
                "Use another tokenizer.",
            )
        for cached in ("digest", "_json", "front", "_special", "_verbatim"):
            self.__dict__.pop(cached, None)
        self._pieces.clear()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; ends of documents are spelt out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        r"""What each of ``ids`` adds to the text, for display. Half a character is shown as bytes, ``\xe2``."""
        ids = [int(i) for i in ids]
        pairs = zip([None, *ids], ids, strict=False)
        return [self.piece_of(before, i).decode("utf-8", "backslashreplace") for before, i in pairs]

    def piece_of(self, before: int | None, i: int) -> bytes:
        """What id ``i`` adds to the text of id ``before``; UTF-8, of which it may begin or end within a character."""
        if self._letters is not None:
            before = None  # tokens are written as bytes, each for itself
        found = self._pieces.get((before, i))
        if found is None:
            found = self._pieces[before, i] = self._spelt(before, i)
        return found

    # --- inside -----------------------------------------------------------------------------------------

    def _marked(self, text: str, mark: str, pattern: re.Pattern[str] | None) -> list[int]:
        """Ids of a text with special tokens; a special token that holds ``mark`` is none, and the marks go."""
        if mark not in text:
            self.tokenizer.encode_special_tokens = False
            try:
                return self.tokenizer.encode(text, add_special_tokens=False).ids
            finally:
                self.tokenizer.encode_special_tokens = True
        ids: list[int] = []
        at = 0
        for found in [*(pattern.finditer(text) if pattern else ()), None]:
            plain = text[at : found.start() if found else len(text)].replace(mark, "")
            ids += self.encode([plain])[0][0]
            if found:
                ids.append(cast(int, self.tokenizer.token_to_id(found[0])))
                at = found.end()
        return ids

    @cached_property
    def front(self) -> list[int]:
        """Special tokens that the tokenizer puts in front of a text."""
        if self._json.get("post_processor") is None:
            return []
        whole, plain = (self.tokenizer.encode("a", add_special_tokens=on).ids for on in (True, False))
        starts = [k for k in range(len(whole)) if plain and whole[k : k + len(plain)] == plain]
        return whole[: starts[0]] if starts else []

    @cached_property
    def _special(self) -> list[str]:
        return [token["content"] for token in self._json["added_tokens"] if token["special"]]

    def _spelt(self, before: int | None, i: int) -> bytes:
        token, letters = self.tokenizer.id_to_token(i) or "", self._letters
        if letters is not None:
            if i in self._verbatim or not all(c in letters for c in token):
                return token.encode()
            return bytes(letters[c] for c in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):  # how SentencePiece writes one
            return bytes.fromhex(byte[1])
        if before is None:
            return self.decode([i]).encode()
        return self.decode([before, i])[len(self.decode([before])) :].encode()

    @cached_property
    def _letters(self) -> dict[str, int] | None:
        """Which byte each letter of a token stands for, where tokens are written so."""
        decoder = self._json["decoder"] or {}
        parts = decoder.get("decoders", [decoder])
        spelt = any(part.get("type") == "ByteLevel" for part in parts)
        return {c: b for b, c in LETTERS.items()} if spelt else None

    @cached_property
    def _verbatim(self) -> set[int]:
        """Tokens that stand for their own spelling."""
        return {token["id"] for token in self._json["added_tokens"]}

    @cached_property
    def _json(self) -> dict[str, Any]:
        return json.loads(self.tokenizer.to_str())

    def _refused(self, texts: Sequence[str], error: Exception) -> DataError:
        """Why ``texts`` cannot be encoded: the text that is none, or the word that is not known."""
        for number, text in enumerate(texts):
            _bytes_of(text, number)
        words = self._json["model"].get("vocab", {})
        said = (word for text in texts for word in text.split(" "))
        strange = next((word for word in said if word and word not in words), None)
        if self._json["model"]["type"] != "WordLevel" or strange is None:
            return DataError(f"The tokenizer cannot encode these texts: {error}.")
        return DataError(
            f"The word {strange!r} is not in the vocabulary of {len(words):,} words.",
            "A word tokenizer knows only the words it was trained on. Use backbone.tokenizer=bpe for open text.",
        )


# --- how each kind is trained ---------------------------------------------------------------------------


def _letters() -> dict[int, str]:
    """GPT-2's writing of bytes as visible letters: printable Latin-1 for itself, the rest from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return {b: chr(b) if b in plain else chr(next(moved)) for b in range(256)}


LETTERS = _letters()


def _bpe(texts: Sequence[str], vocab: int) -> tuple[Tokenizer, int]:
    if vocab < 257:
        raise ConfigError(
            f"A vocabulary of {vocab} tokens is too small for all 256 bytes.",
            "Use backbone.vocab=257 or more.",
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    stride = max(1, -(-sum(map(len, texts)) // READ))
    tokenizer.train_from_iterator(texts[::stride], trainer)
    return tokenizer, cast(int, tokenizer.token_to_id(END))


def _byte() -> tuple[Tokenizer, int]:
    """Ids 0 to 255 are the bytes, 256 ends a document."""
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in LETTERS.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _ended(tokenizer)


def _word(texts: Sequence[str], vocab: int) -> tuple[Tokenizer, int]:
    """Words by frequency, then by spelling."""
    counts = Counter(word for text in texts for word in text.split(" ") if word)
    if len(counts) >= vocab:
        raise ConfigError(
            f"The texts have {len(counts):,} different words; backbone.vocab={vocab} has room for {vocab - 1:,} "
            "and the end-of-document token.",
            "Use backbone.tokenizer=bpe for natural language, "
            f"or backbone.vocab={len(counts) + 1} if each word is a symbol of its own.",
        )
    words = sorted(counts, key=lambda word: (-counts[word], word))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return _ended(tokenizer)


def _ended(tokenizer: Tokenizer) -> tuple[Tokenizer, int]:
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer, cast(int, tokenizer.token_to_id(END))


def _digest(texts: Sequence[str]) -> str:
    """Of the texts in their order, each with its length."""
    if not any(texts):
        raise DataError("There is no text to train a tokenizer on.", "Check dataset.path and the split.")
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        content = _bytes_of(text, number)
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _bytes_of(text: str, number: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"Text {number + 1} is not valid Unicode: character {error.start + 1} is half of a surrogate pair.",
            "Fix the data at its source; lone surrogates come from truncated JSON escapes (\\ud83d).",
        ) from error


# --- which token ends a text, in a model folder ---------------------------------------------------------


def _spelling(named: Any) -> str | None:
    """A token of tokenizer_config.json, which is text or an object."""
    named = named.get("content") if isinstance(named, dict) else named
    return named if isinstance(named, str) else None


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files come before what tokenizer_config.json holds, as in transformers."""
    stated = config.get("chat_template")
    if isinstance(stated, list):
        stated = {one.get("name"): one.get("template") for one in stated if isinstance(one, dict)}
    elif not isinstance(stated, dict):
        stated = {"default": stated}
    found = {str(name): text for name, text in stated.items() if isinstance(text, str)}
    files = {file.stem: file for file in sorted(folder.glob(f"{TEMPLATES}/*.jinja"))}
    if (folder / TEMPLATE).is_file():
        files["default"] = folder / TEMPLATE
    try:
        return found | {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"A chat template in {folder} cannot be read: {error}.", "Download the model again."
        ) from error


def _end_of(folder: Path, tokenizer: Tokenizer) -> int:
    named = _spelling(_read(folder / "tokenizer_config.json").get("eos_token"))
    found = tokenizer.token_to_id(named) if named else None
    for file in ("generation_config.json", "config.json"):
        if found is None:
            ids = _read(folder / file).get("eos_token_id")
            found = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(found, int) or tokenizer.id_to_token(found) is None:
        raise DataError(
            f"{folder} does not define an end-of-text token.",
            'Define it in tokenizer_config.json, e.g. {"eos_token": "<|endoftext|>"}.',
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}.", "Download or save the model again.") from error
    return found if isinstance(found, dict) else {}

"""Tokenizers: what is written comes back, nothing depends on chance, and texts cannot end themselves."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.backbones import tokens as module
from reason.backbones.tokens import END, LETTERS, Tokens
from reason.errors import ConfigError, DataError

TEXTS = [
    "The rain in Spain stays mainly in the plain.\n",
    "the rain, the plain; the Spanish train\n\n    def rain(drops):\n        return drops + 1237\n",
    "Zoë's naïve café in 東京 costs 1237 ¥ 🙂🙂\r\n\ttabs and  spaces ",
] * 4
anything = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


BPE = Tokens.train(TEXTS, "bpe", 300, cache=False)
BYTE = Tokens.train([], "byte", 0)


# --- there and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [BPE, BYTE], ids=["bpe", "byte"])
@settings(max_examples=150, deadline=None)
@given(text=anything)
def test_any_text_comes_back(tokens, text):
    ((ids, spans),) = tokens.encode([text])
    assert tokens.decode(ids) == text
    assert tokens.eos not in ids and all(0 <= i < tokens.size for i in ids)
    # Every character is covered, in order, and a token covers what it spells.
    assert len(spans) == len(ids) and spans == sorted(spans)
    assert {c for a, b in spans for c in range(a, b)} == set(range(len(text)))
    for piece, (a, b) in zip(tokens.pieces(ids), spans, strict=True):
        assert piece == text[a:b] or "\\x" in piece


@given(text=anything)
def test_bytes_are_bytes(text):
    assert BYTE.encode([text])[0][0] == list(text.encode())
    assert (BYTE.size, BYTE.eos) == (257, 256)


@pytest.mark.parametrize("tokens", [BPE, BYTE], ids=["bpe", "byte"])
@pytest.mark.parametrize(
    "text", [END, f"a{END}b", f"{END}{END}", "<|endoftext|>", "<s>", "\x00", "\ufeff", " ", ""]
)
def test_a_text_cannot_end_itself(tokens, text):
    ((ids, _),) = tokens.encode([text])
    assert tokens.eos not in ids and tokens.decode(ids) == text


def test_ends_are_spelt_out():
    assert BPE.decode([BPE.eos, *BPE.encode(["rain"])[0][0]]) == END + "rain"
    assert BPE.pieces([BPE.eos]) == [END]


def test_spans_of_plain_words():
    ((ids, spans),) = BPE.encode(["the rain"])
    assert BPE.pieces(ids) == ["the", " rain"] and spans == [(0, 3), (3, 8)]


def test_digits_stand_alone():
    ids = BPE.encode(["1237 1237"])[0][0]  # which is frequent enough to be merged
    assert BPE.pieces(ids) == ["1", "2", "3", "7", " ", "1", "2", "3", "7"]


def test_half_a_character_is_shown_as_bytes():
    assert BYTE.pieces("é🙂".encode()) == ["\\xc3", "\\xa9", "\\xf0", "\\x9f", "\\x99", "\\x82"]


def test_letters_are_those_of_the_library():
    from tokenizers import pre_tokenizers

    assert len(set(LETTERS.values())) == 256 and set(LETTERS.values()) == set(
        pre_tokenizers.ByteLevel.alphabet()
    )


def test_batches_and_none():
    together, alone = BPE.encode(TEXTS[:3]), [BPE.encode([text])[0] for text in TEXTS[:3]]
    assert together == alone and BPE.encode([]) == []


# --- words ----------------------------------------------------------------------------------------------


def test_words_are_split_at_spaces_and_nowhere_else():
    tokens = Tokens.train(["b a , a\n (a) b b", "a  ,  "], "word", 100)
    words = [tokens.tokenizer.id_to_token(i) for i in range(tokens.size)]
    assert words == ["b", ",", "a", "(a)", "a\n", END] and tokens.eos == 5  # by frequency, then spelling
    ((ids, spans),) = tokens.encode(["a  b (a) a\n"])
    assert ids == [2, 0, 3, 4] and spans == [(0, 1), (3, 4), (5, 8), (9, 11)]
    assert tokens.pieces(ids) == ["a", " b", " (a)", " a\n"] and tokens.decode(ids) == "a b (a) a\n"


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" "), min_size=1), min_size=1
    )
)
def test_any_words_come_back(words):
    text = " ".join(words)
    tokens = Tokens.train([text], "word", len(words) + 1, cache=False)
    ((ids, spans),) = tokens.encode([text])
    assert tokens.decode(ids) == text and [text[a:b] for a, b in spans] == words
    assert tokens.eos not in ids and tokens.size == len(set(words)) + 1


def test_a_word_that_is_not_known_is_named():
    tokens = Tokens.train(["a b c"], "word", 100)
    for text in ("a d c", f"a {END}", "a <unk>"):
        with pytest.raises(DataError, match=f"'{text.split(' ')[1]}' is not in the vocabulary of 3 words"):
            tokens.encode(["a b", text])
    with pytest.raises(DataError, match="'<unk>'"):  # and one that is called so stands for itself
        Tokens.train(["a <unk>x"], "word", 100).encode(["<unk>"])


def test_too_many_words_are_refused():
    assert Tokens.train(["a b c"], "word", 4).size == 4
    with pytest.raises(ConfigError, match="3 different words; ") as caught:
        Tokens.train(["a b c"], "word", 3)
    assert "backbone.vocab=3 has room for 2" in caught.value.message
    assert "backbone.vocab=4" in caught.value.hint and "bpe" in caught.value.hint


# --- training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "byte", "word"])
def test_the_same_texts_give_the_same_tokenizer(kind):
    first, second = (Tokens.train(TEXTS, kind, 300, cache=False) for _ in range(2))
    assert first.digest == second.digest and first.encode(TEXTS) == second.encode(TEXTS)
    assert len({Tokens.train(TEXTS, k, 300, cache=False).digest for k in ("bpe", "byte", "word")}) == 3


def test_merges_shorten_and_obey_the_limit():
    assert BPE.size <= 300 and len(BPE.encode(TEXTS)[0][0]) < len(BYTE.encode(TEXTS)[0][0]) / 2
    small = Tokens.train(TEXTS, "bpe", 260, cache=False)
    assert small.size == 260
    assert Tokens.train(["ab"], "bpe", 4096, cache=False).size == 257  # nothing to merge


def test_no_merge_crosses_into_another_word():
    for i in range(BPE.size):
        (piece,) = BPE.pieces([i])
        assert i == BPE.eos or " " not in piece[1:].strip(), piece


def test_very_long_texts_are_sampled_evenly(monkeypatch):
    even, odd = "lorem ipsum " * 5, "dolor amet. " * 5  # 60 characters each
    whole = Tokens.train([even, odd] * 3, "bpe", 400, cache=False)
    monkeypatch.setattr(module, "READ", 180)
    half = Tokens.train([even, odd] * 3, "bpe", 400, cache=False)
    assert half.digest == Tokens.train([even] * 3, "bpe", 400, cache=False).digest != whole.digest


def test_a_tokenizer_is_kept_and_found_by_content(own_cache, monkeypatch):
    first = Tokens.train(TEXTS, "bpe", 300)
    assert len(list(own_cache.rglob("tokenizer.json"))) == 1
    monkeypatch.setattr(module, "_bpe", None)  # training again would fail
    again = Tokens.train(list(TEXTS), "bpe", 300)
    assert (
        (again.digest, again.eos, again.size)
        == (first.digest, first.eos, first.size)
        == (BPE.digest, BPE.eos, BPE.size)
    )
    assert again.encode([END]) == BPE.encode([END])  # still taken literally
    for texts, vocab in ((TEXTS[:-1], 300), (TEXTS, 299), (["".join(TEXTS)], 300)):
        with pytest.raises(TypeError):
            Tokens.train(texts, "bpe", vocab)


def test_nothing_is_written_without_the_cache(own_cache):
    Tokens.train(TEXTS, "word", 300, cache=False)
    Tokens.train(TEXTS, "byte", 300)
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written_is_told(own_cache):
    own_cache.write_text("a file in its place")
    with pytest.raises(DataError, match="cannot be used") as caught:
        Tokens.train(TEXTS, "bpe", 300)
    assert "REASON_CACHE" in caught.value.hint


def test_refusals():
    with pytest.raises(ConfigError, match="Did you mean 'byte'"):
        Tokens.train(TEXTS, "bytes", 300)
    with pytest.raises(ConfigError, match="too small for all 256 bytes"):
        Tokens.train(TEXTS, "bpe", 256)
    for nothing in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            Tokens.train(nothing, "bpe", 300)
    for attempt in (lambda texts: Tokens.train(texts, "word", 300), BPE.encode):
        with pytest.raises(DataError, match="Text 2 is not valid Unicode: character 3"):
            attempt(["fine", "ab\ud83d"])


# --- folders --------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_read(tmp_path):
    for tokens in (BPE, BYTE, Tokens.train(["a b"], "word", 10)):
        tokens.save(tmp_path)
        again = Tokens.from_folder(tmp_path)
        assert (again.digest, again.eos, again.size) == (tokens.digest, tokens.eos, tokens.size)


def test_transformers_reads_it_too(tmp_path):
    from transformers import AutoTokenizer

    BPE.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == BPE.eos
    assert theirs(TEXTS[1])["input_ids"] == BPE.encode([TEXTS[1]])[0][0]


def test_a_folder_may_name_its_end_in_several_places(tmp_path):
    BPE.save(tmp_path)
    places = {
        "tokenizer_config.json": ({"eos_token": {"content": END}}, BPE.eos),
        "generation_config.json": ({"eos_token_id": [7, 8]}, 7),
        "config.json": ({"eos_token_id": 9}, 9),
    }
    for file, (content, _) in places.items():
        (tmp_path / file).write_text(json.dumps(content))
    for file, (_, eos) in places.items():  # the first that says it, says it
        assert Tokens.from_folder(tmp_path).eos == eos
        (tmp_path / file).unlink()
    with pytest.raises(DataError, match="an end-of-text token"):
        Tokens.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 100000}')
    with pytest.raises(DataError, match="an end-of-text token"):
        Tokens.from_folder(tmp_path)


def test_folders_without_a_tokenizer_or_with_a_broken_one(tmp_path):
    with pytest.raises(DataError, match=r"has no tokenizer\.json") as caught:
        Tokens.from_folder(tmp_path)
    assert "save_pretrained" in caught.value.hint
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Tokens.from_folder(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        Tokens.from_folder(tmp_path)


def test_truncation_and_padding_of_a_folder_are_undone(tmp_path):
    BPE.save(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": END,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert Tokens.from_folder(tmp_path).encode(TEXTS) == BPE.encode(TEXTS)


def test_pieces_of_a_sentencepiece_tokenizer():
    """Llama 2's kind: a space is written as a bar in front of a word, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {t: i for i, t in enumerate(["</s>", "▁the", "▁rain", "s", "<0xC3>", "<0xA9>", "<0x0A>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = Tokens(tokenizer, 0)
    assert tokens.pieces([1, 2, 3, 6, 4, 5, 2]) == ["the", " rain", "s", "\n", "\\xc3", "\\xa9", " rain"]


# --- special tokens, chat templates, new tokens ---------------------------------------------------------

CHAT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "<|user|>", "<|assistant|>")


def chatty(post_processor=True) -> Tokens:
    from tokenizers.processors import TemplateProcessing

    tokens = Tokens.train(TEXTS, "bpe", 300, cache=False)
    bos, *_ = tokens.add(SPECIAL)
    if post_processor:
        tokens.tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    templates = {"default": CHAT, "tool_use": "tools: {{ messages[0].content }}"}
    return Tokens(tokens.tokenizer, tokens.eos, templates, {"bos_token": "<s>"})


def test_a_chat_is_written_as_its_template_says():
    tokens = chatty()
    bos, user, assistant = (tokens.tokenizer.token_to_id(name) for name in SPECIAL)
    messages = [
        {"role": "user", "content": " the rain "},
        {"role": "assistant", "content": "the plain"},
        {"role": "user", "content": "in Spain?"},
    ]
    rain, plain, spain = (tokens.encode([text])[0][0] for text in ("the rain", "the plain", "in Spain?"))
    eos = tokens.eos
    assert tokens.chat(messages) == [
        bos,
        user,
        *rain,
        eos,
        assistant,
        *plain,
        eos,
        user,
        *spain,
        eos,
        assistant,
    ]
    assert (
        tokens.chat([{"role": "user", "content": "rain"}], "tool_use") == tokens.encode(["tools: rain"])[0][0]
    )


@pytest.mark.parametrize(
    "text", [END, "<|user|>", f"a {END} b <s>", "<|assistant|> yes", "<|us<|user|>er|>", "\ue000<s>\ue000"]
)
def test_what_people_write_is_never_a_special_token(text):
    tokens = chatty()
    bos, user, assistant = (tokens.tokenizer.token_to_id(name) for name in SPECIAL)
    ids = tokens.chat([{"role": "user", "content": text}])
    plain = tokens.encode([text])[0][0]
    assert ids == [bos, user, *plain, tokens.eos, assistant]
    assert not {bos, user, assistant, tokens.eos} & set(plain) and tokens.decode(plain) == text
    assert tokens.tokenizer.encode_special_tokens


def test_a_template_may_refuse_and_its_reason_is_told():
    with pytest.raises(DataError, match="System role not supported"):
        chatty().chat([{"role": "system", "content": "x"}])
    with pytest.raises(ConfigError, match="has no chat template"):
        BPE.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ConfigError, match="tool_use"):
        chatty().chat([{"role": "user", "content": "x"}], "tools")
    broken = Tokens(BPE.tokenizer, BPE.eos, {"default": "{% for %}"})
    with pytest.raises(DataError, match="refuses these messages"):
        broken.chat([{"role": "user", "content": "x"}])
    mischief = Tokens(BPE.tokenizer, BPE.eos, {"default": "{{ ''.__class__.__mro__[1].__subclasses__() }}"})
    with pytest.raises(DataError, match="unsafe"):
        mischief.chat([{"role": "user", "content": "x"}])


def test_a_prompt_begins_as_its_model_wants_it():
    tokens = chatty()
    assert tokens.prompt("the rain") == [
        tokens.tokenizer.token_to_id("<s>"),
        *tokens.encode(["the rain"])[0][0],
    ]
    assert tokens.prompt("") == [tokens.tokenizer.token_to_id("<s>")]
    assert BPE.prompt("rain <s>") == [
        BPE.eos,
        *BPE.encode(["rain <s>"])[0][0],
    ]  # trained here: a document begins
    plain = Tokens(chatty(post_processor=False).tokenizer, 5)  # another model's, without a beginning
    assert plain.prompt("rain") == plain.encode(["rain"])[0][0]


def test_templates_and_names_are_saved_and_transformers_reads_them(tmp_path):
    from transformers import AutoTokenizer

    tokens = chatty()
    tokens.save(tmp_path)
    again, theirs = Tokens.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "the rain"}]
    assert again.templates == tokens.templates and again.digest == tokens.digest
    assert again.chat(messages) == tokens.chat(messages)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == tokens.chat(
        messages
    )
    assert theirs.apply_chat_template(messages, chat_template="tool_use", tokenize=False) == "tools: the rain"


@pytest.mark.parametrize("way", ["text", "list", "file"])
def test_templates_are_found_wherever_transformers_puts_them(way, tmp_path):
    chatty().save(tmp_path)
    config = {"eos_token": END, "bos_token": {"content": "<s>", "special": True}}
    if way != "file":
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "additional_chat_templates/tool_use.jinja").unlink()
        named = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "t"}]
        config["chat_template"] = CHAT if way == "text" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = Tokens.from_folder(tmp_path)
    assert tokens.templates["default"] == CHAT and tokens.named["bos_token"] == "<s>"
    assert set(tokens.templates) == ({"default"} if way == "text" else {"default", "tool_use"})


def test_new_tokens_come_behind_and_stay(tmp_path):
    tokens = Tokens.train(TEXTS, "bpe", 300, cache=False)
    before, size, text = tokens.digest, tokens.size, TEXTS[0]
    ids = tokens.encode([text])
    assert tokens.add(["<step>", "<think>", "<step>"]) == [size, size + 1, size] and tokens.size == size + 2
    assert tokens.add(["<think>"]) == [size + 1] and tokens.digest != before and tokens.encode([text]) == ids
    assert tokens.encode(["<step>"])[0][0] != [size] and tokens.decode([size]) == "<step>"
    assert tokens.piece_of(None, size) == b"<step>"
    tokens.save(tmp_path)
    again = Tokens.from_folder(tmp_path)
    assert again.digest == tokens.digest and again.add(["<think>", "<new>"]) == [size + 1, size + 2]
    copy = tokens.copy()
    copy.add(["<other>"])
    assert tokens.size == size + 2 and copy.size == size + 3


def test_pieces_are_bytes_that_make_up_the_text():
    text = "Zoë 東京 🙂 rain"
    for tokens in (BPE, BYTE):
        ids = tokens.encode([text])[0][0]
        assert (
            b"".join(tokens.piece_of(before, i) for before, i in zip([None, *ids], ids, strict=False))
            == text.encode()
        )
    words = Tokens.train(["a b c"], "word", 9)
    assert [words.piece_of(before, i) for before, i in ((None, 0), (0, 1))] == [b"a", b" b"]

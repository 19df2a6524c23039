"""Tokenizer: the ids of transformers and sentencepiece, special tokens, streaming."""

import json
import os
import random
import shutil
import unicodedata

import pytest
import sentencepiece
from real_tokenizers import load_tokenizer, transformers_tokenizer

from minisft.common.errors import UserError
from minisft.text.tokenizer import StreamDecoder, Tokenizer

# Real tokenizers are loaded once, by the worker that gets all their tests.
pytestmark = pytest.mark.xdist_group("real_tokenizers")

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

JSON_FOLDERS = [
    "tokenizers/TinyLlama-1.1B-Chat-v0.6",
    "tokenizers/Mistral-7B-Instruct-v0.2",
    "tokenizers/Llama-3",
    "tokenizers/Qwen2.5",
    "models/stories260K",
]
MODEL_FOLDERS = [JSON_FOLDERS[0], JSON_FOLDERS[1], "tokenizers/Baichuan2", JSON_FOLDERS[4]]
AWKWARD = [
    *("", " ", "    ", "  two leading", "trailing  ", "a   b     c", "\ttab\t\ttab", "\n\n\nlines"),
    *("你好，世界", "全角　空格", "👩‍👩‍👧 🇨🇳 ❤️", "é é", "\ufeffbom", "\x00\x01", "a\r\nb"),
    *("▁", "▁▁ low block", "<0x0A>", "<unk><s></s>", "x</s>y", "x</s> y", "<reserved_108> hi"),
    *("<|im_start|>user\n<|im_end|>", "<|eot_id|>", "<tool_call>{}</tool_call>", "[INST] [/INST]"),
    *(
        "<|begin_of_text|><|start_header_id|>",
        "<|endoftext|> <|fim_prefix|>",
        "12345 3.14",
        "'s'LL",
    ),
]


@pytest.fixture(scope="session")
def strings(shared_data):
    """More than 2,000 texts: English and Chinese rows of real data, and awkward ones."""
    found = list(AWKWARD)
    for name in ("alpaca_en_demo", "alpaca_zh_demo", "oaast_sft_zh"):
        rows = json.loads((shared_data / "instruct" / f"{name}.json").read_text(encoding="utf-8"))
        for row in rows[::4]:
            output = row["output"][:300]
            found += [row["instruction"][:300], output, "  " + output[:40] + "</s>\t <|im_end|>x"]
    assert len(found) > 2000
    return found


def bare_model(folder, tmp_path):
    """A folder with nothing but a tokenizer.model."""
    shutil.copyfile(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("folder", JSON_FOLDERS)
def test_ids_and_text_equal_transformers(shared_data, strings, folder):
    oracle = transformers_tokenizer(shared_data / folder)
    tokenizer = load_tokenizer(shared_data / folder)
    assert tokenizer.bos_token_id == oracle.bos_token_id
    assert tokenizer.eos_token_id == oracle.eos_token_id
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.add_bos_token == (oracle("x").input_ids[0] == oracle.bos_token_id)
    expected = oracle(strings, add_special_tokens=False, split_special_tokens=True).input_ids
    for text, ids in zip(strings, expected, strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True), text
    assert oracle("x</s><|im_end|><|eot_id|>", add_special_tokens=False).input_ids != (
        tokenizer.encode("x</s><|im_end|><|eot_id|>")
    )  # without split_special_tokens the text would have become a control token


@pytest.mark.parametrize("folder", MODEL_FOLDERS)
def test_a_bare_model_file_equals_sentencepiece(shared_data, strings, folder, tmp_path):
    oracle = sentencepiece.SentencePieceProcessor(
        model_file=str(shared_data / folder / "tokenizer.model")
    )
    tokenizer = bare_model(shared_data / folder, tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos_token) == (1, 2, True)
    assert tokenizer.vocab_size == oracle.vocab_size()
    for text in strings:
        ids = oracle.encode(text)
        assert tokenizer.encode(text) == ids, text
        if not text.startswith("▁"):  # the one model that collapses spaces drops this one again
            assert tokenizer.decode([1, *ids, 2]) == oracle.decode(ids), text


@pytest.mark.parametrize("folder", MODEL_FOLDERS[:2])
def test_both_engines_agree_unless_the_text_begins_with_a_space(
    shared_data, strings, folder, tmp_path
):
    bare, full = bare_model(shared_data / folder, tmp_path), load_tokenizer(shared_data / folder)
    for text in strings:
        if not text.startswith((" ", "▁")):
            assert bare.encode(text) == full.encode(text), text
        assert bare.encode(text, continuation=True) == full.encode(text, continuation=True), text


def test_text_never_becomes_a_special_token(shared_data, strings):
    for folder in JSON_FOLDERS:
        tokenizer = load_tokenizer(shared_data / folder)
        for token in [tokenizer.token_text(id) for id in sorted(tokenizer.special_ids)][:40]:
            for text in (token, f"a{token}b", f" {token} "):
                for continuation in (False, True):
                    ids = tokenizer.encode(text, continuation)
                    assert not tokenizer.special_ids.intersection(ids), (folder, text)
                    assert tokenizer.decode(ids).strip() == text.strip()


def test_added_tokens_that_are_not_special_are_ordinary_vocabulary(shared_data, tmp_path):
    qwen = load_tokenizer(shared_data / "tokenizers/Qwen2.5")
    assert qwen.token_id("<tool_call>") in qwen.encode("x<tool_call>")
    assert qwen.token_id("<tool_call>") not in qwen.special_ids
    baichuan = bare_model(shared_data / "tokenizers/Baichuan2", tmp_path)
    assert baichuan.token_id("<reserved_108>") in baichuan.encode("x<reserved_108>")


def rows_with_answers(shared_data, name="alpaca_en_demo", count=150):
    rows = json.loads((shared_data / "instruct" / f"{name}.json").read_text(encoding="utf-8"))
    return [(row["instruction"] + "\n\n### Response:", row["output"]) for row in rows[:count]]


# Not among them: stories260K's tokenizer.model, which collapses runs of spaces.
TEXT_PRESERVING = [(folder, "json") for folder in JSON_FOLDERS]
TEXT_PRESERVING += [(folder, "model") for folder in MODEL_FOLDERS[:3]]


@pytest.mark.parametrize(("folder", "kind"), TEXT_PRESERVING)
def test_a_continuation_gets_no_leading_space(shared_data, folder, kind, tmp_path):
    source = shared_data / folder
    tokenizer = bare_model(source, tmp_path) if kind == "model" else load_tokenizer(source)
    rows = rows_with_answers(shared_data) + rows_with_answers(shared_data, "alpaca_zh_demo")
    rows += [("Say:", text) for text in (" hi", "  two", "\n\nlines", "\tx", "你", "</s>")]
    apart = 0
    for prompt, answer in rows:
        text = (
            unicodedata.normalize("NFC", prompt + answer) if "Qwen" in folder else prompt + answer
        )
        ids = tokenizer.encode(prompt) + tokenizer.encode(answer, continuation=True)
        assert tokenizer.decode(ids) == text
        apart += tokenizer.decode(tokenizer.encode(prompt) + tokenizer.encode(answer)) != text
    if tokenizer.engine.strips_space:  # encoded as a separate text, the answer gains a space
        assert apart > 0.9 * len(rows)


@pytest.mark.parametrize("folder", JSON_FOLDERS)
def test_the_stream_joins_to_the_decoded_text(shared_data, strings, folder):
    tokenizer = load_tokenizer(shared_data / folder)
    for text in strings[:60] + strings[-60:]:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
            pieces = [stream.push(id) for id in [*ids, tokenizer.eos_token_id]]
            assert "\ufffd" not in "".join(pieces)
            whole = tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=skip)
            assert "".join(pieces) + stream.flush() == whole


def test_a_split_character_is_held_back(shared_data):
    tokenizer = load_tokenizer(
        shared_data / "models/stories260K"
    )  # has no Chinese: three bytes a character
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(id) for id in tokenizer.encode("你好 !")]
    assert pieces == ["", "", "", "你", "", "", "好", " ", "!"]
    assert stream.push(tokenizer.encode("你")[1]) == "" and stream.flush() == "\ufffd"


def test_streams_of_any_ids_join_to_the_decoded_text(shared_data, tmp_path):
    """Random ids, as of an untrained model: partial characters, control tokens, unknown ids."""
    chance = random.Random(0)
    tokenizers = [load_tokenizer(shared_data / folder) for folder in JSON_FOLDERS]
    for tokenizer in [*tokenizers, bare_model(shared_data / "tokenizers/Baichuan2", tmp_path)]:
        ids = [chance.randrange(tokenizer.vocab_size + 9) for _ in range(500)]
        stream = StreamDecoder(tokenizer)
        joined = "".join([stream.push(id) for id in ids]) + stream.flush()
        assert joined == tokenizer.decode(ids)


def test_bos_policy_and_ids_come_from_the_files(tiny_tokenizer_dir, tmp_path):
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    config_path = tmp_path / "tokenizer_config.json"

    def loaded(config):
        config_path.write_text(json.dumps(config))
        return Tokenizer.load(tmp_path)

    assert loaded({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).eos_token_id == 1
    assert not loaded({"bos_token": "<s>"}).add_bos_token  # its file has no post-processor
    assert loaded({"bos_token": "<s>", "add_bos_token": True}).add_bos_token
    assert loaded({}).bos_token_id is None and not loaded({"add_bos_token": True}).add_bos_token
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [6, 1]}')
    assert (loaded({}).bos_token_id, loaded({}).eos_token_id) == (0, 6)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert loaded({}).eos_token_id == 3
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert loaded({}).eos_token_id == 1
    assert loaded({"eos_token": None}).eos_token_id is None


def test_tokens_listed_beside_a_model_file(shared_data, tmp_path):
    added = {"32000": {"content": "<|im_start|>"}, "32001": {"content": "<|im_end|>"}}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = bare_model(shared_data / JSON_FOLDERS[0], tmp_path)
    assert tokenizer.eos_token_id == tokenizer.token_id("<|im_end|>") == 32001
    assert tokenizer.vocab_size == 32002
    assert max(tokenizer.encode("<|im_end|>")) < 32000
    assert tokenizer.decode([15043, 32001]) == "Hello"
    assert tokenizer.decode([15043, 32001], skip_special_tokens=False) == "Hello<|im_end|>"


def test_saving_does_not_need_the_folder_any_more(tiny_tokenizer_dir, tmp_path):
    """It may be removed, or get another tokenizer, while a model is trained."""
    source = shutil.copytree(tiny_tokenizer_dir, tmp_path / "source")
    tokenizer = Tokenizer.load(source)
    shutil.rmtree(source)
    tokenizer.save(tmp_path / "saved")
    for path in tiny_tokenizer_dir.iterdir():
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()


def test_saving_copies_the_files_byte_for_byte(tiny_tokenizer_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chat_template.jinja").write_text("another model's")
    Tokenizer.load(tiny_tokenizer_dir).save(tmp_path / "out")
    Tokenizer.load(tmp_path / "out").save(tmp_path / "out")  # its own folder: nothing to do
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_tokenizer_dir / name).read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"model": ', "not valid JSON"),
        ("tokenizer.json", "[]", "not a JSON object"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizers cannot read it"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("tokenizer.model", "IQ== 0\nIg== 1\n", "not a SentencePiece model"),
        ("merges.txt", "#version", "no tokenizer.json and no tokenizer.model"),
        ("tokenizer_config.json", "{,}", "not valid JSON"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"bos_token": ["<s>"]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<t>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "<t>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["<t>"]}'),
        ("added_tokens.json", '{"<t>": 1e3}'),
        ("special_tokens_map.json", '{"eos_token": {"content": 5}}'),
        ("config.json", '{"pad_token_id": "x"}'),
        ("generation_config.json", '{"pad_token_id": [99999999999]}'),
    ],
)
def test_invalid_files_beside_the_tokenizer_are_named(tmp_path, tiny_tokenizer_dir, name, content):
    (tmp_path / "tokenizer.json").write_bytes((tiny_tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        Tokenizer.load(tmp_path)


def test_a_panic_of_the_library_is_a_user_error(tmp_path, tiny_tokenizer_dir):
    """A prefix longer than a token makes the library panic. A panic is not an Exception."""
    spec = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text())
    spec["model"]["continuing_subword_prefix"] = "x" * 100
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="tokenizer.json: tokenizers cannot read it"):
        Tokenizer.load(tmp_path)


def test_a_lone_surrogate_becomes_a_question_mark(tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a?b"


def test_the_padding_token_may_have_id_0(tiny_tokenizer_dir, tmp_path):
    for token, expected in (("<s>", 0), (None, 1), ("<|im_end|>", 3)):
        Tokenizer.load(tiny_tokenizer_dir).save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "</s>", "pad_token": token})
        )
        assert Tokenizer.load(tmp_path).pad_token_id == expected

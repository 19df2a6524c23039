"""Tokens added to a tokenizer: transformers gives them the same ids and matches them alike."""

import json
import shutil

import pytest
import transformers
from real_tokenizers import MISTRAL, TINYLLAMA, load_tokenizer

from minisft.common.errors import UserError
from minisft.text.new_tokens import with_new_tokens
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer

# Real tokenizers are loaded once, by the worker that gets all their tests.
pytestmark = pytest.mark.xdist_group("real_tokenizers")

SPECIAL, ORDINARY = ["<|step|>", "<结束>"], ["<svg>"]
TEXTS = ["a<svg>b", "<svg><svg> c", "x <svg>\n你好<svg>", "no token"]


def as_transformers_adds_them(folder):
    """transformers' own tokenizer of a folder, with the same tokens added to it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(ORDINARY)
    return tokenizer


@pytest.mark.parametrize("name", ["byte-level", MISTRAL])
def test_ids_are_those_of_transformers(name, tiny_tokenizer_dir, tmp_path, request):
    folder = tiny_tokenizer_dir
    if name == MISTRAL:
        folder = request.getfixturevalue("shared_data") / MISTRAL
    extended = with_new_tokens(load_tokenizer(folder), SPECIAL, ORDINARY)
    assert {extended.token_id(token) for token in SPECIAL} <= extended.special_ids
    assert not extended.special_ids & {extended.token_id(token) for token in ORDINARY}
    extended.save(tmp_path)
    reread = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    added = as_transformers_adds_them(folder)
    for token in SPECIAL + ORDINARY:
        ids = {tokenizer.convert_tokens_to_ids(token) for tokenizer in (theirs, added)}
        assert ids == {reread.token_id(token)}
        assert reread.decode([reread.token_id(token)], skip_special_tokens=False) == token
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == reread.encode(text)
    ids = [theirs.convert_tokens_to_ids(token) for token in SPECIAL]
    assert theirs(SPECIAL[0], add_special_tokens=False).input_ids[-1] == ids[0]
    assert not set(ids) & set(reread.encode(SPECIAL[0]))  # a text never gives a special token
    assert theirs.decode(ids, skip_special_tokens=True) == reread.decode(ids) == ""


def test_tokenizer_model_alone(shared_data, tmp_path):
    """The files beside it list the tokens."""
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(shared_data / TINYLLAMA / file, tmp_path / file)
    extended = with_new_tokens(Tokenizer.load(tmp_path), SPECIAL)
    extended.save(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    reread = Tokenizer.load(tmp_path / "out")
    for token in SPECIAL:
        assert theirs.convert_tokens_to_ids(token) == reread.token_id(token)
        assert reread.token_id(token) in reread.special_ids
    assert [reread.token_id(token) for token in SPECIAL] == [32000, 32001]
    with pytest.raises(UserError, match="tokenizer.model alone cannot match <svg>"):
        with_new_tokens(Tokenizer.load(tmp_path), [], ORDINARY)


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_every_file_that_lists_tokens(key, tiny_tokenizer_dir, tmp_path):
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {key: ["<|eot_id|>"], "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text('{"<|eot_id|>": 6}')
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|eot_id|>"]}')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = Tokenizer.load(folder).vocab_size
    extended = with_new_tokens(Tokenizer.load(folder), ["<a>"])
    content = {
        path.stem: json.loads(path.read_text()) for path in extended.model_dir.glob("*.json")
    }
    assert content["tokenizer_config"][key] == ["<|eot_id|>", "<a>"]
    (listed,) = content["tokenizer_config"]["added_tokens_decoder"].items()
    assert listed[0] == str(first) and listed[1]["content"] == "<a>" and listed[1]["special"]
    assert content["added_tokens"] == {"<|eot_id|>": 6, "<a>": first}
    assert content["special_tokens_map"]["additional_special_tokens"] == ["<|eot_id|>", "<a>"]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    theirs = transformers.AutoTokenizer.from_pretrained(extended.model_dir)
    assert theirs.extra_special_tokens == ["<|eot_id|>", "<a>"]


@pytest.mark.parametrize("token", ["</s>", "the"])
def test_a_token_that_exists(token, tiny_tokenizer_dir):
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    with pytest.raises(UserError, match=f"{token} exists already, with the id"):
        with_new_tokens(tokenizer, ["<a>", token])


def test_ids_with_gaps(tiny_tokenizer_dir, tmp_path):
    """The library would give a new token an id that exists."""
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    piece = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][piece] = 290
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(UserError, match="have gaps, so <.> cannot be added"):
        with_new_tokens(tokenizer, [f"<{letter}>" for letter in "abcdefghijklmn"])


def test_messages_name_the_checkpoint(tiny_tokenizer_dir):
    """Not the temporary folder of the extended tokenizer."""
    extended = with_new_tokens(Tokenizer.load(tiny_tokenizer_dir), SPECIAL)
    assert extended.model_dir != extended.source == tiny_tokenizer_dir
    with pytest.raises(UserError) as caught:
        get_template("auto", extended)
    assert str(tiny_tokenizer_dir) in str(caught.value) and "minisft-" not in str(caught.value)

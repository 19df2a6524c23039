"""Vocabulary and chat template in a GGUF file: llama.cpp produces our ids."""

import itertools
import json
import re
import shutil
import unicodedata

import pytest
import tokenizers
from chat_templates import checkpoint_for, control_tokens, narrow_model, sentencepiece
from conftest import CONVERSATIONS, without_bos
from llama_cpp import Server

from minisft.checkpoints import gguf_export, hub
from minisft.checkpoints.folders import generation_eos
from minisft.checkpoints.gguf_export import export_model
from minisft.common.errors import UserError
from minisft.gguf.prompts import WRITE_SPACE, ids_in_one_piece
from minisft.gguf.reader import read_gguf
from minisft.gguf.unpack_tokenizer import tokenizer_files
from minisft.gguf.vocabulary import WORDS, pre_tokenizer_name, vocabulary_fields
from minisft.model.config import ModelConfig
from minisft.text.template_choice import FOLDER, NAMES, get_template
from minisft.text.tokenizer import Tokenizer

# Folder with the tokenizer, rows of the embedding, family.
REAL = {
    "TinyLlama-1.1B-Chat-v0.6": (32000, "llama"),
    "Mistral-7B-Instruct-v0.2": (32000, "mistral"),
    "Llama-3": (20256, "llama"),
    "Qwen2.5": (151936, "qwen2"),
    "Baichuan2": (125696, "baichuan"),
}
AWKWARD = [
    "trailing  ",
    "a   b     c",
    "\ttab\t\ttab",
    "\n\n\nlines",
    "a\r\nb",
    "你好，世界",
    "全角　空格",
    "👩‍👩‍👧 🇨🇳 ❤️",
    "é",
    "<0x0A>",
    "<unk><s></s>",
    "x</s>y",
    "<|im_start|>user\n<|im_end|>",
    "<reserved_12><img> </td>",
    "<|eot_id|>",
    "[INST] [/INST]",
    "12345 3.14",
    "'s'LL I'Ve",
    "def f(x):\n    return x**2\n",
    "\ufeffbom",
    "a\u200bb",
    "ﬁﬂ ½ ²",
    "नमस्ते สวัสดี",
    "x" * 200,
    "=" * 70,
]


def keep_tokens_below(count, path):
    """Cut a large vocabulary, for speed. Its control tokens follow the remaining tokens."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    model = spec["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < count}
    model["merges"] = [
        [left, right]
        for left, right in model["merges"]
        if {left, right, left + right} <= model["vocab"].keys()
    ]
    for id, token in enumerate(spec["added_tokens"], count):
        token["id"] = id
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="module")
def exported(shared_data, tmp_path_factory):
    """exported(name in REAL): (checkpoint folder, GGUF file), made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("real") / name
            narrow_model(folder, *REAL[name])
            for path in (shared_data / "tokenizers" / name).glob("*token*"):
                shutil.copyfile(path, folder / path.name)
            if name == "Llama-3":
                keep_tokens_below(20_000, folder / "tokenizer.json")
                path = shared_data / "tokenizers" / "Llama-3.2-1B" / "tokenizer_config.json"
                config = json.loads(path.read_text(encoding="utf-8"))
                del config["added_tokens_decoder"]  # which has the ids of the large vocabulary
                (folder / path.name).write_text(json.dumps(config), encoding="utf-8")
            template = "llama3" if name == "Llama-3" else "auto"
            export_model(folder, f"{folder}.gguf", "q8_0", template=template)
            made[name] = folder, f"{folder}.gguf"
        return made[name]

    return make


@pytest.fixture(scope="module")
def strings(shared_data):
    """More than 500 texts, English, Chinese and awkward. None begins with a space: see below."""
    found = list(AWKWARD)
    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        rows = json.loads((shared_data / "instruct" / f"{name}.json").read_text(encoding="utf-8"))
        for row in rows[::8]:
            found += [row["instruction"][:300], row["output"][:300]]
    found = [unicodedata.normalize("NFC", text.lstrip(" ")) for text in found if text.strip()]
    assert len(found) > 500
    return found


def check_ids(server, path, tokenizer, strings, space=""):
    """llama.cpp, and the file read back, produce our ids. llama.cpp gets `space` before a text."""
    read_back = Tokenizer.load(hub.resolve(str(path)))
    for text in strings:
        ids = tokenizer.encode(text)
        assert server.tokenize(space + text) == ids == read_back.encode(text), text
    assert read_back.add_bos_token == tokenizer.add_bos_token
    # Prompts decide about BOS, see below.
    adds_bos = read_gguf(path).metadata["tokenizer.ggml.add_bos_token"]
    bos = [tokenizer.bos_token_id] * adds_bos
    assert server.tokenize(space + "Hi", add_special=True) == bos + tokenizer.encode("Hi")


@pytest.mark.parametrize("name", REAL)
def test_ids_and_prompts_equal_ours(name, exported, strings):
    folder, path = exported(name)
    tokenizer = Tokenizer.load(folder)
    with Server(path) as server:
        writes_space = "TinyLlama" in name  # the chat template does; see below
        check_ids(server, path, tokenizer, strings, " " * writes_space)
        if name == "Baichuan2":  # its turn tokens are user-defined pieces, which text could spell
            check_ids(server, path, tokenizer, ["x<reserved_106>", "<reserved_107> <reserved_12>"])
        template = get_template("llama3" if name == "Llama-3" else "auto", tokenizer)
        # Mistral's own chat template refuses system prompts.
        for messages in CONVERSATIONS[::2] if "Mistral" in name else CONVERSATIONS:
            prompt = server.render(messages)
            ids = server.tokenize(prompt, add_special=True, parse_special=True)
            assert ids == template.encode_prompt(messages)


def test_ids_of_a_trained_model(shared_data, strings, tmp_path):
    folder, path = shared_data / "models" / "stories260K", tmp_path / "model.gguf"
    export_model(folder, path, "f16")
    with Server(path) as server:
        check_ids(server, path, Tokenizer.load(folder), strings)


@pytest.fixture
def small_sentencepiece(shared_data, tmp_path):
    """make(control, **config): a checkpoint folder with a SentencePiece tokenizer of 512 pieces.

    control: control tokens to add. config: for tokenizer_config.json.
    """

    def make(control=(), **config):
        folder = tmp_path / "small"
        source = shared_data / "models" / "stories260K"
        narrow_model(folder, sentencepiece(folder, control, source, **config))
        return folder

    return make


def check_prompts(folder, template, conversations=CONVERSATIONS, answers=True, **choices):
    """llama.cpp, and the file read back, produce our ids of rendered prompts.

    answers: check the number of tokens that llama.cpp reports for its own prompts, too.
    Returns (chat template, True if llama.cpp adds a leading space, notes).
    """
    path = f"{folder}.gguf"
    notes = export_model(folder, path, "f16", template=template.name, **choices).notes
    metadata, read_back = read_gguf(path).metadata, Tokenizer.load(hub.resolve(path))
    back = get_template("auto", read_back, enable_thinking=choices.get("enable_thinking"))
    with Server(path, context=4096) as server:
        for messages in conversations:
            prompt = server.render(messages)
            ids = server.tokenize(prompt, add_special=True, parse_special=True)
            # Training tokenises an earlier answer separately from its prompt; other programs do
            # not.
            whole = ids_in_one_piece(template, template.render(messages, None, True))
            assert ids == whole, (template.name, prompt)
            assert back.encode_prompt(messages) == template.encode_prompt(messages)
            if len(messages) < 3:
                assert ids == template.encode_prompt(messages)
            if not answers:
                continue
            answer = server.post("/v1/chat/completions", messages=messages, max_tokens=1)
            assert answer["usage"]["prompt_tokens"] == len(ids)  # one BOS there, too
    puts_space = metadata.get("tokenizer.ggml.add_space_prefix", False)
    about_space = [note for note in notes if "without the chat template" in note]
    assert bool(about_space) == (template.tokenizer.leading_space and not puts_space)
    return metadata["tokenizer.chat_template"], puts_space, notes


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"baichuan2"}))
def test_our_templates_with_sentencepiece(name, legacy, small_sentencepiece):
    """The tokenizer adds a space after every control token (`legacy`), or only at the start.

    Baichuan2's tokenizer, above, adds none.
    """
    control = control_tokens((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
    control = [token for token in control if "INST" not in token]  # text in Llama 2
    folder = small_sentencepiece(control, legacy=legacy)
    template = get_template(name, Tokenizer.load(folder))
    _, puts_space, _ = check_prompts(folder, template)
    assert puts_space == legacy


@pytest.mark.parametrize(
    "name, own",
    [
        (
            "llama2",
            "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + "
            "'[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
            "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        ),
        (
            "mistral",
            "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ "
            "'[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
            "{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
        ),
        (
            "zephyr",
            "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + "
            "message['content'] + eos_token + '\n' }}{% endfor %}{{ '<|assistant|>\n' }}",
        ),
        (
            "chatml",
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
            "message['content'] + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}",
        ),
    ],
)
def test_the_checkpoints_chat_template_is_kept(name, own, small_sentencepiece):
    """Only the space that llama.cpp must not add differs, if the text begins without BOS."""
    folder = small_sentencepiece(["<|im_start|>", "<|im_end|>"], chat_template=own)
    template = get_template("auto", Tokenizer.load(folder))
    written, _, _ = check_prompts(folder, template, CONVERSATIONS[::2])  # no system
    assert written == WRITE_SPACE * (name == "zephyr") + own
    assert Tokenizer.load(hub.resolve(f"{folder}.gguf")).chat_template == own


def test_templates_of_other_models(shared_data, tmp_path):
    """llama.cpp runs all templates, with any use of thoughts, dates, system prompts and BOS.

    Every second one with each kind of tokenizer.
    """
    table, kinds = {}, itertools.cycle(["byte-level", "sentencepiece"])
    paths = sorted((shared_data / "chat_templates").glob("*.jinja"))
    for path, kind in zip(paths, kinds, strict=False):
        text = path.read_text(encoding="utf-8")
        # The file is named "model": llama.cpp changes tokens where the name contains "phi-3".
        folder = checkpoint_for(text, kind, shared_data, tmp_path / path.stem / "model")
        template = get_template("auto", Tokenizer.load(folder))
        (folder / "options.toml").write_text('template = "auto"\n')  # it was trained
        try:
            template.encode([*CONVERSATIONS[0], {"role": "assistant", "content": "Yes."}])
            conversations = [messages for messages in CONVERSATIONS if can_ask(template, messages)]
        except UserError as error:
            table[path.stem] = f"not trained: {error}"
            export_model(folder, f"{folder}.gguf", "f16")  # it can be exported anyway
            continue
        # gpt-oss and others have parsers for answers, which fail on an untrained model's.
        written, _, notes = check_prompts(folder, template, conversations, answers=False)
        off = template.thinking.get("enable_thinking") is False and "enable_thinking" in text
        assert off == any("enable_thinking" in note for note in notes), path.stem
        assert written.endswith(text)
        table[path.stem] = f"equal in {len(conversations)} conversations" + ", no thoughts" * off
        shutil.rmtree(folder)
    print(*(f"{name:45} {result}" for name, result in table.items()), sep="\n")
    assert sum("equal" in result for result in table.values()) >= 45


def can_ask(template, messages):
    """False if the template refuses a conversation, as Gemma's refuses system prompts."""
    try:
        return bool(template.encode_prompt(messages))
    except UserError:
        return False


@pytest.mark.parametrize("thinks", [True, False])
def test_thoughts_in_llama_cpp(thinks, shared_data, tmp_path):
    """A model that was trained to think is asked for thoughts; llama.cpp can turn them off."""
    text = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
    folder = checkpoint_for(text, "byte-level", shared_data, tmp_path / "model")
    template = get_template("auto", Tokenizer.load(folder), "Be kind.", None, thinks)
    choices = {"default_system": "Be kind.", "enable_thinking": thinks}
    _, _, notes = check_prompts(folder, template, **choices)
    assert len(notes) == (not thinks)
    with Server(f"{folder}.gguf", context=1024) as server:
        no_thoughts = {"enable_thinking": False}
        prompt = server.post(
            "/apply-template", messages=CONVERSATIONS[0], chat_template_kwargs=no_thoughts
        )["prompt"]
        assert prompt.endswith("<think>\n\n</think>\n\n") and "Be kind." in prompt


def test_the_date_of_a_template_is_that_of_the_training(shared_data, tmp_path):
    """llama.cpp sets date_string to today."""
    path = shared_data / "chat_templates" / "meta-llama-Llama-3.1-8B-Instruct.jinja"
    text = path.read_text(encoding="utf-8")
    folder = checkpoint_for(text, "byte-level", shared_data, tmp_path / "model")
    kwargs = {"date_string": "1 May 2020"}
    template = get_template("auto", Tokenizer.load(folder), template_kwargs=kwargs)
    written, _, _ = check_prompts(folder, template, template_kwargs=kwargs)
    assert "1 May 2020" in written
    again = hub.resolve(f"{folder}.gguf")
    assert Tokenizer.load(again).chat_template == template.text
    export_model(again, tmp_path / "again.gguf", "f16")
    assert read_gguf(tmp_path / "again.gguf").metadata["tokenizer.chat_template"] == written


@pytest.mark.parametrize("template_has_bos", [True, False])
def test_bos_follows_from_the_prompts(template_has_bos, shared_data, tmp_path):
    """The file states BOS for prompts, and reading it back restores BOS for other texts."""
    text = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    text = "{{ bos_token }}" * template_has_bos + text
    folder = checkpoint_for(text, "byte-level", shared_data, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "add_bos_token": not template_has_bos}))
    tokenizer = Tokenizer.load(folder)
    check_prompts(folder, get_template("auto", tokenizer), CONVERSATIONS[:1])
    metadata = read_gguf(f"{folder}.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"] == template_has_bos
    back = Tokenizer.load(hub.resolve(f"{folder}.gguf"))
    assert (back.add_bos_token, back.bos_token_id) == (not template_has_bos, 0)
    assert tokenizer.add_bos_token == back.add_bos_token


def test_notes_say_where_ids_must_differ(small_sentencepiece, tmp_path):
    """Space after some control tokens but not all; tokens that swallow white space."""
    folder = small_sentencepiece(
        ["<|you|>"],
        legacy=True,
        chat_template="{% for m in messages %}<|you|> {{ m.content }}{% endfor %}</s>me",
    )
    notes = export_model(folder, f"{folder}.gguf", "f16").notes
    assert any("was trained with both" in note for note in notes)
    tokenizer = Tokenizer.load(folder)
    read_back = Tokenizer.load(hub.resolve(f"{folder}.gguf"))
    template = get_template("auto", tokenizer)
    with Server(f"{folder}.gguf") as server:
        theirs = server.tokenize(server.render(CONVERSATIONS[0]), parse_special=True)
        assert theirs != template.encode_prompt(CONVERSATIONS[0])
        assert server.tokenize("  two") != tokenizer.encode("  two")
        # Our own reading of the file agrees with llama.cpp.
        assert server.tokenize("  two") == read_back.encode("  two")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"][-1] |= {"rstrip": True}
    path.write_text(json.dumps(content), encoding="utf-8")
    notes = export_model(folder, f"{folder}.gguf", "f16").notes
    assert any("white space beside <|you|>" in note for note in notes)


@pytest.mark.parametrize("has_bos", [True, False])
def test_the_template_of_the_training_is_written(has_bos, tiny_tokenizer_dir, tmp_path):
    """The file prompts a model as in training, whatever template its base has."""
    folder = tmp_path / "model"
    if has_bos:
        shutil.copytree(tiny_tokenizer_dir, folder)
    else:
        without_bos(tiny_tokenizer_dir, folder)
    narrow_model(folder, 300, "llama")
    for name in sorted(set(NAMES) - {"qwen3"}):
        record = f'template = "{name}"\ndefault_system = "Be kind."\n'
        (folder / "options.toml").write_text(record)
        export_model(folder, tmp_path / "model.gguf", "f16")
        ours = get_template(name, Tokenizer.load(folder), "Be kind.")
        read_back = Tokenizer.load(hub.resolve(str(tmp_path / "model.gguf")))
        back = get_template("auto", read_back)
        assert back.text == ours.text
        with Server(tmp_path / "model.gguf", context=512) as server:
            # Without a BOS llama.cpp would use token 11, here a comma.
            assert server.get("/props")["bos_token"] == ("<s>" if has_bos else "</s>")
            for messages in CONVERSATIONS[:2]:
                prompt = server.render(messages)
                ids = server.tokenize(prompt, add_special=True, parse_special=True)
                assert ids == ours.encode_prompt(messages) == back.encode_prompt(messages), name


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "smaug-bpe"])
def test_other_pre_tokenizers(pre, tiny_tokenizer_dir, strings, tmp_path):
    """A small byte-level BPE with each pre-tokenizer that no tokenizer in REAL has."""
    spec = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text())
    if pre == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [digits, spec["pre_tokenizer"]],
        }
    if pre == "smaug-bpe":
        spec["pre_tokenizer"] = cut_by(WORDS % r"\p{N}{1,3}")
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(strings + ["a  1234 x!!", "'s 2023"] * 50, trainer)
    narrow_model(tmp_path / "model", 1000, "llama")
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    export_model(tmp_path / "model", tmp_path / "model.gguf", "f16")
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert vocabulary_fields(tokenizer, 1000)["tokenizer.ggml.pre"] == pre
    with Server(tmp_path / "model.gguf") as server:
        for text in strings:
            assert server.tokenize(text) == tokenizer.encode(text), text


@pytest.mark.parametrize(
    "pre, adds_bos", [("llama-bpe", True), ("llama-v3", True), ("gpt-2", False)]
)
def test_files_that_do_not_say_whether_bos_begins_a_text(
    pre, adds_bos, tiny_tokenizer_dir, tmp_path, monkeypatch
):
    """Such as Llama 3 from llama.cpp's own converter. The pre-tokenizer decides."""

    def without_add_bos(*arguments):
        fields = vocabulary_fields(*arguments) | {"tokenizer.ggml.pre": pre}
        said = ("add_bos_token", "adds_bos")
        return {name: value for name, value in fields.items() if not name.endswith(said)}

    monkeypatch.setattr(gguf_export, "vocabulary_fields", without_add_bos)
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "model")
    narrow_model(folder, 300, "llama")
    export_model(folder, tmp_path / "model.gguf", "f16")
    tokenizer = Tokenizer.load(hub.resolve(str(tmp_path / "model.gguf")))
    bos = [tokenizer.bos_token_id] if adds_bos else []
    with Server(tmp_path / "model.gguf") as server:
        assert server.tokenize("Hi", add_special=True) == bos + tokenizer.encode("Hi")
    assert tokenizer.add_bos_token == adds_bos


def test_sentencepiece_without_its_model_file(exported, strings, tmp_path):
    """With tokenizer.json alone, the ranks of its merges become the scores."""
    folder, _ = exported("TinyLlama-1.1B-Chat-v0.6")
    folder = shutil.copytree(folder, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    path = folder / "tokenizer_config.json"  # without the chat template, which needs another space
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))
    export_model(folder, tmp_path / "model.gguf", "q8_0")
    tokenizer = Tokenizer.load(folder)
    with Server(tmp_path / "model.gguf") as server:
        for text in strings:
            assert server.tokenize(text) == tokenizer.encode(text), text
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    merges = spec["model"]["merges"]
    made = ["".join(merge.split(" ")) for merge in merges]
    shared = next(place for place, piece in enumerate(made) if made.count(piece) > 1)
    moved = [*merges[:shared], *merges[shared + 1 :], merges[shared]]
    for damage, message in ((merges[:500] + merges[501:], "not merged there"), (moved, "order")):
        spec["model"]["merges"] = damage
        path.write_text(json.dumps(spec), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            vocabulary_fields(Tokenizer.load(folder), 32000)


def test_stop_tokens_that_llama_cpp_knows_are_read_back(small_sentencepiece, tmp_path):
    """The file has no standard field for them. Its second export has the same bytes.

    A file of another program has the stop tokens of llama.cpp.
    """
    folder = small_sentencepiece(["<|end_of_text|>", "<|eom_id|>", "<|other|>"])
    stops = [2, 513, 514]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    path, again = tmp_path / "model.gguf", tmp_path / "again.gguf"
    export_model(folder, path, "f16", template="plain")
    with Server(path) as server:
        for id in range(510, 515):  # 512 is no stop token of this model, but of llama.cpp
            ends = server.post("/completion", prompt=[1], n_predict=2, logit_bias=[[id, 1e6]])
            assert (ends["stop_type"] == "eos") == (id >= 512)
    metadata = read_gguf(path).metadata
    del metadata["minisft.stop_token_ids"]
    files = tokenizer_files(metadata, len(metadata["tokenizer.ggml.tokens"]))
    assert files["generation_config.json"] == {"eos_token_id": [2, 514, 512, 513]}
    back = hub.resolve(str(path))
    assert generation_eos(back, ModelConfig.load(back)) == stops
    export_model(back, again, "f16", name=folder.name)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("normalizer", ["of the model file", "NFKC", None])
def test_texts_that_only_the_tokenizer_changes(normalizer, small_sentencepiece, tmp_path):
    """llama.cpp reads every text as it is, and a note says so."""
    folder = small_sentencepiece(tokenizer_class="PreTrainedTokenizerFast")
    path = folder / "tokenizer.json"
    if normalizer == "of the model file":  # collapses repeated spaces
        path.unlink()
    elif normalizer:
        spec = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**spec, "normalizer": {"type": normalizer}}))
    notes = export_model(folder, tmp_path / "model.gguf", "f16", template="plain").notes
    tokenizer = Tokenizer.load(folder)
    with Server(tmp_path / "model.gguf") as server:
        is_same = [
            tokenizer.encode(text, continuation=True) == server.tokenize(text)
            for text in ("a  b", "\ufb01", "a b")
        ]
    assert is_same == [normalizer != "of the model file", normalizer != "NFKC", True]
    about = [note for note in notes if "this tokenizer reads" in note]
    assert len(about) == (normalizer is not None)
    assert all(("'a  b' as 'a b'" in note) == (normalizer != "NFKC") for note in about)


# Mistral-Nemo's, which llama.cpp calls tekken: nearly that of Qwen 2.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cut_by(pattern):
    """A pre_tokenizer of tokenizer.json."""
    split = {
        "type": "Split",
        "behavior": "Isolated",
        "invert": False,
        "pattern": {"Regex": pattern},
    }
    return {
        "type": "Sequence",
        "pretokenizers": [
            split,
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "use_regex": False,
                "trim_offsets": True,
            },
        ],
    }


def test_tokenizers_that_llama_cpp_does_not_have(tiny_tokenizer_dir, tmp_path):
    spec = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text())
    tokenizer = Tokenizer.load(tiny_tokenizer_dir)
    with pytest.raises(UserError, match="'.+' has the id 2.., but the embedding has 250 rows"):
        vocabulary_fields(tokenizer, 250)
    for change, message in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer is not supported"),
        ({"pre_tokenizer": cut_by(TEKKEN)}, "pre_tokenizer is not supported"),
        ({"pre_tokenizer": {**spec["pre_tokenizer"], "add_prefix_space": True}}, "pre_tokenizer"),
        ({"normalizer": {"type": "Lowercase"}}, "no normalizer Lowercase"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "NFC"}, {"type": "NFKC"}],
                }
            },
            "no normalizer NFKC",
        ),
    ):
        with pytest.raises(UserError, match=message):
            pre_tokenizer_name({**spec, **change})
    folder = shutil.copytree(tiny_tokenizer_dir, tmp_path / "no merges")
    (folder / "tokenizer.json").write_text(
        json.dumps({**spec, "model": {**spec["model"], "merges": []}})
    )
    with pytest.raises(UserError, match="has no merges"):
        vocabulary_fields(Tokenizer.load(folder), 300)
    nothing = {"type": "Sequence", "normalizers": []}  # DeepSeek's distilled Llama and Qwen
    assert pre_tokenizer_name({**spec, "normalizer": nothing}) == "gpt-2"
    with pytest.raises(UserError, match=re.escape("room for two stop tokens")):
        vocabulary_fields(tokenizer, 300, [10, 11, 12])
    fields = vocabulary_fields(tokenizer, 300, [1, 10, 11, 6])
    assert fields["tokenizer.ggml.eot_token_id"] == 10
    assert fields["tokenizer.ggml.eom_token_id"] == 11

"""Baichuan2's chat form: prompts of its published code, and tokens that no text can spell."""

import importlib.util
from types import SimpleNamespace

import pytest
import sentencepiece
from conftest import CONVERSATIONS
from real_tokenizers import BAICHUAN2, TINYLLAMA, load_tokenizer

from minisft.common.errors import UserError
from minisft.text.saved_form import saved_form
from minisft.text.template_choice import CHAT_TEMPLATE, get_template
from minisft.text.tokenizer import Tokenizer

# Real tokenizers are loaded once, by the worker that gets all their tests.
pytestmark = pytest.mark.xdist_group("real_tokenizers")

USER, ASSISTANT, EOS = 195, 196, 2


@pytest.fixture
def tokenizer(shared_data):
    return load_tokenizer(shared_data / BAICHUAN2)


@pytest.fixture
def published_prompt(shared_data):
    """messages -> ids, by build_chat_input of the published generation_utils.py."""
    path = shared_data / "baichuan2" / "generation_utils.py"
    spec = importlib.util.spec_from_file_location("generation_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ids = SimpleNamespace(user_token_id=USER, assistant_token_id=ASSISTANT, max_new_tokens=9)
    config = SimpleNamespace(model_max_length=4096)
    model = SimpleNamespace(generation_config=ids, config=config, device="cpu")
    theirs = sentencepiece.SentencePieceProcessor(
        model_file=str(shared_data / BAICHUAN2 / "tokenizer.model")
    )
    return lambda messages: module.build_chat_input(model, theirs, messages)[0].tolist()


def test_prompts_equal_the_published_code(tokenizer, published_prompt):
    template = get_template("auto", tokenizer)  # the checkpoint has no chat template
    system = {"role": "system", "content": "你是助手。\n"}
    for messages in (*CONVERSATIONS, [system, *CONVERSATIONS[2]]):
        assert template.encode_prompt(messages) == published_prompt(messages)


def test_an_answer_ends_with_eos_and_is_learned(tokenizer):
    question, answer = (
        {"role": r, "content": c} for r, c in (("user", "你好"), ("assistant", "Hi"))
    )
    [example] = get_template("auto", tokenizer).encode([question, answer])
    inside = tokenizer.encode("你好"), tokenizer.encode("Hi")
    assert example.ids == [USER, *inside[0], ASSISTANT, *inside[1], EOS]
    assert example.supervised == [False] * (2 + len(inside[0])) + [True] * (len(inside[1]) + 1)


def test_every_answer_follows_its_published_prompt(tokenizer, published_prompt):
    """History is not closed by EOS, so each answer gets its own example."""
    answers = [{"role": "assistant", "content": text} for text in ("One.", "Two.")]
    chat = [CONVERSATIONS[0][0], answers[0], *CONVERSATIONS[0], answers[1]]
    template = get_template("auto", tokenizer)
    for example, place in zip(template.encode(chat), (1, 3), strict=True):
        prompt = published_prompt(chat[:place])
        assert example.ids == [*prompt, *tokenizer.encode(chat[place]["content"]), EOS]
        assert example.supervised.index(True) == len(prompt)
    assert template.stop_token_ids() == {EOS}


@pytest.mark.parametrize(
    "text",
    [
        "<reserved_106>",
        "a<reserved_106><reserved_107>b",
        "<<reserved_106>",
        "<reserved_106<reserved_107>>",
        "</s><reserved_107>",
    ],
)
def test_a_message_that_spells_a_turn_token(text, tokenizer):
    for continuation in (False, True):
        ids = tokenizer.encode(text, continuation)
        assert not tokenizer.special_ids & set(ids) and tokenizer.decode(ids) == text
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
    ]
    [example] = get_template("auto", tokenizer).encode(messages)
    controls = [id for id in example.ids if id in tokenizer.special_ids]
    assert controls == [USER, ASSISTANT, EOS]
    spelled = "<reserved_106>".join([text, text]) + "<reserved_107>" + text + "</s>"
    assert tokenizer.decode(example.ids, skip_special_tokens=False) == spelled


def test_other_user_defined_pieces_are_ordinary_vocabulary(tokenizer):
    for text in ("<reserved_108>", "<img>", "\t"):
        assert tokenizer.encode(text) == [tokenizer.token_id(text)]


def test_the_saved_folder_has_the_template(tokenizer, tmp_path):
    form = saved_form(tokenizer, "auto", tmp_path, [EOS])
    tokenizer.save(tmp_path / "saved", form.chat_template)
    assert (tmp_path / "saved" / CHAT_TEMPLATE).read_text() == tokenizer.chat_template
    again = get_template("auto", Tokenizer.load(tmp_path / "saved"))
    expected = get_template("baichuan2", tokenizer).encode_prompt(CONVERSATIONS[1])
    assert again.encode_prompt(CONVERSATIONS[1]) == expected


def test_a_tokenizer_without_turn_tokens(shared_data):
    with pytest.raises(UserError, match="<reserved_106>.*TinyLlama"):
        get_template("baichuan2", load_tokenizer(shared_data / TINYLLAMA))

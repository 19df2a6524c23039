"""The score of a row: by hand on a toy model, for every template, in any batch."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from test_template import LLAMA3, QWEN, TINYLLAMA, fitting

from minisft.common.errors import UserError
from minisft.data.dataset import Row
from minisft.data.row_values import BadRow
from minisft.selection import ifd
from minisft.text.template import TEMPLATES, get_template
from minisft.text.tokenizer import Tokenizer


class Urn:
    """A model by hand: a token is as likely as it was frequent so far, p = (1 + n) / (V + T)."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))
        self.config = SimpleNamespace(num_hidden_layers=1, rope_scaling=None)

    def __call__(self, tokens, cache=None):
        counts = torch.nn.functional.one_hot(tokens, self.vocab_size).cumsum(1).float()
        if cache is not None:  # which holds the counts so far
            if cache.pairs[0]:  # of each row
                assert len(cache.pairs[0][0]) == len(tokens)
                counts += cache.pairs[0][0][:, None]
            cache.pairs[0] = (counts[:, -1],)
        return counts

    def logits(self, hidden):
        return (1 + hidden).log()


def urn_loss(ids, start, vocab_size):
    """The summed loss of ids[start:], each behind those before it, by fractions."""
    total = 0.0
    for place in range(start, len(ids)):
        seen = Counter(ids[:place])
        total -= math.log((1 + seen[ids[place]]) / (vocab_size + place))
    return total


class Given(list):
    """Rows in memory, as dataset.Rows gives them."""

    skip_bad_rows = False


def rows_of(*conversations):
    return Given(Row([{"role": ("user", "assistant")[i % 2], "content": text}
                      for i, text in enumerate(texts)]) for texts in conversations)


def run(model, rows, template, batch_tokens=512, parts=("ifd", "embed"), max_length=400):
    encoder = ifd.Encoder(rows, template, max_length, None, parts)
    found = [one for part in ifd.score(model, encoder, np.arange(len(rows)), batch_tokens)
             for one in part]
    assert sorted(one.index for one in found) == list(range(len(rows)))
    return sorted(found, key=lambda one: one.index)


@pytest.fixture(scope="module")
def alpaca(tiny_tokenizer_dir):
    return get_template("alpaca", Tokenizer.load(tiny_tokenizer_dir))


CHAT = ("the cat", "sat on", "the hat", "the mat sat")


def test_by_hand(alpaca):
    (one,) = run(Urn(300), rows_of(CHAT), alpaca)
    encode, bos = alpaca.tokenizer.encode, alpaca.tokenizer.bos_token_id
    answers = [encode(text, continuation=True) for text in CHAT[1::2]]
    ids, _ = alpaca.encode(rows_of(CHAT)[0].messages)
    conditioned = direct = 0.0
    for number, answer in enumerate(answers):
        messages = rows_of(CHAT)[0].messages[: 2 * number + 1]
        prompt = alpaca.encode_prompt(messages)
        assert ids[: len(prompt)] == prompt  # the first answer's end is in the second's history
        conditioned += urn_loss(prompt + answer, len(prompt), 300)
        marker = [bos, *encode("### Response:")]
        direct += urn_loss(marker + answer, len(marker), 300)
    count = sum(map(len, answers))
    values = one.as_dict()
    assert values["index"] == 0 and values["reason"] is None
    assert values["num_answer_tokens"] == count
    assert values["loss_conditioned"] == pytest.approx(conditioned / count, rel=1e-5)
    assert values["loss_direct"] == pytest.approx(direct / count, rel=1e-5)
    assert values["ifd"] == pytest.approx(conditioned / direct, rel=1e-5)
    assert values["ifd_ppl"] == pytest.approx(
        math.exp(conditioned / count) / math.exp(direct / count), rel=1e-5)
    # What is embedded is the prompt of the last answer: here a state counts the tokens so far.
    assert one.perplexity() == pytest.approx(
        math.exp(urn_loss(prompt, 1, 300) / (len(prompt) - 1)), rel=1e-5)
    states = [np.bincount(prompt[: end + 1], minlength=300) for end in range(len(prompt))]
    np.testing.assert_allclose(one.embedding, np.mean(states, 0), rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_the_batch_makes_no_difference(alpaca, batch_tokens):
    conversations = [("the " * n + "rat", "sat " * (m + 1)) for n in range(5) for m in range(6)]
    conversations += [CHAT, ("the cat",) + CHAT[1:]]
    expected = [run(Urn(300), rows_of(one), alpaca)[0] for one in conversations]
    for one, other in zip(run(Urn(300), rows_of(*conversations), alpaca, batch_tokens), expected,
                          strict=True):
        ours, theirs = one.as_dict(), other.as_dict()
        assert ours["ifd"] == pytest.approx(theirs["ifd"], rel=1e-5)
        assert ours["ifd_ppl"] == pytest.approx(theirs["ifd_ppl"], rel=1e-5)
        assert one.perplexity() == pytest.approx(other.perplexity(), rel=1e-5)
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-5)


def test_batches_keep_to_the_budget():
    passes = [(ifd.Sequence(np.zeros(length), None), None) for length in
              np.random.default_rng(0).integers(1, 200, 500)]
    batches = list(ifd.cut(passes, 600))
    assert sum(map(len, batches)) == 500 and len(batches) < 120
    for batch in batches:
        width = max(-(-len(one.ids) // 8) * 8 for one, _ in batch)
        assert width * len(batch) <= 600
    assert [len(batch) for batch in ifd.cut(passes[:3], 1)] == [1, 1, 1]


def check_template(template):
    """Both passes have the same answer, one behind the prompt, one behind the marker alone."""
    tokenizer = template.tokenizer
    messages = rows_of(("Name a colour.", "Red, or blue."))[0].messages
    encoder = ifd.Encoder(Given([Row(messages)]), template, 512, None, ("ifd", "embed"))
    (one,) = encoder[[0]]
    conditioned, direct = one.sequences
    prompt = template.encode_prompt(messages[:1])
    answer = conditioned.ids[conditioned.answer]
    assert conditioned.prompt_length == len(prompt)
    assert [*prompt, *answer] == conditioned.ids.tolist()
    assert tokenizer.decode(answer.tolist()).strip() == "Red, or blue."
    assert (direct.ids[direct.answer] == answer).all()
    marker = direct.ids[~direct.answer].tolist()
    begins = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    assert marker[: len(begins)] == begins and tokenizer.bos_token_id not in marker[1:]
    assert len(marker) >= 1 and "colour" not in tokenizer.decode(marker)
    if template.name == "alpaca":
        assert marker == begins + tokenizer.encode("### Response:")
    else:  # it is how the prompt ends
        assert tokenizer.decode(prompt).strip().endswith(
            tokenizer.decode(marker[len(begins) :]).strip())


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template(tiny_tokenizer_dir, name):
    check_template(get_template(name, Tokenizer.load(tiny_tokenizer_dir)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_with_real_tokenizers(shared_data, name):
    for tokenizer in fitting(shared_data, name):
        check_template(get_template(name, tokenizer))


MARKERS = {"llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
           "chatml": "<|im_start|>assistant\n", "llama2": "[/INST]", "mistral": "[/INST]",
           "zephyr": "<|assistant|>\n", "vicuna": "ASSISTANT:", "alpaca": "### Response:",
           "plain": "\n"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_markers(shared_data, name):
    folder = {"llama3": LLAMA3, "chatml": QWEN}.get(name, TINYLLAMA)
    tokenizer = Tokenizer.load(shared_data / folder)
    marker = get_template(name, tokenizer).encode_marker()
    text = "".join(tokenizer.token_text(id) for id in marker).replace("▁", " ")
    text = text.replace("<0x0A>", "\n").replace("Ċ", "\n").replace("<s>", "").lstrip(" ")
    assert text.removeprefix("<|begin_of_text|>") == MARKERS[name]


def test_a_marker_without_tokens(tmp_path):
    """Without a token before the answer its first one would have no loss when it stands alone."""
    vocabulary = {"</s>": 0, "<unk>": 1, "the": 2, "cat": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    template = get_template("plain", Tokenizer.load(tmp_path))
    with pytest.raises(UserError, match="template plain: nothing of what opens an answer"):
        ifd.Encoder(rows_of(("the", "cat")), template, 100)


def test_rows_without_a_score_say_why(alpaca):
    rows = rows_of(("the cat", "sat " * 500), ("the " * 500, "sat"), ("the cat", "sat"))
    long_answer, long_prompt, good = run(Urn(300), rows, alpaca, max_length=200)
    for one in (long_answer, long_prompt):
        values = one.as_dict()
        assert values["reason"].startswith("longer than max_length")
        assert values["ifd"] is values["ifd_ppl"] is values["loss_direct"] is None
        assert one.embedding is not None and math.isfinite(one.perplexity())
    assert long_answer.prompt_length < 200 and long_prompt.prompt_length == 200
    assert good.as_dict()["ifd"] > 0
    assert run(Urn(300), rows, alpaca, parts=("ifd",), max_length=200)[0].embedding is None


def test_numbers_that_are_none():
    urn = ifd.Score(0, 2, conditioned=math.nan, direct=1.0).as_dict()
    assert urn["reason"] == "the loss is not a finite number" and urn["loss_direct"] is None
    zero = ifd.Score(0, 2, conditioned=1.0, direct=0.0).as_dict()
    assert zero["ifd"] is None and "zero" in zero["reason"] and zero["loss_conditioned"] == 0.5
    large = ifd.Score(0, 2, conditioned=2000.0, direct=1.0)  # JSON has no number for infinity
    assert json.loads(json.dumps(large.as_dict(), allow_nan=False)) == {
        "index": 0, "loss_conditioned": 1000.0, "loss_direct": 0.5, "ifd": 2000.0,
        "ifd_ppl": None, "num_answer_tokens": 2, "reason": None}
    for loss, expected in ((180.0, math.inf), (math.nan, math.inf), (2.0, math.e)):
        one = ifd.Score(0, prompt=loss, prompt_length=3)
        assert one.perplexity() == pytest.approx(expected)  # float32 holds it


class Broken(Given):
    def __getitem__(self, number):
        raise BadRow("x.json, row 1: there is no answer")


def test_broken_rows(alpaca):
    rows = Broken([0])
    with pytest.raises(UserError, match="no answer .--skip_bad_rows"):
        run(Urn(300), rows, alpaca)
    rows.skip_bad_rows = True
    (one,) = run(Urn(300), rows, alpaca)
    assert one.as_dict()["reason"] == "broken: x.json, row 1: there is no answer"
    assert one.perplexity() == math.inf


def test_a_vocabulary_too_small(alpaca):
    with pytest.raises(UserError, match="the tokenizer gives id"):
        list(ifd.score(Urn(10), ifd.Encoder(rows_of(CHAT), alpaca, 100, 10), [0], 100))

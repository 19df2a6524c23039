"""IFD: computed by hand on a toy model, for every template, the same in any batch."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from conftest import CONFIG
from real_tokenizers import BAICHUAN2, LLAMA3, QWEN, TINYLLAMA, fitting, load_tokenizer

from minisft.common.errors import UserError
from minisft.data.dataset import Row
from minisft.data.row_values import BadRow
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.selection.ifd import IfdScorer, PassResult, ifd_fields
from minisft.selection.passes import Pass, Plan, make_batches
from minisft.selection.scoring import RowReader, score_rows
from minisft.selection.shared_prefix import group_by_prefix, hidden_states
from minisft.text.template_choice import NAMES, get_template
from minisft.text.tokenizer import Tokenizer


class Urn:
    """A toy model: p(token) = (1 + how often it came so far) / (V + T)."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.config = SimpleNamespace(num_hidden_layers=1, rope_scaling=None)

    def __call__(self, tokens, cache=None):
        counts = torch.nn.functional.one_hot(tokens, self.vocab_size).cumsum(1).float()
        if cache is not None:  # the counts so far, for each row
            if cache.pairs[0]:
                assert len(cache.pairs[0][0]) == len(tokens)
                counts += cache.pairs[0][0][:, None]
            cache.pairs[0] = (counts[:, -1], counts[:, -1])
        return counts

    def logits(self, hidden):
        return (1 + hidden).log()

    def parameters(self):
        yield torch.zeros(1)


def urn_loss(ids, start, vocab_size):
    """The summed loss of ids[start:], each given all ids before it."""
    total = 0.0
    for place in range(start, len(ids)):
        seen = Counter(ids[:place])
        total -= math.log((1 + seen[ids[place]]) / (vocab_size + place))
    return total


class RowList(list):
    """Rows in memory, with the interface of dataset.Rows."""

    skip_bad_rows = False


def rows_of(*conversations):
    return RowList(
        Row(
            [
                {"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(texts)
            ]
        )
        for texts in conversations
    )


def run(model, rows, template, batch_tokens=512, parts=("ifd", "embed"), cutoff_len=400):
    """The scores of all rows, in order."""
    reader = RowReader(rows, IfdScorer(template, cutoff_len, None, parts))
    numbers = np.arange(len(rows))
    scores = [score for part in score_rows(model, reader, numbers, batch_tokens) for score in part]
    assert sorted(score.index for score in scores) == list(range(len(rows)))
    return sorted(scores, key=lambda score: score.index)


def run_row(model, row, template):
    """The plain way: one row, one pass at a time, without a cache."""
    scorer = IfdScorer(template, 400, None, ("ifd", "embed"))
    plan = scorer.plan(0, row)
    return scorer.score(plan, [scorer.compute(model, [one])[0] for one in plan.passes])


@pytest.fixture(scope="module")
def alpaca(tiny_tokenizer_dir):
    return get_template("alpaca", Tokenizer.load(tiny_tokenizer_dir))


CHAT = ("the cat", "sat on", "the hat", "the mat sat")


def test_by_hand(alpaca):
    (score,) = run(Urn(300), rows_of(CHAT), alpaca)
    encode, bos = alpaca.tokenizer.encode, alpaca.tokenizer.bos_token_id
    answers = [encode(text, continuation=True) for text in CHAT[1::2]]
    ids = alpaca.encode(rows_of(CHAT)[0].messages)[0].ids
    conditioned = direct = 0.0
    for number, answer in enumerate(answers):
        messages = rows_of(CHAT)[0].messages[: 2 * number + 1]
        prompt = alpaca.encode_prompt(messages)
        assert ids[: len(prompt)] == prompt  # with the end of the answer before
        conditioned += urn_loss(prompt + answer, len(prompt), 300)
        marker = [bos, *encode("### Response:")]
        direct += urn_loss(marker + answer, len(marker), 300)
    count = sum(map(len, answers))
    values = score.record
    assert values["index"] == 0 and values["reason"] is None
    assert values["num_answer_tokens"] == count
    assert values["loss_conditioned"] == pytest.approx(conditioned / count, rel=1e-5)
    assert values["loss_direct"] == pytest.approx(direct / count, rel=1e-5)
    assert values["ifd"] == pytest.approx(conditioned / direct, rel=1e-5)
    assert values["ifd_ppl"] == pytest.approx(
        math.exp(conditioned / count) / math.exp(direct / count), rel=1e-5
    )
    # The prompt of the last answer is embedded. A state of this model counts the tokens so far.
    assert score.perplexity == pytest.approx(
        math.exp(urn_loss(prompt, 1, 300) / (len(prompt) - 1)), rel=1e-5
    )
    states = [np.bincount(prompt[: end + 1], minlength=300) for end in range(len(prompt))]
    np.testing.assert_allclose(score.embedding, np.mean(states, 0), rtol=1e-5)


def test_rows_are_finished_from_the_beginning(alpaca):
    # Both passes of a row are soon done, so a stopped run has lost little.
    rows = rows_of(*[("the " * n + "rat", "sat on the hat " * n) for n in range(1, 33)])
    reader = RowReader(rows, IfdScorer(alpaca, 10_000, None, ("ifd",)))
    finished = [len(scores) for scores in score_rows(Urn(300), reader, np.arange(32), 300)]
    assert sum(finished) == 32
    assert sum(finished[: len(finished) // 2]) >= 32 / 4


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_batches_and_shared_prefixes_give_the_scores_of_single_rows(alpaca, batch_tokens):
    conversations = [("the " * n + "rat", "sat " * (m + 1)) for n in range(5) for m in range(6)]
    conversations += [("the cat",) + CHAT[1:], CHAT]
    rows = rows_of(*conversations)
    plans = [IfdScorer(alpaca).plan(0, row) for row in rows]
    groups = group_by_prefix([one for plan in plans for one in plan.passes])
    assert [len(group) for group in groups] == [32, 34]  # conditioned passes; direct passes
    for score, row in zip(run(Urn(300), rows, alpaca, batch_tokens), rows, strict=True):
        expected = run_row(Urn(300), row, alpaca)
        assert score.record["ifd"] == pytest.approx(expected.record["ifd"], rel=1e-5)
        assert score.record["ifd_ppl"] == pytest.approx(expected.record["ifd_ppl"], rel=1e-5)
        assert score.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        np.testing.assert_allclose(score.embedding, expected.embedding, rtol=1e-5)


@torch.inference_mode()
def test_a_shared_prefix_gives_the_states_of_a_single_call():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_dict(CONFIG)).eval()
    model.initialize()
    tokens = torch.randint(3, 128, (3, 40))
    tokens[:, :30] = tokens[0, :30]
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(args[0].shape))
    torch.testing.assert_close(hidden_states(model, tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert widths == [(1, 30), (3, 10), (3, 40)]
    torch.testing.assert_close(
        hidden_states(model, tokens[:1].repeat(3, 1)),
        model(tokens[:1]).repeat(3, 1, 1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_batches_keep_to_the_budget():
    passes = [
        Pass(np.zeros(length), np.zeros(length))
        for length in np.random.default_rng(0).integers(1, 200, 500)
    ]
    batches = list(make_batches(passes, 600))
    assert sum(map(len, batches)) == 500 and len(batches) < 120
    for batch in batches:
        width = max(-(-len(one.ids) // 8) * 8 for one in batch)
        assert width * len(batch) <= 600
    assert [len(batch) for batch in make_batches(passes[:3], 1)] == [1, 1, 1]


def check_template(template):
    """Both passes have the same answer: one after the prompt, one after the marker."""
    tokenizer = template.tokenizer
    messages = rows_of(("Name a colour.", "Red, or blue."))[0].messages
    plan = IfdScorer(template, 512, None, ("ifd", "embed")).plan(0, Row(messages))
    conditioned, direct = plan.passes
    prompt = template.encode_prompt(messages[:1])
    answer = conditioned.ids[conditioned.is_answer]
    assert conditioned.prompt_length == len(prompt)
    assert [*prompt, *answer] == conditioned.ids.tolist()
    assert tokenizer.decode(answer.tolist()).strip() == "Red, or blue."
    assert (direct.ids[direct.is_answer] == answer).all()
    marker = direct.ids[~direct.is_answer].tolist()
    begins = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    assert marker[: len(begins)] == begins and tokenizer.bos_token_id not in marker[1:]
    assert len(marker) >= 1 and "colour" not in tokenizer.decode(marker)
    if template.name == "alpaca":
        assert marker == begins + tokenizer.encode("### Response:")
    else:  # the prompt ends with it
        assert (
            tokenizer.decode(prompt)
            .strip()
            .endswith(tokenizer.decode(marker[len(begins) :]).strip())
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_template(tiny_tokenizer_dir, name):
    check_template(get_template(name, Tokenizer.load(tiny_tokenizer_dir)))


@pytest.mark.xdist_group("real_tokenizers")  # which are loaded once
@pytest.mark.parametrize("name", NAMES)
def test_every_template_with_real_tokenizers(shared_data, name):
    for tokenizer in fitting(shared_data, name):
        check_template(get_template(name, tokenizer))


MARKERS = {
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>assistant\n",
    "llama2": "[/INST]",
    "mistral": "[/INST]",
    "zephyr": "<|assistant|>\n",
    "default": "Assistant:",
    "vicuna": "ASSISTANT:",
    "alpaca": "### Response:",
    "plain": "\n",
    "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "baichuan2": "<reserved_107>",
}


@pytest.mark.xdist_group("real_tokenizers")
@pytest.mark.parametrize("name", NAMES)
def test_markers(shared_data, name):
    special = {"llama3": LLAMA3, "chatml": QWEN, "qwen3": QWEN, "baichuan2": BAICHUAN2}
    folder = special.get(name, TINYLLAMA)
    tokenizer = load_tokenizer(shared_data / folder)
    marker = get_template(name, tokenizer).encode_marker()
    text = "".join(tokenizer.token_text(id) for id in marker).replace("▁", " ")
    text = text.replace("<0x0A>", "\n").replace("Ċ", "\n").replace("<s>", "").lstrip(" ")
    assert text.removeprefix("<|begin_of_text|>") == MARKERS[name]


def test_a_marker_without_tokens(tmp_path):
    """Without a marker, nothing would predict the first token of an answer."""
    vocabulary = {"</s>": 0, "<unk>": 1, "the": 2, "cat": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    template = get_template("plain", Tokenizer.load(tmp_path))
    with pytest.raises(UserError, match="template plain: the text that opens an answer has no"):
        IfdScorer(template)


def test_rows_without_a_score_have_a_reason(alpaca):
    rows = rows_of(("the cat", "sat " * 500), ("the " * 500, "sat"), ("the cat", "sat"))
    long_answer, long_prompt, good = run(Urn(300), rows, alpaca, cutoff_len=200)
    for score in (long_answer, long_prompt):
        values = score.record
        assert values["reason"].startswith("longer than cutoff_len: ")
        assert values["ifd"] is values["ifd_ppl"] is values["loss_direct"] is None
        assert score.embedding is not None and math.isfinite(score.perplexity)
    assert good.record["ifd"] > 0
    scorer = IfdScorer(alpaca, 200, None, ("embed",))  # the prompt is truncated to cutoff_len
    assert len(scorer.plan(0, rows[0]).passes[0].ids) < 200
    assert len(scorer.plan(0, rows[1]).passes[0].ids) == 200


@pytest.mark.parametrize(("pooling", "truncated"), [("mean", [1]), ("weighted", [0, 1])])
def test_only_a_truncated_embedding_has_a_remark(alpaca, pooling, truncated):
    rows = rows_of(("the cat", "sat " * 500), ("the " * 500, "sat"), ("the cat", "sat"))
    scorer = IfdScorer(alpaca, 200, None, ("embed",), pooling)
    reasons = [scorer.plan(number, row).reason for number, row in enumerate(rows)]
    assert [number for number, reason in enumerate(reasons) if reason] == truncated
    assert run(Urn(300), rows, alpaca, parts=("ifd",), cutoff_len=200)[0].embedding is None


def test_losses_that_give_no_ratio(alpaca):
    assert ifd_fields(math.nan, 1.0) == {"reason": "the loss is not a finite number"}
    zero = ifd_fields(0.5, 0.0)
    assert "ifd" not in zero and "zero" in zero["reason"] and zero["loss_conditioned"] == 0.5
    large = ifd_fields(1000.0, 0.5)  # JSON has no number for infinity
    assert json.loads(json.dumps(large, allow_nan=False)) == {
        "loss_conditioned": 1000.0,
        "loss_direct": 0.5,
        "ifd": 2000.0,
        "ifd_ppl": None,
    }
    scorer = IfdScorer(alpaca, parts=("embed",))
    plan = Plan(0, 2, passes=[Pass(np.zeros(3), np.zeros(3), prompt_length=3)])
    for loss, expected in ((180.0, math.inf), (math.nan, math.inf), (2.0, math.e)):
        result = PassResult(0.0, loss, np.zeros(1))
        assert scorer.score(plan, [result]).perplexity == pytest.approx(expected)


class BrokenRows(RowList):
    def __getitem__(self, number):
        raise BadRow("x.json, row 1: there is no answer")


def test_broken_rows(alpaca):
    rows = BrokenRows([0])
    with pytest.raises(UserError, match="no answer .--skip_bad_rows"):
        run(Urn(300), rows, alpaca)
    rows.skip_bad_rows = True
    (score,) = run(Urn(300), rows, alpaca)
    assert score.record["reason"] == "broken: x.json, row 1: there is no answer"
    assert score.perplexity == math.inf


def test_a_vocabulary_too_small(alpaca):
    reader = RowReader(rows_of(CHAT), IfdScorer(alpaca, 100, vocab_size=10))
    with pytest.raises(UserError, match="the tokenizer gives id"):
        list(score_rows(Urn(10), reader, np.arange(1), 100))

"""eval.py compare: its measures equal those of the libraries; runs through the command line."""

import json
import math
import sys

import pytest
import sacrebleu
import torch
import transformers
from conftest import command
from judge_stub import serving
from rouge_score import rouge_scorer

import eval as script
from minisft.common.errors import UserError
from minisft.data.dataset import Row, load_rows
from minisft.evaluation.compare import (
    Item,
    answer_items,
    answer_text,
    fingerprint,
    read_items,
    reference_losses,
)
from minisft.evaluation.measures import differences, measure
from minisft.evaluation.models import parse_model
from minisft.evaluation.report_lines import difference_lines
from minisft.evaluation.text_metrics import Splitter, corpus_bleu2, row_scores
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling

PAIRS = [
    ("the cat sat", "a cat sat down"),
    ("今天天气很好", "今天天气不错"),
    ("same same", "same same"),
    ("", "nothing"),
    ("我用 Python 写 code。", "我写 Python code"),
]


def test_rouge_equals_the_library_character_by_character():
    oracle = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    found, expected = row_scores(*PAIRS[0]), oracle.score(PAIRS[0][1], PAIRS[0][0])
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert found[ours] == pytest.approx(expected[theirs].fmeasure)
    # The library splits at spaces. So write each character as a letter between spaces.
    letters = {one: chr(97 + place) for place, one in enumerate("今天气很好不错")}
    answer, reference = (" ".join(letters[one] for one in text) for text in PAIRS[1])
    expected = oracle.score(reference, answer)
    assert row_scores(*PAIRS[1])["rouge_2"] == pytest.approx(expected["rouge2"].fmeasure)
    assert row_scores(*PAIRS[1])["rouge_l"] == pytest.approx(expected["rougeL"].fmeasure)
    assert Splitter().tokenize("我用Python3写 code。") == ["我", "用", "python3", "写", "code"]
    assert row_scores("今天", "今天")["rouge_l"] == 1.0
    assert (
        oracle.score("今天", "今天")["rougeL"].fmeasure == 0.0
    )  # the reason for our own tokenizer


def test_marks_belong_to_words():
    """Python's \\w has no vowels of Hindi: दिन (day) and दान (gift) were one word."""
    answer, reference = "वह दिन में पानी पीता है।", "वह दान में पाना पीता है।"
    letters = {
        word: f" {chr(97 + place)} "
        for place, word in enumerate({*answer.split(), *reference.split()})
    }
    spelled = ["".join(map(letters.get, text.split())) for text in (reference, answer)]
    expected = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]).score(*spelled)
    found = row_scores(answer, reference)
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert found[ours] == pytest.approx(expected[theirs].fmeasure)
        assert found[ours] < 1
    # As in Chinese, there are no spaces between words.
    assert Splitter().tokenize("ง่ายมาก 2567") == ["ง่", "า", "ย", "ม", "า", "ก", "2567"]
    assert Splitter().tokenize("カ・か\u3099 ❤\ufe0f") == ["カ", "か\u3099"]


def spelled_out(text):
    """The text with ideographs as words that the tokenizer of rouge-score knows."""
    return "".join(f" u{ord(one):x} " if "\u4e00" <= one <= "\u9fff" else one for one in text)


@pytest.mark.parametrize("name", ["alpaca_en_demo", "alpaca_zh_demo"])
def test_scores_of_real_rows_equal_the_libraries(shared_data, name):
    texts = [
        row.messages[-1]["content"]
        for row in load_rows(str(shared_data / "instruct" / f"{name}.json"))[:60]
    ]
    # The library drops letters of other scripts, and accented letters.
    texts = [
        text
        for text in texts
        if all(one.isascii() or not one.isalnum() or "\u4e00" <= one <= "\u9fff" for one in text)
    ]
    rouge = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    bleu = sacrebleu.BLEU(tokenize="zh", max_ngram_order=2, effective_order=True)
    pairs = list(zip(texts, texts[1:], strict=False))
    assert len(pairs) > 40
    for answer, reference in pairs:
        found = row_scores(answer, reference)
        expected = rouge.score(spelled_out(reference), spelled_out(answer))
        assert [found["rouge_1"], found["rouge_2"], found["rouge_l"]] == pytest.approx(
            [expected[key].fmeasure for key in ("rouge1", "rouge2", "rougeL")]
        )
        score = bleu.sentence_score(answer, [reference]).score
        assert found["bleu_2"] == pytest.approx(score / 100)
    assert sum(row_scores(*pair)["rouge_l"] > 0 for pair in pairs) > 20


def test_bleu_2_equals_sacrebleu():
    assert row_scores("shoe", "shoe")["bleu_2"] == pytest.approx(
        1
    )  # though a single word has no bigrams
    answers, references = zip(*PAIRS, strict=True)
    oracle = sacrebleu.BLEU(tokenize="zh", max_ngram_order=2)
    expected = oracle.corpus_score(answers, [references])
    assert corpus_bleu2(answers, references) == pytest.approx(expected.score / 100)
    # By hand: 6 characters, of which 4 match, and 3 of 5 bigrams; equal lengths.
    assert row_scores(*PAIRS[1])["bleu_2"] == pytest.approx(math.sqrt(4 / 6 * 3 / 5), abs=1e-6)
    assert row_scores("same same", "same same ")["exact_match"] == 1.0


ITEMS = [
    Item([{"role": "user", "content": text}], reference)
    for text, reference in (
        ("the cat", "the mat"),
        ("where is the rat and the hat?", "on the mat 垫子"),
        ("你好", "yes"),
    )
]
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, top_k=0, top_p=1.0, seed=5)


@pytest.fixture
def stub():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def assistant(tiny_chat_model_dir):
    return Assistant(tiny_chat_model_dir, device="cpu", dtype="float32")


def test_answers_do_not_depend_on_the_batch(assistant):
    batched = answer_items(assistant, ITEMS, SAMPLING, 8)
    assert batched == answer_items(assistant, ITEMS, SAMPLING, 1)
    assert len({one["answer"] for one in batched}) == 3
    lengths = [len(assistant.template.encode_prompt(item.messages)) for item in ITEMS]
    short = Assistant(
        assistant.tokenizer.model_dir,
        device="cpu",
        dtype="float32",
        max_length=lengths[1] - 1 + SAMPLING.max_new_tokens,
    )
    skipped = answer_items(short, ITEMS, SAMPLING, 8)
    assert [one["is_skipped"] for one in skipped] == [False, True, False]
    assert skipped[0] == batched[0] and skipped[1]["answer"] == ""


def test_thoughts_are_no_part_of_an_answer(assistant, tmp_path):
    """With a template whose prompt opens the thoughts, like that of DeepSeek R1."""
    path = tmp_path / "thinks.jinja"
    text = assistant.template.text
    opens = text.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    assert opens != text
    switch = "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    path.write_text(switch + opens)
    thinking = Assistant(assistant.tokenizer.model_dir, template=str(path), device="cpu")
    answers = answer_items(thinking, ITEMS, SAMPLING, 8)
    said = thinking.answer([{"messages": item.messages} for item in ITEMS], SAMPLING)
    assert [one["answer"] for one in answers] == [one.text.strip() for one in said]
    assert any(one.reasoning_content for one in said)


def test_thoughts_are_no_part_of_a_reference(assistant):
    """Neither in a field nor in the text; an answer loses them, too, if its template has none."""
    question = {"role": "user", "content": "2 + 2?"}
    answers = ({"content": "<think>\nTwo.\n</think>\n\n4"}, {"content": "4", "reasoning": "Two."})
    rows = [Row([question, {"role": "assistant", **answer}]) for answer in answers]
    assert [item.reference for item in read_items(rows)] == ["4", "4"]
    written = assistant.tokenizer.encode("<think>Two.</think> the cat")
    assert answer_text(assistant.template, [1], written) == "the cat"
    for answer, said in (
        ({"content": "<think>Two.</think>"}, "thoughts without an answer"),
        ({"content": "", "tool_calls": [{"name": "add", "arguments": {}}]}, "a tool call"),
    ):
        row = Row([question, {"role": "assistant", **answer}], source="a.json", index=6)
        with pytest.raises(UserError, match=f"a.json, row 7: ends with {said}"):
            read_items([row])


def test_a_question_is_complete():
    """A judge needs the input after a system prompt, and the calls whose results it sees."""
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "Translate.", "input": "Good morning"}
    assert Item([question], "").question == "Translate.\nGood morning"
    shown = Item([system, question], "").question
    assert shown == "system: Be brief.\nuser: Translate.\nGood morning"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    shown = Item([question, call, {"role": "tool", "content": "7"}], "").question
    assert shown.endswith('\nassistant: {"name": "f", "arguments": {}}\ntool: 7')


def test_the_tools_of_a_row_are_in_the_prompt(assistant):
    tools = [{"name": "find_hat", "description": "", "parameters": {}}]
    with_tools = [Item(item.messages, item.reference, tools) for item in ITEMS]
    assert (
        read_items([Row([*ITEMS[0].messages, {"role": "assistant", "content": "the mat"}], tools)])
        == with_tools[:1]
    )
    assert fingerprint(with_tools) != fingerprint(ITEMS) == fingerprint(list(ITEMS))
    lengths = []
    for items in (ITEMS, with_tools):
        encode = assistant.template.encode_prompt
        lengths.append([len(encode(item.messages, item.tools)) for item in items])
        prompts = []
        assistant.template.encode_prompt = lambda *given, to=prompts, by=encode: (
            to.append(by(*given)) or to[-1]
        )
        answer_items(assistant, items, SAMPLING, 8)
        del assistant.template.encode_prompt
        assert [len(ids) for ids in prompts] == lengths[-1]
    assert all(two > one + 20 for one, two in zip(*lengths, strict=True))
    plain, told = (reference_losses(assistant, items, 2) for items in (ITEMS, with_tools))
    assert all(
        one[1] == two[1] and abs(one[0] - two[0]) > 1e-3
        for one, two in zip(plain, told, strict=True)
    )


def test_reference_losses_equal_transformers(assistant, tiny_chat_model_dir):
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir)
    losses = reference_losses(assistant, ITEMS, 2)
    for item, (loss, count) in zip(ITEMS, losses, strict=True):
        answer = {"role": "assistant", "content": item.reference}
        [example] = assistant.template.encode([*item.messages, answer])
        ids, learned = example.ids, example.supervised
        labels = torch.tensor([[id if one else -100 for id, one in zip(ids, learned, strict=True)]])
        expected = oracle(torch.tensor([ids]), labels=labels).loss
        assert count == sum(learned) and loss / count == pytest.approx(expected.item(), abs=1e-4)
    report = measure(ITEMS, answer_items(assistant, ITEMS, SAMPLING, 8), [losses[0], None, None])
    assert report["perplexity"] == pytest.approx(math.exp(losses[0][0] / losses[0][1]))
    assert report["bits_per_character"] == pytest.approx(losses[0][0] / math.log(2) / 7)
    assert report["references_without_room"] == 2
    assert report["mean"]["exact_match"]["mean"] == 0
    assert report["mean"]["exact_match"]["interval"] == pytest.approx((0, 0.5615), abs=1e-4)


def test_earlier_answers_are_no_part_of_the_reference(assistant):
    question, answer = ITEMS[0].messages[-1], {"role": "assistant", "content": "Yes, yes, yes."}
    after = Item([question, answer, question], ITEMS[0].reference)
    (_, count), (_, expected) = reference_losses(assistant, [after, ITEMS[0]], 2)
    assert count == expected


def test_differences_are_paired():
    first, other = (
        {
            "rows": [
                {
                    "bleu_2": 0,
                    "rouge_1": 0,
                    "rouge_2": 0,
                    "rouge_l": value,
                    "exact_match": float(value == 1),
                }
                for value in values
            ]
        }
        for values in ([0.5, 0.2, 0.4], [1, 0.7, 0.9])
    )
    found = differences(first, other)
    assert found["rouge_l"]["mean"] == pytest.approx(0.5)
    assert found["rouge_l"]["interval"] == pytest.approx((0.5, 0.5))  # the same gain in every row
    assert found["exact_match"]["p_value"] == 1.0
    # Three equal rows do not prove that other rows are equal, too.
    entries = {"b": differences(first, first)}
    assert entries["b"]["exact_match"]["interval"] is None
    assert difference_lines({"models": "ab", "differences_to_first": entries}) == [
        "b minus a: ROUGE-L +0.0 points (no row differs), exact match +0.0 points (no row "
        "differs), McNemar's p = 1"
    ]


def test_parse_model(tmp_path):
    (tmp_path / "c++").mkdir()
    assert parse_model(f"a={tmp_path}/c++") == ("a", f"{tmp_path}/c++", None)
    assert parse_model("base=some/dir") == ("base", "some/dir", None)
    assert parse_model("tuned=dir+runs/a") == ("tuned", "dir", "runs/a")
    for wrong in ("dir", "=dir", "a=", "a/b=dir", "_a=dir"):
        with pytest.raises(UserError, match="write NAME=DIR"):
            parse_model(wrong)


ROWS = [
    {"instruction": "plain", "output": "the mat"},
    {"instruction": "<script>alert(1)</script> 你好", "output": "</script><b>是"},
    {"instruction": "the rat", "output": "the hat"},
]


def words_for(model_dir, tmp_path, *more):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return [
        "compare",
        "--models",
        f"base={model_dir}",
        f"same={model_dir}",
        "--dataset",
        tmp_path / "rows.json",
        "--max_new_tokens",
        5,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--output_dir",
        tmp_path / "out",
        *more,
    ]


def run_here(monkeypatch, *words):
    """Run the script in this process, which is faster than a new one."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    script.main()


def test_compare_through_the_command_line(tiny_chat_model_dir, stub, tmp_path, monkeypatch, capsys):
    words = words_for(
        tiny_chat_model_dir, tmp_path, "--judge_model", "stub", "--judge_url", stub.url
    )
    done = command(*words, script="eval.py")
    assert done.returncode == 0, done.stderr
    assert "judging: 6 requests" in done.stdout and "0 win, 3 tie, 0 loss" in done.stdout
    assert "same minus base: ROUGE-L +0.0 points (no row differs)" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["models"]) == {"base", "same"}
    assert results["models"]["base"] == results["models"]["same"]
    assert results["differences_to_first"]["same"]["rouge_l"]["mean"] == 0
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    assert len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()) == 3  # same texts

    # --resume uses the saved answers, unless the options or the questions have changed.
    kept = tmp_path / "out" / "answers" / "same.json"
    content = json.loads(kept.read_text())
    content["answers"][0]["answer"] = "the mat"
    kept.write_text(json.dumps(content))
    run_here(monkeypatch, *words, "--resume")
    assert "exact match 33.3" in capsys.readouterr().out
    with pytest.raises(UserError, match="max_new_tokens 5, not 7"):
        run_here(monkeypatch, *words, "--resume", "--max_new_tokens", 7)
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS[:2], {**ROWS[2], "output": "a hat"}]))
    with pytest.raises(UserError, match="base.json: answers other questions"):
        run_here(monkeypatch, *words, "--resume")
    (tiny_chat_model_dir / "model.safetensors").touch()  # a model of the same name, trained again
    with pytest.raises(UserError, match="--resume: the files of a model have changed"):
        run_here(monkeypatch, *words, "--resume")


def test_answers_of_an_earlier_run_are_removed(tiny_chat_model_dir, tmp_path, monkeypatch):
    words = words_for(tiny_chat_model_dir, tmp_path)
    run_here(monkeypatch, *words)
    kept = tmp_path / "out" / "answers" / "same.json"
    kept.write_text(kept.read_text().replace('"answer": "', '"answer": "stale '))
    # The new run removes it, and is killed before it comes to this model.
    monkeypatch.setattr(script, "answer_questions", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        run_here(monkeypatch, *words, "--overwrite_output_dir")
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.undo()
    run_here(monkeypatch, *words, "--resume")
    assert "stale" not in (tmp_path / "out" / "results.json").read_text()


def test_mistakes_are_reported_before_anything_is_computed(
    tiny_chat_model_dir, tmp_path, monkeypatch, capsys
):
    model, words = tiny_chat_model_dir, words_for(tiny_chat_model_dir, tmp_path)
    monkeypatch.setattr(script, "answer_questions", lambda *_: pytest.fail("computed"))
    for more, said in (
        (["--judge_model", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["--judge_model", f"{model}+{tmp_path}"], "there is no adapter_config.json"),
        (
            ["--judge_model", "x", "--judge_url", "localhost:80"],
            "must begin with http:// or https://",
        ),
        (
            ["--judge_model", "x", "--judge_url", "http://x", "--judge_template", "alpaca"],
            "--judge_template belongs to a judge on this machine",
        ),
        (["--judge_url", "http://x"], "--judge_url needs --judge_model"),
        (["--models", f"a={model}", f"b={tmp_path / 'nowhere'}"], "nowhere: no such folder"),
        (["--models", f"a={model}", f"a={model}"], "two models have the same name"),
        (["--top_p", "1.5", "--temperature", "1"], "--top_p must be"),
        (["--top_p", "0.5"], "--top_p needs --temperature above 0"),
        (["--judge_price_in", "2"], "--judge_price_in needs --judge_model"),
        (["--models", f"a={model}", "--judge_model", model], "needs two models or more"),
        (["--resume", "--overwrite_output_dir"], "exclude each other"),
    ):
        with pytest.raises(UserError, match=said):
            run_here(monkeypatch, *words, *more)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    # Answers as long as the context leave no room for a question.
    with pytest.raises(
        UserError,
        match="--max_new_tokens 20000: no question leaves room .* base's context of 20000",
    ):
        run_here(monkeypatch, *words, "--max_new_tokens", 20000)


def test_a_failing_judge_loses_no_measures(tiny_chat_model_dir, stub, tmp_path, monkeypatch):
    words = words_for(
        tiny_chat_model_dir, tmp_path, "--judge_model", "stub", "--judge_url", stub.url
    )
    (tmp_path / "rows.json").write_text(json.dumps([{**ROWS[0], "instruction": "refused"}]))
    with pytest.raises(UserError, match="401"):
        run_here(monkeypatch, *words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "judge" not in results and set(results["models"]) == {"base", "same"}
    assert (tmp_path / "out" / "report.html").exists()


def test_real_rows_become_items(shared_data):
    rows = load_rows(str(shared_data / "instruct" / "compare_alpaca.json"))
    items = read_items(rows)
    assert len(items) == 10 and all(item.reference and item.question for item in items)
    report = measure(
        items,
        [
            {"answer": item.reference, "num_tokens": 1, "is_cut": False, "is_skipped": False}
            for item in items
        ],
        [None] * 10,
    )
    assert report["mean"]["exact_match"]["mean"] == report["mean"]["rouge_l"]["mean"] == 1
    assert report["mean"]["bleu_2"]["mean"] == pytest.approx(1)

"""Batches: every row once, little padding, a reproducible order per epoch, access to any step."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from standing import state_of, wait_until

from minisft.common.errors import UserError
from minisft.data import build_batches
from minisft.data.batching import WINDOW_STEPS, Batches, collate, micro_batches, pack
from minisft.data.build_batches import (
    batches_of_rows,
    batches_of_texts,
    first_examples,
    held_out_examples,
)
from minisft.data.dataset import Row, open_rows
from minisft.data.encode_report import EncodeReport
from minisft.data.encode_texts import encode_texts
from minisft.data.encoding import Example, encode_rows
from minisft.text.chat_template import TokenizedText
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer


def as_they_are(examples):
    return examples, EncodeReport(num_rows=len(examples))


def ragged_examples(count, longest=500):
    """Rows whose first two ids are their number."""
    lengths = np.random.default_rng(0).integers(5, longest, count)
    examples = [
        Example(np.full(length, row, np.int32), np.ones(length, bool))
        for row, length in enumerate(lengths)
    ]
    return examples


def rows_of(steps):
    """The numbers of the rows of every step."""
    return [[int(example.ids[0]) for example in step] for step in steps]


def flat(lists):
    return [value for one in lists for value in one]


def running(process_id):
    """True if a process runs; False if it is gone or a zombie."""
    return state_of(process_id) not in ("", "Z")


def epoch_of(batches, rows_per_step, epoch):
    per_epoch = batches.steps_per_epoch(rows_per_step)
    return list(batches.steps(rows_per_step, epoch * per_epoch, (epoch + 1) * per_epoch))


EXAMPLES = ragged_examples(3003, longest=60)


class TestSteps:
    def test_every_row_once_in_another_order_every_epoch(self):
        batches = Batches(EXAMPLES, as_they_are, seed=1)
        assert batches.steps_per_epoch(16) == -(-3003 // 16) > WINDOW_STEPS
        epochs = [rows_of(epoch_of(batches, 16, epoch)) for epoch in (0, 1)]
        for steps in epochs:
            assert sorted(flat(steps)) == list(range(3003))
            assert len(steps) == -(-3003 // 16) and {len(step) for step in steps} <= {15, 16}
        assert epochs[0] != epochs[1]
        first, second = ({frozenset(step) for step in steps} for steps in epochs)
        assert len(first & second) < 0.1 * len(first)  # other rows share a step, too
        assert rows_of(epoch_of(Batches(EXAMPLES, as_they_are, seed=1), 16, 1)) == epochs[1]
        assert rows_of(epoch_of(Batches(EXAMPLES, as_they_are, seed=2), 16, 1)) != epochs[1]

    def test_neither_rows_nor_steps_come_in_order_of_length_or_file(self):
        steps = epoch_of(Batches(EXAMPLES, as_they_are), 16, 0)
        for values in (
            [len(step[0].ids) for step in steps],
            [np.mean(numbers) for numbers in rows_of(steps)],
        ):
            assert abs(np.corrcoef(values, np.arange(len(values)))[0, 1]) < 0.25

    def test_any_step_is_found_by_its_number(self):
        """Resuming at step k gives the same steps as an uninterrupted run of 2.2 epochs."""
        batches = Batches(EXAMPLES[:1200], as_they_are, seed=3, total_bytes=1200 * 10_000)
        total = round(2.2 * batches.steps_per_epoch(7))
        whole = rows_of(batches.steps(7, 0, total))
        assert len(whole) == total
        for start in [*range(0, 40), 170, 171, 172, 173, 343, 344, total - 1, total]:
            assert rows_of(batches.steps(7, start, total)) == whole[start:], start
        assert rows_of(batches.steps(7, 29, 31)) == whole[29:31]

    def test_resuming_reads_no_earlier_window(self):
        read = []

        def encode(examples):
            read.extend(int(example.ids[0]) for example in examples)
            return as_they_are(examples)

        batches = Batches(EXAMPLES, encode)
        step = next(batches.steps(8, 200, 375))
        assert len(read) == 8 * WINDOW_STEPS and len(step) == 8

    def test_windows_of_long_rows_are_smaller(self):
        read = []

        def encode(examples):
            read.append(len(examples))
            return as_they_are(examples)

        for row_bytes, window in ((1, 1024), (10**4, 208), (10**9, 8)):
            batches = Batches(EXAMPLES[:1024], encode, total_bytes=1024 * row_bytes)
            next(batches.steps(8, 0, 128))
            assert read.pop() == window

    def test_rows_with_nothing_to_learn_leave_their_steps_smaller(self):
        def odd_ones(examples):
            kept = [example for example in examples if example.ids[0] % 2]
            return kept, EncodeReport(len(examples), num_dropped=len(examples) - len(kept))

        batches = Batches(EXAMPLES[:100], odd_ones)
        steps = epoch_of(batches, 8, 0)
        assert len(steps) == 13 and {len(step) for step in steps} == {3, 4}
        report = batches.take_report()
        assert (report.num_rows, report.num_dropped) == (100, 50)
        assert batches.take_report().num_rows == 0
        nothing = Batches(EXAMPLES[:9], lambda examples: ([], EncodeReport()))
        assert epoch_of(nothing, 8, 0) == [[], []]


class TestWorkers:
    @pytest.fixture
    def file(self, tmp_path):
        lines = [
            json.dumps({"instruction": f"q{n}", "output": "ab" * (n * 7 % 50 + 1)})
            for n in range(400)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines))
        return path

    def batches(self, path, num_workers, **options):
        rows = open_rows(path, **options)
        return batches_of_rows(rows, Letters(), 90, seed=5, num_workers=num_workers)

    def test_any_number_of_workers_gives_the_same(self, file):
        def ids_of(steps):
            return [[example.ids.tolist() for example in step] for step in steps]

        alone = self.batches(file, 0)
        expected = ids_of(alone.steps(3, 20, 300))
        report = alone.take_report()
        assert report.num_truncated and report.num_rows >= 400
        for num_workers in (1, 2, 3):
            torch.manual_seed(0)
            state = torch.get_rng_state()
            batches = self.batches(file, num_workers)
            assert ids_of(batches.steps(3, 20, 300)) == expected
            assert batches.take_report() == report
            assert torch.equal(torch.get_rng_state(), state)  # dropout draws from it

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_broken_row_is_named_in_one_line(self, file, num_workers, monkeypatch):
        monkeypatch.setattr("minisft.data.dataset.CHECKED_BYTES", 100)
        monkeypatch.setattr("minisft.data.dataset.CHECKED_ROWS", 10)
        lines = file.read_text().split("\n")
        lines[29], lines[31] = lines[29].replace("output", "outptu"), "{"
        file.write_text("\n".join(lines))
        monkeypatch.setattr("minisft.data.build_batches.SAMPLE_ROWS", 2)
        with pytest.raises(UserError) as caught:
            list(self.batches(file, num_workers).steps(3, 0, 200))
        message = str(caught.value)
        assert str(file) in message and "--skip_bad_rows" in message and "\n" not in message
        assert "row 30 (line 30): there is no answer" in message or "row 32 (line 32)" in message

        batches = self.batches(file, num_workers, skipped=[])
        steps = epoch_of(batches, 3, 0)
        report = batches.take_report()
        assert sum(map(len, steps)) == 398 and report.num_rows == 398
        assert sorted(message.split(": ")[0].split(", ")[1] for message in report.broken) == [
            "row 30 (line 30)",
            "row 32 (line 32)",
        ]
        assert "2 broken rows left out, the first" in str(report)

    # The second kind of worker starts only after its parent has ended.
    @pytest.mark.parametrize(
        "begins",
        [
            "",
            """
def begin():
    print(os.getpid(), flush=True)
    while os.getppid() == parent:
        time.sleep(0.01)

parent = os.getpid()
os.register_at_fork(after_in_child=begin)
""",
        ],
    )
    def test_workers_end_with_a_killed_parent(self, begins):
        """Also while they hold unread windows, and if the parent ends before they start."""
        program = (
            "import multiprocessing, os, signal, sys, time\n"
            "sys.path[:0] = ['.', 'tests', 'tests/data']\n"
            f"from test_batching import EXAMPLES, Batches, as_they_are\n{begins}\n"
            "batches = Batches(EXAMPLES, as_they_are, num_workers=2)\n"
            "steps = batches.steps(8, 0, 10**6); next(steps)\n"
            "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
            "signal.pause()"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE
        )
        workers = parent.stdout.readline().split()
        assert len(workers) == (1 if begins else 2) and all(map(running, workers))
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(map(running, workers)))

    def test_a_worker_can_be_sent_everything_it_needs(self, file, tiny_tokenizer_dir):
        """Everything is pickled, as on systems that do not fork."""
        template = get_template("chatml", Tokenizer.load(tiny_tokenizer_dir))
        batches = batches_of_rows(open_rows(file), template, 64)
        copy = pickle.loads(pickle.dumps(batches))
        for ours, theirs in zip(batches.steps(8, 3, 9), copy.steps(8, 3, 9), strict=True):
            assert [one.ids.tolist() for one in ours] == [one.ids.tolist() for one in theirs]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_a_step(world_size):
    rows = np.arange(23)
    parts = [micro_batches(rows, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(flat(batch for part in parts for batch in part)) == list(range(23))
    assert [micro_batches([], 4, rank, world_size) for rank in range(world_size)] == (
        [[[]]] * world_size
    )  # each has a supervised token for the backward pass


def test_little_padding_on_real_rows(shared_data):
    """alpaca_en_demo at batch size 8: fewer than 4 % of the tokens are padding."""
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "TinyLlama-1.1B-Chat-v0.6")
    rows = open_rows(shared_data / "instruct" / "alpaca_en_demo.json")
    batches = batches_of_rows(rows, get_template("alpaca", tokenizer), 2048)

    def padding(parts):
        shapes = [collate(part)[0].numel() for part in parts]
        return 1 - sum(len(one.ids) for one in flat(parts)) / sum(shapes)

    for rows_per_step in (8, 64):
        steps = epoch_of(batches, rows_per_step, 0)
        assert padding(flat(micro_batches(step, 8) for step in steps)) < 0.04
    in_file_order = first_examples(batches, 999)
    assert padding([in_file_order[at : at + 8] for at in range(0, 999, 8)]) > 0.2  # what is saved


def test_collate_pads_on_the_right():
    examples = [
        Example(np.array([1, 2, 3], np.int32), np.array([False, True, True])),
        Example(np.arange(9, dtype=np.int32), np.ones(9, bool)),
    ]
    tokens, supervised, _ = collate(examples)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert tokens[0, :3].tolist() == [1, 2, 3] and tokens[1, :9].tolist() == list(range(9))
    assert supervised.sum() == 11 and not supervised[0, 3:].any() and not supervised[1, 9:].any()
    assert collate([])[1].sum() == 0


class Letters:
    """A template and tokenizer of one token a letter."""

    add_bos_token, bos_token_id, eos_token_id = True, 0, 1
    facts = SimpleNamespace(changes_tools=lambda messages, tools: False)

    def begin(self, messages, tools=None):
        pass

    def encode(self, messages, tools=None):
        if isinstance(messages, str):
            return [ord(letter) for letter in messages]
        prompt, answer = (message["content"] for message in messages)
        ids = [ord(letter) for letter in prompt + answer] + [self.eos_token_id]
        return [TokenizedText(ids, [False] * len(prompt) + [True] * (len(answer) + 1))]


def conversation(prompt, answer):
    return Row([{"content": prompt}, {"content": answer}], source="f.json", index=6)


def test_long_rows_are_cut_and_counted():
    rows = [conversation("aa", "bb"), conversation("aa", "b" * 20), conversation("a" * 30, "b")]
    examples, report = encode_rows(rows, Letters(), cutoff_len=8)
    assert report == EncodeReport(num_rows=3, num_truncated=2, num_dropped=1, long_rows=[23, 32])
    assert str(report) == (
        "2 of 3 rows (67%) truncated, 1 of them dropped because no answer was left; "
        "--cutoff_len 32 keeps 95% of the rows whole"
    )
    report = encode_rows(rows[:2], Letters(), cutoff_len=8)[1]
    assert str(report) == "1 of 2 rows (50%) truncated; --cutoff_len 23 keeps 95% of the rows whole"
    assert encode_rows(rows, Letters(), cutoff_len=32)[1].num_truncated == 0
    assert examples[0].ids[-1] == Letters.eos_token_id
    assert examples[1].ids.tolist() == [97, 97] + [98] * 6  # a cut answer has no end


def test_ids_that_the_model_does_not_have():
    encode_rows([conversation("a", "b")], Letters(), 8, vocab_size=99)
    with pytest.raises(UserError, match=r"f\.json, row 7: the tokenizer gives id 98.* has 98;"):
        encode_rows([conversation("a", "b")], Letters(), 8, vocab_size=98)
    with pytest.raises(UserError, match="id 98"):
        encode_texts(["b"], Letters(), 8, vocab_size=98)


def test_the_first_examples_have_supervised_tokens(tmp_path):
    lines = [{"instruction": "a" * size, "output": "b"} for size in (9, 2, 9, 3, 1)]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    batches = batches_of_rows(open_rows(tmp_path / "rows.json"), Letters(), cutoff_len=6)
    assert [len(example.ids) for example in first_examples(batches, 2)] == [4, 5]
    assert len(first_examples(batches, 9)) == 3


def test_an_epoch_of_many_rows_counts_those_that_are_learned(tmp_path, monkeypatch):
    """Not all are encoded before training: the share of a part decides the number of steps."""
    monkeypatch.setattr(build_batches, "MAX_COUNTED", 200)
    lines = [
        {"instruction": chr(1000 + number), "output": "b"}
        | ({"instruction": "long question"} if number % 3 == 0 else {})
        for number in range(1000)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    batches = batches_of_rows(open_rows(tmp_path / "rows.json"), Letters(), cutoff_len=8)
    assert len(batches.rows) == 1000 and batches.num_examples == pytest.approx(666, rel=0.02)
    assert batches.num_examples != 666  # an estimate, not a count
    for epoch in range(2):
        steps = rows_of(epoch_of(batches, 16, epoch))
        assert len(steps) == -(-batches.num_examples // 16)
        assert sorted(flat(steps)) == [1000 + number for number in range(1000) if number % 3]
        assert {len(step) for step in steps} <= {15, 16, 17}


def test_nothing_to_learn(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "long question", "output": "a"}]))
    with pytest.raises(UserError, match="no training row .* after truncation; raise --cutoff_len"):
        batches_of_rows(open_rows(path), Letters(), cutoff_len=5)
    good, message = tmp_path / "good.json", "no evaluation row .* raise --cutoff_len"
    good.write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    batches = batches_of_rows(open_rows(good), Letters(), cutoff_len=5)
    with pytest.raises(UserError, match=message):
        held_out_examples(batches, open_rows(path), print)


def test_nothing_supervised(checkpoint, tmp_path):
    """No row was truncated, so no error advises a longer limit."""
    template = get_template("plain", Tokenizer.load(checkpoint))
    rows = {}
    for name, train in (("good", True), ("bad", False)):
        answer = {"role": "assistant", "content": "b", "train": train}
        messages = [{"role": "user", "content": "a"}, answer]
        rows[name] = tmp_path / f"{name}.json"
        rows[name].write_text(json.dumps([{"messages": messages}]))
    reason = "row is usable: 1 of 1 rows left out: none of their answers is supervised$"
    with pytest.raises(UserError, match=f"^no training {reason}"):
        batches_of_rows(open_rows(rows["bad"]), template, cutoff_len=50)
    batches = batches_of_rows(open_rows(rows["good"]), template, cutoff_len=50)
    with pytest.raises(UserError, match=f"^no evaluation {reason}"):
        held_out_examples(batches, open_rows(rows["bad"]), print)


class TestTexts:
    def test_become_blocks(self):
        blocks, report = encode_texts(["abc", "de"], Letters(), block_size=4)
        assert [block.ids.tolist() for block in blocks] == [[0, 97, 98, 99], [1, 0, 100, 101]]
        assert all(block.supervised.all() for block in blocks) and report.num_rows == 2
        assert encode_texts([], Letters(), block_size=4)[0] == []

    def test_packed_blocks_know_where_their_texts_end(self):
        blocks, _ = encode_texts(["abc", "de", "", "f"], Letters(), block_size=6, packing=True)
        assert [block.ids.tolist() for block in blocks] == [
            [0, 97, 98, 99, 1, 0],
            [100, 101, 1, 0, 1, 0],
            [102, 1],
        ]
        assert [block.lengths for block in blocks] == [[5, 1], [3, 2, 1], [2]]
        *_, lengths = pack(blocks[:2])
        assert lengths == [5, 1, 3, 2, 1]

    def texts(self, tmp_path, count):
        generator = np.random.default_rng(0)
        path = tmp_path / f"{count}.txt"
        path.write_text(
            "\n".join(
                f"{number:05d}" + "x" * int(length)
                for number, length in enumerate(generator.exponential(60, count))
            )
        )
        return open_rows(path, plain_text=True)

    def test_short_text_has_exactly_its_blocks(self, tmp_path):
        texts = self.texts(tmp_path, 10)
        batches = batches_of_texts(texts, Letters(), block_size=16)
        tokens = sum(len(text) + 2 for text in texts)
        assert batches.num_examples == -(-tokens // 16)
        steps = epoch_of(batches, 4, 0)
        assert len(steps) == -(-batches.num_examples // 4)
        assert sum(len(block.ids) for block in flat(steps)) >= tokens - 1

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_long_text_comes_whole_in_every_epoch_and_from_any_step(
        self, tmp_path, monkeypatch, num_workers
    ):
        monkeypatch.setattr("minisft.data.build_batches.SAMPLE_BYTES", 5000)
        texts = self.texts(tmp_path, 6000)
        batches = batches_of_texts(texts, Letters(), 32, num_workers=num_workers)
        tokens = sum(len(text) + 2 for text in texts)
        assert batches.num_examples == pytest.approx(tokens / 32, rel=0.1)
        per_epoch = batches.steps_per_epoch(8)
        assert per_epoch > 3 * WINDOW_STEPS
        steps = list(batches.steps(8, 0, 2 * per_epoch))
        for epoch in (steps[:per_epoch], steps[per_epoch:]):
            ids = flat(block.ids.tolist() for block in flat(epoch))
            # The last block of a window may have one token, which is never a target.
            assert tokens - 10 <= len(ids) <= tokens
            assert 5990 <= sum(one == Letters.eos_token_id for one in ids) <= 6000
            sizes = [len(step) for step in epoch]
            assert min(sizes) >= 5 and max(sizes) <= 12 and np.mean(sizes) == pytest.approx(8, 0.1)
            firsts = [block.ids.tolist() for block in flat(epoch)]
            assert len({tuple(one) for one in firsts}) > 1000
        for start in (1, WINDOW_STEPS + 5, per_epoch - 1, per_epoch + 2):
            again = batches.steps(8, start, start + 3)
            for ours, theirs in zip(again, steps[start : start + 3], strict=True):
                assert [b.ids.tolist() for b in ours] == [b.ids.tolist() for b in theirs]

    def test_neighbours_in_the_file_stay_neighbours(self, tmp_path):
        batches = batches_of_texts(self.texts(tmp_path, 3000), Letters(), 256)
        followed = []
        for block in flat(epoch_of(batches, 8, 0)):
            numbers = "".join(map(chr, block.ids)).split(chr(Letters.eos_token_id))[1:-1]
            numbers = [int(text[1:6]) for text in numbers]
            followed += [
                later == earlier + 1 for earlier, later in zip(numbers, numbers[1:], strict=False)
            ]
        assert np.mean(followed) > 0.7

    @pytest.mark.parametrize("lengths", [[40_000] * 12, [90_000], [100_000, *[500] * 200]])
    def test_every_step_has_blocks_however_long_a_text_is(self, tmp_path, lengths):
        """A run of texts is not divided: a window without one would be steps that learn nothing."""
        path = tmp_path / "long.txt"
        path.write_text("\n".join("x" * length for length in lengths))
        batches = batches_of_texts(open_rows(path, plain_text=True), Letters(), 16)
        per_epoch = batches.steps_per_epoch(2)
        sizes = [len(step) for step in batches.steps(2, 0, per_epoch)]
        assert len(sizes) == per_epoch > 20 * WINDOW_STEPS
        assert sum(sizes) == pytest.approx(2 * per_epoch, rel=0.01)
        assert min(sizes) >= 1 and max(sizes) <= 4

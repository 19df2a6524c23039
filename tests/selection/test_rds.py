"""RDS+, facility location and balanced random choice, each against its definition."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from test_ifd import CHAT, Urn, rows_of, run

import score as script
from minisft.common.errors import UserError
from minisft.selection import strategies
from minisft.selection.facility_location import facility_location
from minisft.selection.ifd import IfdScorer
from minisft.selection.rds import nearest_to_targets, similarity_to_targets
from minisft.text.template_choice import get_template
from minisft.text.tokenizer import Tokenizer


def test_weighted_pooling_by_hand(tiny_tokenizer_dir):
    """Weight t / (1 + ... + T) over prompt and answer; the same with and without the losses."""
    template = get_template("alpaca", Tokenizer.load(tiny_tokenizer_dir))
    (row,) = rows_of(CHAT)
    ids = template.encode(row.messages)[0].ids[:-1]  # without the end-of-turn token
    # The states of this model count the tokens so far.
    states = np.cumsum(np.eye(300)[ids], 0)
    weights = np.arange(1, len(ids) + 1)
    expected = (weights[:, None] * states).sum(0) / weights.sum()
    scores = [run_weighted(template, row, parts) for parts in (("embed",), ("ifd", "embed"))]
    for score in scores:
        np.testing.assert_allclose(score.embedding, expected, rtol=1e-5)
    mean = run(Urn(300), rows_of(CHAT), template)[0]
    assert {score.perplexity for score in scores} == {mean.perplexity}  # of the prompt
    assert scores[1].record == mean.record
    # A row that is too long is embedded up to cutoff_len.
    ids, weights = ids[:50], weights[:50]
    short = (weights[:, None] * states[:50]).sum(0) / weights.sum()
    cut = run_weighted(template, row, ("embed",), cutoff_len=50)
    np.testing.assert_allclose(cut.embedding, short, rtol=1e-5)


def run_weighted(template, row, parts, cutoff_len=400):
    scorer = IfdScorer(template, cutoff_len, None, parts, "weighted")
    plan = scorer.plan(0, row)
    return scorer.score(plan, scorer.compute(Urn(300), plan.passes))


def by_their_code(vectors, targets, number):
    """RDS+ as its authors describe it: unit vectors, products, each target its best, in turn."""
    unit = torch.nn.functional.normalize(torch.tensor(vectors), dim=1)
    similar = torch.nn.functional.normalize(torch.tensor(targets), dim=1) @ unit.T
    orders, chosen = similar.argsort(1, descending=True).tolist(), []
    while len(chosen) < number:
        order = orders[len(chosen) % len(orders)]
        while order[0] in chosen:
            order.pop(0)
        chosen.append(order.pop(0))
    return chosen


@pytest.mark.parametrize("num_rows", [40, 1300])
def test_each_target_picks_its_nearest_row_in_turn(num_rows):
    generator = np.random.default_rng(0)
    points = (generator.standard_normal((num_rows + 5, 8)) + 1).astype(np.float32)
    targets = (generator.standard_normal((3, 8)) + 1).astype(np.float32)
    rows = np.arange(5, num_rows + 5)
    similarities = similarity_to_targets(points, rows, [targets])
    for number in (1, 7, 40):
        chosen = nearest_to_targets(similarities, rows, number)
        assert (chosen - 5).tolist() == by_their_code(points[rows], targets, number)
    with pytest.raises(UserError, match="cannot choose"):
        nearest_to_targets(similarities, rows, num_rows + 1)


def test_tasks_take_turns():
    """The size of a task does not count: its nearest target row does."""
    east, north, west = np.eye(2, dtype=np.float32)[0], np.eye(2, dtype=np.float32)[1], [-1.0, 0.0]
    points = np.array([east + 0.1 * n * north for n in range(4)] + [west] * 4, np.float32)
    points[4:, 1] = [0, 0.1, 0.2, 0.3]
    tasks = [np.array([east, east, north]), np.array([west], np.float32)]
    similarities = similarity_to_targets(points, np.arange(8), tasks)
    assert similarities.shape == (2, 8)
    assert nearest_to_targets(similarities, np.arange(8), 4).tolist() == [0, 4, 1, 5]
    alone = similarity_to_targets(points, np.arange(8), [np.concatenate(tasks)])
    assert alone.shape == (4, 8)  # as one task, each target row has a turn
    assert nearest_to_targets(alone, np.arange(8), 4).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(("num_rows", "number"), [(30, 30), (64, 9), (65, 30), (400, 80)])
def test_facility_location_is_the_exhaustive_greedy(num_rows, number):
    """Every choice has the highest gain of all rows; two that are each other's nearest may tie."""
    generator = np.random.default_rng(num_rows)
    points = (generator.standard_normal((num_rows + 5, 12)) + 1).astype(np.float32)
    rows = np.arange(5, num_rows + 5)
    chosen = facility_location(points, rows, number) - 5
    assert len(set(chosen)) == number
    unit = points[rows] / np.linalg.norm(points[rows], axis=1, keepdims=True)
    cosines, nearest = (unit @ unit.T).astype(np.float64), np.full(num_rows, -1.0)
    for row in chosen:
        gains = np.maximum(cosines - nearest, 0).sum(1)
        assert gains[row] == pytest.approx(gains.max(), abs=1e-5)
        nearest = np.maximum(nearest, cosines[row])
    same = facility_location(np.ones((70, 3), np.float32), np.arange(70), 70)
    assert sorted(same) == list(range(70))


def test_facility_location_takes_a_row_of_every_bundle():
    """Four directions with a few rows each, and one with nearly all: a row of each comes first."""
    generator = np.random.default_rng(0)
    bundles = np.repeat(np.arange(5), [200, 5, 5, 5, 5])
    points = 5 * np.eye(5)[bundles] + 0.1 * generator.standard_normal((220, 5))
    chosen = facility_location(points.astype(np.float32), np.arange(220), 5)
    assert sorted(bundles[chosen]) == list(range(5))


def test_balanced_takes_the_same_number_from_each_group():
    groups, rows = np.repeat([4, 7, 9], [100, 3, 50]), np.arange(1000, 1153)
    chosen = strategies.balanced(groups, rows, 43, np.random.default_rng(0))
    counts = np.unique(groups[chosen - 1000], return_counts=True)[1]
    assert counts.tolist() == [20, 3, 20] and len(set(chosen)) == 43
    extra = [
        np.bincount(groups[strategies.balanced(groups, rows, 4, np.random.default_rng(n)) - 1000])
        for n in range(60)
    ]
    # The row that does not divide evenly falls to each group sometimes.
    assert {tuple(one[[4, 7, 9]]) for one in extra} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    firsts = {strategies.balanced(groups, rows, 3, np.random.default_rng(n))[0] for n in range(60)}
    assert len(firsts) > 20  # and random within a group
    everything = strategies.balanced(groups, rows, 153, np.random.default_rng(0))
    assert sorted(everything) == rows.tolist()


@pytest.fixture(scope="module")
def embedded(shared_data, tmp_path_factory):
    """(rows, folder): 40 rows and 3 targets in pool.* and target.*, embedded by score.py."""
    folder = tmp_path_factory.mktemp("rds")
    content = (shared_data / "instruct/cherry_alpaca.json").read_text(encoding="utf-8")
    rows = [row for row in json.loads(content) if 5 < len(row["output"].split()) < 60][:43]
    for name, part in (("pool", rows[:40]), ("target", rows[40:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
        embed(shared_data, folder / f"{name}.json", folder / f"{name}.jsonl")
    return rows, folder


def embed(shared_data, dataset, output, pooling="weighted", template="alpaca"):
    script.main(
        script.parse_options(
            [
                *("--model_name_or_path", str(shared_data / "models/stories260K")),
                *("--dataset", str(dataset), "--template", template, "--mode", "embed"),
                *("--pooling", pooling, "--output", str(output), "--dtype", "float32"),
                *("--dataloader_num_workers", "0"),
            ]
        )
    )


def select_here(monkeypatch, *words):
    source = (ROOT / "select.py").read_text(encoding="utf-8")
    source = source.replace(
        "from minisft.common.script import run_script", "run_script = lambda main: main()"
    )
    monkeypatch.setattr(sys, "argv", ["select.py", *map(str, words)])
    exec(compile(source, "select.py", "exec"), {"__name__": "__main__"})


def test_rds_equals_transformers_end_to_end(embedded, shared_data, monkeypatch, tmp_path):
    """From files to rows: the vectors are those of transformers, and so is the choice."""
    rows, folder = embedded
    model_dir = shared_data / "models/stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    template = get_template("alpaca", Tokenizer.load(model_dir))
    vectors = []
    for row in rows:
        question = {"role": "user", "content": row["instruction"], "input": row["input"]}
        answer = {"role": "assistant", "content": row["output"]}
        ids = template.encode([question, answer])[0].ids[:-1]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        weights = torch.arange(1, len(ids) + 1) / sum(range(len(ids) + 1))
        vectors.append((weights[:, None] * states).sum(0).numpy())
    vectors = np.array(vectors)
    ours = np.concatenate(
        [np.load(folder / f"{name}.embeddings.npy") for name in ("pool", "target")]
    )
    np.testing.assert_allclose(ours, vectors, rtol=1e-3, atol=1e-4)

    words = ["--dataset", folder / "pool.json", "--embeddings", folder / "pool.embeddings.npy"]
    words += ["--strategy", "rds", "--target", folder / "target.embeddings.npy"]
    output = tmp_path / "near.json"
    select_here(monkeypatch, *words, "--sample_number", 8, "--output", output)
    expected = sorted(by_their_code(vectors[:40], vectors[40:], 8))
    assert json.loads(output.read_text()) == [rows[n] for n in expected]
    manifest = json.loads((tmp_path / "near.json.manifest").read_text())
    assert set(manifest["inputs"]) == {"embeddings", "perplexity", "target 1"}


def test_targets_of_another_kind_are_refused(embedded, shared_data, monkeypatch, tmp_path):
    _, folder = embedded
    target = shutil.copy(folder / "target.json", tmp_path)
    output = tmp_path / "near.json"

    def refused(message, name, embeddings=folder / "pool.embeddings.npy"):
        words = ["--dataset", folder / "pool.json", "--embeddings", embeddings]
        words += ["--strategy", "rds", "--target", tmp_path / name, "--sample_rate", 0.1]
        with pytest.raises(UserError, match=message):
            select_here(monkeypatch, *words, "--output", output)
        assert not output.exists()

    embed(shared_data, target, tmp_path / "mean.jsonl", pooling="mean")
    refused("mean.embeddings.npy holds means of the prompts", "mean.embeddings.npy")
    embed(shared_data, target, tmp_path / "plain.jsonl", template="plain")
    refused("was computed with another template", "plain.embeddings.npy")
    refused("no .*nothing.embeddings.npy. score.py writes it", "nothing.embeddings.npy")
    # Embeddings of one pooling are not continued with the other.
    with pytest.raises(UserError, match="was computed with --pooling mean"):
        embed(shared_data, target, tmp_path / "mean.jsonl")

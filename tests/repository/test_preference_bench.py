"""bench/preference.py: train.py and trl learn the same pairs in the same order."""

import json

import numpy as np
import pytest

from bench import preference


def test_both_sides_learn_the_same(tiny_chat_model_dir, tmp_path, capsys):
    """The figures of the two sides on ragged pairs: losses of the steps, held-out pairs."""
    words, generator, rows = "the cat sat on a mat and rat".split(), np.random.default_rng(0), []
    for number in range(18):
        texts = [
            " ".join(generator.choice(words, int(generator.integers(2, 12)))) for _ in range(3)
        ]
        rows.append(
            {
                "conversations": [{"from": "human", "value": f"{number} {texts[0]}"}],
                "chosen": {"from": "gpt", "value": f"{texts[1]} yes"},
                "rejected": {"from": "gpt", "value": f"{texts[2]} no"},
            }
        )
    (tmp_path / preference.FILE_NAME).write_text(json.dumps(rows))
    results = preference.main(
        ["--data_dir", str(tmp_path), "--model_name_or_path", str(tiny_chat_model_dir)]
        + ["--num_held_out", "5", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
    )
    ours, theirs = results[preference.MINISFT], results[preference.TRL]
    assert len(ours["losses"]) == 3  # the learning rate of the first step is 0
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=0, atol=1e-3)
    for name in ("accuracy", "margin", "loss"):
        assert ours[name] == pytest.approx(theirs[name], abs=2e-3), name
    assert abs(ours["margin"]) > 0.005  # it learned
    assert "12 pairs in 3 steps, 5 held out; the largest difference" in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        preference.main(["--data_dir", str(tmp_path)])
    assert "there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "message"),
    [("0", "at least 1"), ("8", "has only 8 pairs")],
)
def test_pairs_that_cannot_be_held_out(number, message, tmp_path, capsys):
    (tmp_path / preference.FILE_NAME).write_text(json.dumps([{}] * 8))
    with pytest.raises(SystemExit):
        preference.main(["--data_dir", str(tmp_path), "--num_held_out", number])
    assert message in capsys.readouterr().err

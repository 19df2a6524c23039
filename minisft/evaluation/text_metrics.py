"""How near an answer is to a reference: BLEU-2, ROUGE-1, ROUGE-2, ROUGE-L, exact match.

    row_scores("the cat sat", "a cat sat")["rouge_l"]          # 0.667
    corpus_bleu2(["the cat sat"], ["a cat sat"])               # 0.577

By sacrebleu and rouge-score (requirements/eval.txt). Both split Chinese into characters.
rouge-score's own tokenizer keeps only a-z and 0-9, so this module provides another. Scores are
between 0 and 1.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from minisft.common.errors import UserError

# Ideographs and kana.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# Scripts without spaces between words: also Thai, Lao, Burmese and Khmer.
UNSPACED = CJK + "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"


class Splitter:
    """A tokenizer for rouge-score.

    A word is a letter of a script without spaces, or a run of letters and digits of another script.
    """

    def __init__(self) -> None:
        # \w lacks marks, such as the vowels of Hindi. They belong to the letter before them.
        every = map(chr, range(0x300, 0xFFFF))
        marks = "".join(one for one in every if unicodedata.category(one)[0] == "M")
        letter = rf"[^\W_{UNSPACED}]"
        self.words = re.compile(rf"(?=\w)[{UNSPACED}][{marks}]*|(?:{letter}[{marks}]*)+")

    def tokenize(self, text: str) -> list[str]:
        """The lower-case words of a text; Chinese by character."""
        return self.words.findall(text.lower())


@cache
def scorers() -> tuple[Any, Any, Any]:
    """(BLEU-2 of a corpus, BLEU-2 of single rows, ROUGE). UserError names what to install.

    The tokenizer `zh` of sacrebleu treats other scripts like its default tokenizer.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError(
            f"compare needs {error.name}, which is not installed: pip install -r "
            "requirements/eval.txt"
        ) from error
    bleu: dict[str, Any] = dict(max_ngram_order=2, tokenize="zh")
    return (
        BLEU(**bleu),
        BLEU(effective_order=True, **bleu),
        RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Splitter()),
    )


def row_scores(answer: str, reference: str) -> dict[str, float]:
    """The scores of a row: `bleu_2`, F of `rouge_1`, `rouge_2` and `rouge_l`, `exact_match`.

    White space around an answer does not count for an exact match.
    """
    _, bleu, rouge = scorers()
    scores = rouge.score(reference, answer)
    return {
        "bleu_2": bleu.sentence_score(answer, [reference]).score / 100,
        "rouge_1": scores["rouge1"].fmeasure,
        "rouge_2": scores["rouge2"].fmeasure,
        "rouge_l": scores["rougeL"].fmeasure,
        "exact_match": float(answer.strip() == reference.strip()),
    }


def corpus_bleu2(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-2 over all rows, which is not the mean over rows."""
    return scorers()[0].corpus_score(answers, [references]).score / 100

"""How near an answer is to a reference: BLEU-2, ROUGE-1/2/L, exact match.

    row_scores("the cat sat", "a cat sat")["rouge_l"]          # 0.667
    corpus_bleu2(["the cat sat"], ["a cat sat"])               # 0.577

Through sacrebleu and rouge-score (requirements-extras.txt). Both take Chinese apart by character;
rouge-score's own tokenizer drops everything but a-z and 0-9. All scores are from 0 to 1.
"""

import re
from functools import cache

from minisft.common.errors import UserError

# One ideograph (or kana) each, or a run of letters and digits of any other script.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
WORDS = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


class Splitter:
    """The words of a text, Chinese by character, as rouge-score wants its tokenizers."""

    def tokenize(self, text):
        """Lower-case words, in order."""
        return WORDS.findall(text.lower())


@cache
def scorers():
    """(a corpus BLEU-2, a BLEU-2 of single rows, a ROUGE scorer); UserError names what to install.

    BLEU: sacrebleu's `zh` tokenizer, which treats other scripts as its default does.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, which compare measures with: pip install "
            "-r requirements-extras.txt"
        ) from error
    bleu = dict(max_ngram_order=2, tokenize="zh")
    return (
        BLEU(**bleu),
        BLEU(effective_order=True, **bleu),
        RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Splitter()),
    )


def row_scores(answer, reference):
    """One row's scores: `bleu_2`, F-measures `rouge_1`, `rouge_2`, `rouge_l`, and `exact_match`."""
    _, bleu, rouge = scorers()
    found = rouge.score(reference, answer)
    return {
        "bleu_2": bleu.sentence_score(answer, [reference]).score / 100,
        "rouge_1": found["rouge1"].fmeasure,
        "rouge_2": found["rouge2"].fmeasure,
        "rouge_l": found["rougeL"].fmeasure,
        "exact_match": float(is_exact_match(answer, reference)),
    }


def is_exact_match(answer, reference):
    """Whether both are the same text but for white space around it."""
    return answer.strip() == reference.strip()


def corpus_bleu2(answers, references):
    """BLEU-2 of all rows together (which is not the mean over rows)."""
    return scorers()[0].corpus_score(answers, [references]).score / 100

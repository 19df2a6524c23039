"""Score many rows: ranks share them, worker processes read and plan them, passes run in batches.

    reader = RowReader(rows, IfdScorer(template, cutoff_len=512))
    for scores in score_rows(model, reader, numbers=np.arange(len(rows)), batch_tokens=1024):
        print(scores[0].record)

Rows are planned a window at a time, so memory does not grow with the data.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minisft.common import processes
from minisft.common.errors import UserError
from minisft.data.batching import PAD_MULTIPLE
from minisft.data.dataset import Row, Rows
from minisft.data.row_values import BadRow
from minisft.data.workers import read_ahead
from minisft.model.config import ModelConfig
from minisft.selection.ifd import IfdScorer
from minisft.selection.passes import Pass, Plan, Score, make_batches
from minisft.selection.reward_scores import RewardScorer
from minisft.selection.rows import read_row
from minisft.selection.shared_prefix import group_by_prefix
from minisft.text.tool_texts import TOOLS_AS_TEXT

# Rows whose passes are sorted by length and batched together.
WINDOW_ROWS = 1024

# Both scorers plan the passes of a row, compute batches of passes, and turn results into scores.
Scorer = IfdScorer | RewardScorer


TOOLS_SAMPLE = 128  # rows that are searched for tools


class RowReader:
    """`reader[numbers]`: the plans of these rows. Can be sent to a worker process.

    is_drawn: bool (rows,), False for rows that get no score. left_out: the reason.
    """

    def __init__(
        self,
        rows: Rows,
        scorer: Scorer,
        is_drawn: np.ndarray | None = None,
        left_out: str = "left out",
    ) -> None:
        self.rows, self.scorer, self.is_drawn, self.left_out = rows, scorer, is_drawn, left_out

    def __getitem__(self, numbers: np.ndarray) -> list[Plan] | UserError:
        try:
            return [self._plan(int(number)) for number in numbers]
        except UserError as error:
            # Raised by the main process, without the traceback of a worker.
            return UserError(str(error))

    def tools_note(self, numbers: np.ndarray) -> str | None:
        """A note for the user if some of the first rows have tools that become text."""
        sample = [self._read(int(number)) for number in numbers[:TOOLS_SAMPLE]]
        facts = self.scorer.template.facts
        changed = sum(
            facts.changes_tools(row.messages, row.tools)
            for row in sample
            if not isinstance(row, BadRow)
        )
        return (
            f"{changed} of the first {len(sample)} rows have {TOOLS_AS_TEXT}" if changed else None
        )

    def _plan(self, number: int) -> Plan:
        row = self._read(number)
        if isinstance(row, BadRow):
            return Plan(number, reason=f"broken: {row}")
        if not self._is_drawn(number):
            return Plan(number, reason=self.left_out)
        return self.scorer.plan(number, row)

    def _read(self, number: int) -> Row | BadRow:
        return read_row(self.rows, number, self._is_drawn(number))

    def _is_drawn(self, number: int) -> bool:
        return self.is_drawn is None or bool(self.is_drawn[number])


def score_rows(
    model: Any, reader: RowReader, numbers: np.ndarray, batch_tokens: int, num_workers: int = 0
) -> Iterator[list[Score]]:
    """Yield the scores of these rows as they are finished, those of all ranks in one list.

    numbers: the rows to score, perhaps only those that an interrupted run has left. All rows decide
    how rows are batched, because a low precision rounds differently in another batch: a continued
    run has the batches, and so the scores, of an undisturbed one. Every rank scores a share of the
    rows. model: a CausalLM for IfdScorer, a RewardModel for RewardScorer. batch_tokens: limit of a
    batch, padding included.
    """
    own_scores = _score_own_rows(model, reader, numbers, batch_tokens, num_workers)
    while True:
        parts = processes.all_gather(next(own_scores, None))
        if all(part is None for part in parts):
            return
        yield [score for part in parts for score in part or []]


def _score_own_rows(
    model: Any, reader: RowReader, numbers: np.ndarray, batch_tokens: int, num_workers: int
) -> Iterator[list[Score]]:
    is_wanted = np.zeros(len(reader.rows), bool)
    is_wanted[numbers] = True
    own_rows = np.arange(len(reader.rows))[processes.rank() :: processes.world_size()]
    windows = [
        own_rows[start : start + WINDOW_ROWS] for start in range(0, len(own_rows), WINDOW_ROWS)
    ]
    windows = [window for window in windows if is_wanted[window].any()]
    for plans in read_ahead(reader, windows, num_workers):
        if isinstance(plans, UserError):
            raise plans
        for scores in _score_window(model, reader.scorer, plans, batch_tokens, is_wanted):
            yield [score for score in scores if is_wanted[score.index]]


def _score_window(
    model: Any, scorer: Scorer, plans: list[Plan], batch_tokens: int, is_wanted: np.ndarray
) -> Iterator[list[Score]]:
    """Yield the rows without passes, then after every batch the rows that it completed.

    is_wanted: bool (rows,). Batches without a wanted row are not computed.
    """
    yield [scorer.score(plan, []) for plan in plans if not plan.passes]
    plan_of = {item: plan for plan in plans for item in plan.passes}
    results: dict[Pass, Any] = {}
    groups = group_by_prefix(list(plan_of))
    batches = [batch for group in groups for batch in make_batches(group, batch_tokens)]
    # By length, not group by group: rows are then finished, and saved, from the beginning.
    for batch in sorted(batches, key=lambda batch: len(batch[-1].ids)):
        if not any(is_wanted[plan_of[item].index] for item in batch):
            continue
        results.update(zip(batch, scorer.compute(model, batch), strict=True))
        finished = []
        for plan in dict.fromkeys(plan_of[item] for item in batch):
            if all(item in results for item in plan.passes):
                finished.append(scorer.score(plan, [results.pop(item) for item in plan.passes]))
        yield finished


def max_row_length(config: ModelConfig) -> int:
    """The most tokens that a row may have.

    With dynamic rotary scaling, beyond the trained positions the angles depend on the longest row
    of the batch, padding included. The score of such a row would depend on its batch.
    """
    if config.has_dynamic_rope:
        return config.max_position_embeddings // PAD_MULTIPLE * PAD_MULTIPLE
    return config.context_length

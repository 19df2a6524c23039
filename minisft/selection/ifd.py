"""Instruction-Following Difficulty (IFD): how much does the instruction help to predict the answer?

    IFD = s(A|Q) / s(A)                                           (arXiv 2308.12032)
    s(A|Q)  mean of -log p(token) over the answer's tokens, given the prompt
    s(A)    the same, given only the marker, which opens an answer, such as "### Response:"

    scorer = IfdScorer(template)
    plan = scorer.plan(0, row)                     # the passes: conditioned, then direct
    results = scorer.compute(model, plan.passes)   # as one batch
    scorer.score(plan, results).record["ifd"]

Above 1 the instruction does not help. The highest IFD below 1 should mark the rows that teach most.
`ifd_ppl` is the ratio of the perplexities instead, exp(s(A|Q)) / exp(s(A)) (arXiv 2402.00530).

A conversation has several answers. Conditioned passes score each given its history; each has its
own direct pass; s is the mean over all their tokens. End-of-turn tokens do not count.

The embedding of a row is a mean of the last hidden states h_t, from the conditioned pass too:
pooling "mean"      over the prompt of its last answer, for clustering; the model has not seen the
                    answer there
pooling "weighted"  over prompt and answer, for RDS+: h_t has the weight t / (1 + ... + T), since
                    later states have seen more of the row (arXiv 2503.01807, SGPT 2202.08904)

The tour explains it: docs/tour/11_select.md.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minisft.common.devices import in_float64, send
from minisft.common.errors import UserError
from minisft.data.batching import collate
from minisft.data.dataset import Row
from minisft.data.encoding import Example, encode_row
from minisft.model.decoder import CausalLM
from minisft.model.loss import target_places, token_losses
from minisft.selection.passes import Pass, Plan, Score, answer_spans, num_tokens, rounded, too_long
from minisft.selection.score_files import IFD_FIELDS
from minisft.selection.shared_prefix import hidden_states
from minisft.text.chat_template import ChatTemplate


@dataclass
class PassResult:
    """Sums of -log p(token) over the answer and the prompt. embedding: (D,)."""

    answer_loss: float
    prompt_loss: float
    embedding: np.ndarray


class IfdScorer:
    """Scores rows by IFD, embeds them, or both. `parts` holds "ifd", "embed" or both.

    A row of more than `cutoff_len` tokens gets no IFD: a truncated answer has another loss.
    pooling: "mean" or "weighted", see above.
    """

    def __init__(
        self,
        template: ChatTemplate,
        cutoff_len: int = 512,
        vocab_size: int | None = None,
        parts: Collection[str] = ("ifd",),
        pooling: str = "mean",
    ) -> None:
        self.template, self.cutoff_len, self.vocab_size = template, cutoff_len, vocab_size
        self.parts, self.pooling, self.marker = parts, pooling, template.encode_marker()
        if "ifd" in parts and not self.marker:
            # Nothing predicts the first token of a sequence, so an answer needs a marker before it.
            raise UserError(
                f"template {template.name}: the text that opens an answer has no tokens in this "
                "tokenizer, so IFD is not defined. Choose another --template."
            )

    def plan(self, index: int, row: Row) -> Plan:
        """The passes of a row: the conditioned ones, then a direct one for each answer."""
        texts = encode_row(row, self.template, self.cutoff_len, self.vocab_size)
        if not texts:
            return Plan(index, reason="none of its answers is supervised")
        answers = [answer_spans(self.template, text.ids, text.supervised) for text in texts]
        longest = max(texts, key=lambda text: len(text.ids))
        reason = too_long(longest.ids, self.cutoff_len)
        plan = Plan(index, sum(map(num_tokens, answers)), reason, len(longest.ids))
        if plan.num_answer_tokens == 0:
            plan.reason = plan.reason or "the answer has no tokens"
        last_ids, (last_start, last_end) = texts[-1].ids, answers[-1][-1]
        prompt_length = embedded_length = 0
        if "embed" in self.parts:
            prompt_length = min(last_start, self.cutoff_len)
            embedded_length = min(last_end, self.cutoff_len)
            if self.pooling == "mean":
                embedded_length = prompt_length
        if "ifd" not in self.parts:
            # A long row is embedded all the same: only a truncated embedding needs a remark.
            end = last_start if self.pooling == "mean" else last_end
            plan.reason = too_long(last_ids[:end], self.cutoff_len)
        if "ifd" in self.parts and not plan.reason:
            plan.num_conditioned = len(texts)
            for text, spans in zip(texts, answers, strict=True):
                end = spans[-1][1]
                plan.passes.append(Pass(text.ids[:end], is_inside(spans, end)))
            plan.passes[-1].prompt_length = prompt_length
            plan.passes[-1].embedded_length = embedded_length
            for text, spans in zip(texts, answers, strict=True):
                for start, end in spans:
                    direct = np.array([*self.marker, *text.ids[start:end]], np.int32)
                    plan.passes.append(Pass(direct, np.arange(len(direct)) >= len(self.marker)))
        elif embedded_length > 0:
            ids, no_answer = last_ids[:embedded_length], np.zeros(embedded_length, bool)
            plan.passes.append(Pass(ids, no_answer, prompt_length, embedded_length))
        return plan

    @torch.inference_mode()
    def compute(self, model: CausalLM, passes: Sequence[Pass]) -> list[PassResult]:
        """Run a batch of passes. Logits are computed only where the next token's loss counts."""
        device = next(model.parameters()).device
        examples = [Example(item.ids, item.is_answer) for item in passes]
        tokens, is_answer, *_ = collate(examples)  # both (B, T), on the CPU
        lengths = torch.tensor([(item.prompt_length, item.embedded_length) for item in passes])
        places = torch.arange(1, tokens.shape[1] + 1)  # (T,)
        is_prompt, is_embedded = (places <= ends[:, None] for ends in lengths.T)  # both (B, T)

        hidden = hidden_states(model, tokens)  # (B, T, D)
        counts = target_places(is_answer | is_prompt)  # (N,)
        states = hidden.flatten(0, 1)[send(counts - 1, device)]  # the state before each token
        values = token_losses(model.logits, states, send(tokens.flatten()[counts], device))
        weights = (is_embedded * places if self.pooling == "weighted" else is_embedded).float()
        weights = send(weights, device)
        sums = (weights[:, None] @ hidden.float()).squeeze(1)  # (B, D)
        embeddings = sums / weights.sum(1).clamp(min=1)[:, None]
        # All results in one copy: each would wait for the GPU.
        values, embeddings = (
            torch.cat((values, embeddings.flatten())).cpu().split((len(values), embeddings.numel()))
        )
        embeddings = embeddings.view(len(passes), -1).numpy()
        losses = torch.zeros(is_answer.numel()).index_copy_(0, counts, values).view_as(is_answer)
        answer_losses = in_float64(losses * is_answer).sum(1)
        prompt_losses = in_float64(losses * is_prompt).sum(1)

        results = zip(answer_losses.tolist(), prompt_losses.tolist(), embeddings, strict=True)
        return [PassResult(*result) for result in results]

    def score(self, plan: Plan, results: Sequence[PassResult]) -> Score:
        """IFD and embedding of a row, from the results of the passes of its plan."""
        record: dict[str, Any] = {"index": plan.index, **dict.fromkeys(IFD_FIELDS)}
        record |= {"num_answer_tokens": plan.num_answer_tokens, "num_tokens": plan.num_tokens}
        record["reason"] = plan.reason
        score = Score(plan.index, record)
        if "ifd" in self.parts and not plan.reason:
            losses = [result.answer_loss / plan.num_answer_tokens for result in results]
            conditioned, direct = losses[: plan.num_conditioned], losses[plan.num_conditioned :]
            score.record |= ifd_fields(sum(conditioned), sum(direct))
        for item, result in zip(plan.passes, results, strict=True):
            if item.embedded_length:
                score.embedding = result.embedding
            if item.prompt_length > 1:
                score.perplexity = exp_or_inf(result.prompt_loss / (item.prompt_length - 1))
        return score


def is_inside(spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    """Bool (length,), True inside of the spans."""
    inside = np.zeros(length, bool)
    for start, end in spans:
        inside[start:end] = True
    return inside


def ifd_fields(conditioned: float, direct: float) -> dict[str, Any]:
    """The fields of a record from s(A|Q) and s(A), in nats per token."""
    if not math.isfinite(conditioned + direct):
        return {"reason": "the loss is not a finite number"}
    fields: dict[str, Any] = {
        "loss_conditioned": rounded(conditioned),
        "loss_direct": rounded(direct),
    }
    if direct == 0:
        return fields | {"reason": "the loss without the instruction is zero"}
    fields["ifd"] = rounded(conditioned / direct)
    ratio = exp_or_inf(conditioned - direct)
    fields["ifd_ppl"] = rounded(ratio) if math.isfinite(ratio) else None  # JSON has no infinity
    return fields


def exp_or_inf(value: float) -> float:
    """exp(value); infinity beyond float32, and for NaN."""
    return math.exp(value) if value < 88 else math.inf

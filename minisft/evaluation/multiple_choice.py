"""Questions with four options: which letter does the model find most likely behind the prompt?

    prompts = Prompts(BENCHMARKS["ceval"], assistant.tokenizer, template=None, max_length=2048)
    rows = answer_subject(assistant.model, prompts, subject, num_fewshot=5)
    accuracy = sum(row["prediction"] == row["answer"] for row in rows) / len(rows)

A letter's tokens are those that the tokenizer gives it in its place, behind the prompt: Llama 2
has one `A` for the middle of a line and another for its beginning. What the prompts of a subject
share (heading and demonstrations) goes through the model once; then questions follow one another
in one row of tokens, each at the positions it would have alone, and each sees the shared part and
itself. So nothing is padded and nothing copied.
"""

import random
from dataclasses import dataclass

import torch

from minisft.common.errors import UserError
from minisft.evaluation.benchmarks import LETTERS
from minisft.model.cache import KeyValueCache
from minisft.text.tokenizer import check_vocabulary


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of each option as it continues it."""

    ids: list
    options: list  # of lists of ids, in the order of LETTERS
    num_fewshot: int  # the demonstrations that found room
    is_cut: bool = False  # whether the question itself had none and lost its beginning


class Prompts:
    """Makes prompts of questions: as plain text, or as the turns of a chat template.

    With a template every demonstration is a turn of the user and one of the assistant.
    """

    def __init__(self, benchmark, tokenizer, template=None, max_length=2048):
        self.benchmark, self.tokenizer = benchmark, tokenizer
        self.template, self.max_length = template, max_length

    def prompt(self, subject, demonstrations, question):
        """The Prompt with as many demonstrations, from the first on, as there is room for."""
        for count in range(len(demonstrations), -1, -1):
            ids, options = self._encode(subject, demonstrations[:count], question)
            # The last token of an option is only predicted, never read.
            room = self.max_length - max(map(len, options)) + 1
            if len(ids) <= room:
                return Prompt(ids, options, count)
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return Prompt(begin + ids[len(ids) - room + len(begin) :], options, 0, is_cut=True)

    def _encode(self, subject, demonstrations, question):
        """(ids of the prompt, ids of every option): where the whole texts begin to differ.

        What the texts have in common behind the letter, such as a template's end of turn, is left
        out: it says nothing about the letter.
        """
        wholes = [self._ids(subject, demonstrations, question, letter) for letter in LETTERS]
        start = shared_length([self._ids(subject, demonstrations, question, None), *wholes])
        rests = [ids[start:] for ids in wholes]
        end = shared_length([ids[::-1] for ids in rests])
        options = [ids[: len(ids) - end] for ids in rests]
        if not all(options) or len(set(map(tuple, options))) < len(options):
            raise UserError(
                "the tokenizer does not tell the letters A, B, C and D apart, so no "
                "model with it can answer; is it the tokenizer of this checkpoint?"
            )
        return wholes[0][:start], options

    def _ids(self, subject, demonstrations, question, letter):
        """Ids of the whole text, up to where the letter is to come if that is None."""
        heading = self.benchmark.heading.format(subject=subject.name)
        shown = [(one.asked(self.benchmark), one.answer) for one in demonstrations]
        shown += [(question.asked(self.benchmark), letter)]
        if self.template is None:
            text = heading + "\n\n".join(
                asked + (self.benchmark.letter.format(letter=answer) if answer else "")
                for asked, answer in shown
            )
            begin = [self.tokenizer.bos_token_id] if self.tokenizer.add_bos_token else []
            return begin + self.tokenizer.encode(text)
        messages = []
        for asked, answer in shown:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        messages[0]["content"] = heading + messages[0]["content"]
        if letter is None:
            return self.template.encode_prompt(messages[:-1])
        return self.template.encode(messages)[0]


def shared_length(sequences):
    """How many items at the beginning are the same in all the lists."""
    # The least and the greatest in the order of lists differ first.
    low, high = min(sequences), max(sequences)
    for index, (one, other) in enumerate(zip(low, high, strict=False)):
        if one != other:
            return index
    return len(low)


def choose_demonstrations(subject, num_fewshot, run=0, seed=0):
    """The demonstrations of a repetition: the first ones for run 0, else others or reordered."""
    if run == 0:
        return subject.demonstrations[:num_fewshot]
    generator = random.Random(f"{seed} {run} {subject.key}")
    count = min(num_fewshot, len(subject.demonstrations))
    return generator.sample(subject.demonstrations, count)


def answer_subject(
    model, prompts, subject, num_fewshot, run=0, seed=0, batch_size=8, advance=lambda count: None
):
    """A dict for every question of the subject: what was predicted, and every log-likelihood.

    batch_size: questions that go through the model together. advance(number of questions) is
    called as they are answered.
    """
    demonstrations = choose_demonstrations(subject, num_fewshot, run, seed)
    made = [prompts.prompt(subject, demonstrations, one) for one in subject.questions]
    for question, prompt in zip(subject.questions, made, strict=True):
        try:
            check_vocabulary(prompt.ids, model.config.vocab_size)
        except UserError as error:
            raise UserError(f"{subject.key}, question {question.id}: {error}") from error
    scores = log_likelihoods(model, made, batch_size, advance)
    return [_row(*one, run) for one in zip(subject.questions, made, scores, strict=True)]


def _row(question, prompt, scores, run):
    best = max(range(len(LETTERS)), key=scores.__getitem__)
    return {
        "run": run,
        "id": question.id,
        "answer": question.answer,
        "prediction": LETTERS[best],
        **dict(zip(LETTERS, scores, strict=True)),
        "num_fewshot": prompt.num_fewshot,
        "is_cut": prompt.is_cut,
    }


@torch.inference_mode()
def log_likelihoods(model, prompts, batch_size=8, advance=lambda count: None):
    """log P(option | prompt) of every option of every Prompt, as a list of lists.

    Natural logarithms, summed over the tokens of an option.
    """
    scores = [None] * len(prompts)
    # Those with as many demonstrations share the most, those that were cut nothing.
    kinds = {(prompt.num_fewshot, prompt.is_cut) for prompt in prompts}
    for kind in sorted(kinds):
        places = [
            place
            for place, prompt in enumerate(prompts)
            if (prompt.num_fewshot, prompt.is_cut) == kind
        ]
        group = [prompts[place] for place in places]
        for place, found in zip(places, _of_group(model, group, batch_size, advance), strict=True):
            scores[place] = found
    return scores


def _of_group(model, prompts, batch_size, advance):
    """log_likelihoods of Prompts, of which the shared beginning is computed once."""
    shared = min(
        shared_length([prompt.ids for prompt in prompts]),
        min(len(prompt.ids) for prompt in prompts) - 1,
    )
    cache = KeyValueCache(model.config)
    device = next(model.parameters()).device
    if shared:
        model(torch.tensor([prompts[0].ids[:shared]], device=device), cache=cache)
    longest = max(len(prompt.ids) - shared + len(prompt.options[0]) for prompt in prompts)
    window = model.config.sliding_window
    if window and shared + batch_size * longest > window:
        batch_size = 1  # a window counts tokens in the row; alone that is how far they are apart
    scores = [[0.0] * len(LETTERS) for _ in prompts]
    for segments in _in_batches(_segments(prompts, shared), batch_size):
        for segment, found in zip(segments, _of_row(model, segments, cache, device), strict=True):
            for option, value in zip(segment.options, found, strict=True):
                scores[segment.question][option] = value
        cache.truncate(shared)
        advance(sum(0 in segment.options for segment in segments))
    return scores


@dataclass
class _Segment:
    """What is read to score some options of a question: its ids behind the shared part."""

    question: int
    ids: list
    start: int  # the place in `ids` whose state predicts the first token of an option
    options: list  # the numbers of the options
    targets: list  # their ids


def _segments(prompts, shared):
    """Options that differ in their last token only are scored by one segment: usually all four."""
    for number, prompt in enumerate(prompts):
        by_inputs = {}
        for option, ids in enumerate(prompt.options):
            own = prompt.ids[shared:]
            segment = by_inputs.setdefault(
                tuple(ids[:-1]), _Segment(number, own + ids[:-1], len(own) - 1, [], [])
            )
            segment.options.append(option)
            segment.targets.append(ids)
        yield from by_inputs.values()


def _in_batches(segments, batch_size):
    segments = list(segments)
    for start in range(0, len(segments), batch_size):
        yield segments[start : start + batch_size]


def _of_row(model, segments, cache, device):
    """For every segment the log-likelihoods of its options: all segments in one row of tokens."""
    lengths = torch.tensor([len(segment.ids) for segment in segments], device=device)
    owner = torch.arange(len(segments), device=device).repeat_interleave(lengths)  # (T,)
    ends = lengths.cumsum(0)
    place = torch.arange(len(owner), device=device)
    positions = place - (ends - lengths)[owner] + cache.length
    # (T, S): the shared part, and what comes before in the same segment.
    itself = (owner[:, None] == owner) & (place[:, None] >= place)
    mask = torch.cat((itself.new_ones(len(owner), cache.length), itself), dim=1)
    tokens = torch.tensor([[id for segment in segments for id in segment.ids]], device=device)
    hidden = model(tokens, positions, mask, cache)[0]  # (T, D)

    rows, targets, counts = [], [], []
    for segment, first in zip(segments, (ends - lengths).tolist(), strict=True):
        for ids in segment.targets:
            rows += range(first + segment.start, first + segment.start + len(ids))
            targets += ids
            counts.append(len(ids))
    log_probs = model.logits(hidden[rows]).float().log_softmax(-1)
    found = log_probs.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0]
    if not found.isfinite().all():
        raise UserError(
            "the model's scores are not finite numbers: its weights are damaged, or "
            "too large for this type; try --dtype float32"
        )
    totals = iter([float(part.sum()) for part in found.cpu().split(counts)])
    return [[next(totals) for _ in segment.targets] for segment in segments]

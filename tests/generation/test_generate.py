"""generate.py against transformers (generate, logits processors) and a generator without cache."""

import json

import pytest
import torch
import transformers
from transformers import generation

from minisft.checkpoints.folders import load_model
from minisft.common.errors import UserError
from minisft.generation.generate import generate, stream
from minisft.generation.sampling import (
    Sampling,
    choose_tokens,
    distribution,
    penalize,
    random_generator,
)
from minisft.generation.scored import generate_scored
from minisft.model.cache import KeyValueCache

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.4,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
}
PROMPTS = [[5, 17, 0, 3], [8], [0, 0, 12, 44, 9, 31, 2, 60, 71, 5, 96], [1, 2, 3]]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A small random model of each family: (transformers', ours)."""
    name, extra = FAMILIES[request.param]
    torch.manual_seed(7)
    config = getattr(transformers, name)(**SIZES, **extra)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Noise on biases and norms, which start as zeros and ones and would hide errors.
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


@pytest.fixture(scope="module")
def stories(shared_data):
    return load_model(shared_data / "models/stories260K")


def transformers_generate(model, ids, stop_ids=(), **options):
    ids = torch.tensor([ids])
    # The mask is given, because transformers would take every id 0 of a prompt for padding.
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(stop_ids) or None,
        **options,
    )[0, ids.shape[1] :].tolist()
    return output[:-1] if output and output[-1] in stop_ids else output


@torch.inference_mode()
def generate_naive(model, prompt, sampling, stop_ids=(), row=0):
    """The answer to one prompt, computing the whole sequence again for every token."""
    ids, generator = list(prompt), random_generator(sampling.seed, row)
    while len(ids) < len(prompt) + sampling.max_new_tokens:
        logits = model.logits(model(torch.tensor([ids]))[:, -1])
        seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, torch.tensor([ids]), True)
        token = choose_tokens(logits, sampling, [generator], seen).item()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(pair, penalty):
    theirs, ours = pair
    sampling = Sampling(max_new_tokens=40, repetition_penalty=penalty, greedy=True)
    answers = generate(ours, PROMPTS, sampling)
    for ids, answer in zip(PROMPTS, answers, strict=True):
        expected = transformers_generate(theirs, ids, max_new_tokens=40, repetition_penalty=penalty)
        assert answer == expected
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


def test_dynamic_rotary_scaling_follows_the_length_of_each_row(tmp_path):
    """One prompt of the batch is longer than the trained context, and one grows beyond it."""
    torch.manual_seed(7)
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    sizes = SIZES | {"max_position_embeddings": 16, "rope_scaling": scaling}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    prompts = [[5, 17, 0, 3], PROMPTS[2] * 3, PROMPTS[2]]
    answers = generate(load_model(tmp_path), prompts, Sampling(max_new_tokens=10, greedy=True))
    expected = [transformers_generate(theirs, ids, max_new_tokens=10) for ids in prompts]
    assert answers == expected


def test_stop_ids_end_answers_as_in_transformers(pair):
    theirs, ours = pair
    sampling = Sampling(max_new_tokens=30, greedy=True)
    free = generate(ours, PROMPTS, sampling)
    stop_ids = {free[0][3], free[2][11]}
    answers = generate(ours, PROMPTS, sampling, stop_ids)
    expected = [transformers_generate(theirs, ids, stop_ids, max_new_tokens=30) for ids in PROMPTS]
    assert answers == expected
    assert len(answers[0]) <= 3 and not stop_ids & {token for one in answers for token in one}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24, greedy=True),
        Sampling(24, greedy=True, repetition_penalty=1.2),
        Sampling(24, temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=3),
    ],
    ids=["greedy", "penalty", "sampled"],
)
def test_padded_batch_equals_single_prompts_and_no_cache(pair, sampling):
    model = pair[1]
    stop_ids = {generate(model, PROMPTS, sampling)[1][6]}
    answers = generate(model, PROMPTS, sampling, stop_ids)
    for row, ids in enumerate(PROMPTS):
        alone = generate(model, [ids], sampling, stop_ids, rows=[row])
        assert answers[row] == alone[0] == generate_naive(model, ids, sampling, stop_ids, row)
    assert list(stream(model, PROMPTS[0], sampling, stop_ids)) == answers[0]
    assert len({len(answer) for answer in answers}) > 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(20, greedy=True),
        Sampling(20, temperature=1.5, seed=3, repetition_penalty=1.3),
    ],
    ids=["greedy", "sampled"],
)
def test_scores_are_mean_log_probabilities_of_the_chosen_tokens(pair, sampling):
    """The oracle is transformers' model on the sequence; limits truncate each row separately."""
    theirs, ours = pair
    stop_ids = {generate(ours, PROMPTS, sampling)[1][6]}
    unlimited = generate(ours, PROMPTS, sampling, stop_ids)
    limits = [5, 20, 1, 9]
    answers, scores = generate_scored(ours, PROMPTS, sampling, stop_ids, limits=limits)
    assert answers == [one[:limit] for one, limit in zip(unlimited, limits, strict=True)]
    assert len(unlimited[1]) < 20
    for ids, answer, limit, score in zip(PROMPTS, answers, limits, scores, strict=True):
        chosen = answer + (list(stop_ids) if len(answer) < limit else [])
        with torch.no_grad():
            logits = theirs(torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(chosen)[:, None]).mean()
        assert score == pytest.approx(expected.item(), abs=1e-4)


def test_published_story(stories, shared_data):
    published = json.loads((shared_data / "models/stories260K/greedy_256_ids.json").read_text())
    sampling = Sampling(max_new_tokens=256, greedy=True)
    bos = published[:1]
    assert bos + list(stream(stories, bos, sampling)) == published
    # Also in a batch with longer prompts, and continuing from the middle of the story.
    answers = generate(stories, [bos, published[:100], published[:50]], sampling)
    assert bos + answers[0] == published
    assert published[:100] + answers[1][:157] == published
    assert published[:50] + answers[2][:207] == published


def test_cached_prefix_gives_the_same_answer(pair):
    model = pair[1]
    sampling = Sampling(max_new_tokens=12, greedy=True)
    cache, first = KeyValueCache(model.config), PROMPTS[2]
    answer = list(stream(model, first, sampling, cache=cache))
    assert cache.length == len(first) + len(answer) - 1
    second = first + answer + [4, 4, 9]
    expected = generate(model, [second], sampling)[0]
    computed = count_tokens(model, lambda: list(stream(model, second, sampling, cache=cache)))
    assert computed[0] == expected
    assert computed[1][0] == (1, 4)
    cache.truncate(5)
    other = first[:5] + [33, 34]
    expected = generate(model, [other], sampling)[0]
    assert list(stream(model, other, sampling, cache=cache)) == expected


def count_tokens(model, action):
    """The result of action() and the (B, T) of every call of the model meanwhile."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, arguments: shapes.append(tuple(arguments[0].shape))
    )
    try:
        return action(), shapes
    finally:
        hook.remove()


def test_every_token_is_computed_once_and_ended_rows_leave_the_batch(pair):
    model, sampling = pair[1], Sampling(max_new_tokens=20, greedy=True)
    stop_ids = {generate(model, PROMPTS, sampling)[1][6]}
    answers, shapes = count_tokens(model, lambda: generate(model, PROMPTS, sampling, stop_ids))
    assert shapes[0] == (len(PROMPTS), max(map(len, PROMPTS)))
    for step, shape in enumerate(shapes[1:], start=1):
        assert shape == (sum(len(answer) >= step for answer in answers), 1)


def test_distribution_equals_transformers_processors():
    torch.manual_seed(0)
    logits, ids = torch.randn(6, 500) * 3, torch.randint(500, (6, 40))
    seen = torch.zeros(6, 500, dtype=torch.bool).scatter_(1, ids, True)
    for temperature, top_k, top_p, penalty in [
        (0.7, 0, 1.0, 1.0),
        (1.3, 30, 1.0, 1.0),
        (1.0, 0, 0.8, 1.0),
        (0.95, 50, 0.7, 1.2),
        (2.0, 1000, 0.95, 0.9),
        (1.0, 1, 0.5, 1.5),
    ]:
        scores = logits.clone()
        processors = [generation.TemperatureLogitsWarper(temperature)]
        if penalty != 1:
            processors.insert(0, generation.RepetitionPenaltyLogitsProcessor(penalty))
        if top_k:
            processors.append(generation.TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(generation.TopPLogitsWarper(top_p))
        for processor in processors:
            scores = processor(ids, scores)
        sampling = Sampling(1, temperature, top_k, top_p, penalty)
        ours = full_distribution(logits, seen, sampling)
        torch.testing.assert_close(ours, scores.softmax(-1), rtol=1e-5, atol=1e-7)
        assert ((ours > 0) == (scores.softmax(-1) > 0)).all()


def full_distribution(logits, seen, sampling):
    """The probabilities (B, V) that choose_tokens draws from."""
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    probabilities, candidates = distribution(logits, sampling)
    return torch.zeros_like(logits).scatter(1, candidates, probabilities)


def test_drawn_tokens_follow_the_distribution():
    draws, sampling = 20_000, Sampling(1, temperature=0.8, top_k=6, top_p=0.9)
    logits = torch.tensor([[2.0, -1.0, 1.5, 0.0, 3.0, 0.5, -9.0, 1.0]])
    expected = full_distribution(logits, None, sampling)[0]
    generators = [random_generator(1, row) for row in range(draws)]
    tokens = choose_tokens(logits.expand(draws, -1), sampling, generators)
    drawn = tokens.bincount(minlength=8) / draws
    assert (drawn[expected == 0] == 0).all()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=4 * (0.25 / draws) ** 0.5)


def test_seed_repeats_answers_and_rows_are_independent(pair):
    model = pair[1]
    sampling = Sampling(16, temperature=1.2, seed=5)
    answers = generate(model, [PROMPTS[0]] * 3, sampling)
    assert answers == generate(model, [PROMPTS[0]] * 3, sampling)
    assert len({tuple(answer) for answer in answers}) == 3
    assert answers != generate(model, [PROMPTS[0]] * 3, Sampling(16, temperature=1.2, seed=6))
    swapped = generate(model, [PROMPTS[2], PROMPTS[0]], sampling, rows=[7, 2])
    assert swapped[1] == answers[2]
    unseeded = Sampling(16, temperature=1.2)
    assert generate(model, PROMPTS, unseeded) != generate(model, PROMPTS, unseeded)


def test_temperature_zero_is_greedy(pair):
    cold, greedy = Sampling(8, temperature=0.0), Sampling(8, greedy=True)
    assert generate(pair[1], PROMPTS, cold) == generate(pair[1], PROMPTS, greedy)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
    ],
)
def test_sampling_value_out_of_range_names_the_flag(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} must be"):
        Sampling(**wrong)


def test_empty_prompts(pair):
    assert generate(pair[1], [], Sampling()) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(pair[1], [[3], []], Sampling())


@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(temperature=1.0, seed=1)])
def test_nan_logits_and_unknown_tokens_raise(pair, sampling):
    _, model = pair
    with pytest.raises(UserError, match="token 97 is outside"):
        generate(model, [[1], [97]], sampling)
    weight = model.model.norm.weight
    kept, weight.data = weight.data, torch.full_like(weight, float("nan"))
    try:
        with pytest.raises(UserError, match="not finite"):
            generate(model, [[1, 2]], sampling)
        cache = KeyValueCache(model.config)
        with pytest.raises(UserError, match="not finite"):
            list(stream(model, [1, 2], sampling, cache=cache))
        assert cache.length == 0  # such keys are not used again
    finally:
        weight.data = kept


def test_temperature_near_zero_is_greedy(pair):
    _, model = pair
    cold = Sampling(max_new_tokens=9, temperature=1e-42, top_k=0, top_p=1, seed=1)
    assert generate(model, PROMPTS, cold) == generate(model, PROMPTS, Sampling(9, greedy=True))

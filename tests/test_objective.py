"""The loss: equal to a plain computation, and its gradient independent of how a step is split."""

import pytest
import torch
import torch.nn.functional as F

from minisft import objective
from minisft.batching import collate, micro_batches, pack
from minisft.config import ModelConfig
from minisft.encoding import Example
from minisft.model import CausalLM
from minisft.objective import next_token_loss, token_losses

CONFIG = ModelConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)


def new_model():
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    model.initialize()
    return model


def ragged_examples(count, seed=0):
    """Rows of 3 to 40 tokens of which the last few are learned: counts differ much."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in torch.randint(3, 40, (count,), generator=generator).tolist():
        ids = torch.randint(0, 96, (length,), generator=generator).int().numpy()
        learned = int(torch.randint(1, length, (1,), generator=generator))
        examples.append(Example(ids, torch.arange(length).ge(length - learned).numpy()))
    return examples


def test_equals_masked_cross_entropy():
    """The loss, its gradient and the count of tokens."""
    model = new_model()
    tokens, supervised, _ = collate(ragged_examples(5))
    loss, count = next_token_loss(model, tokens, supervised)
    labels = torch.where(supervised, tokens, -100)
    logits = model.logits(model(tokens))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1),
                               ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert count == (labels[:, 1:] != -100).sum()
    trained = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, trained),
                               torch.autograd.grad(expected, trained), rtol=1e-5, atol=1e-5)


def step_gradients(examples, batch_size, frozen_head=False):
    model = new_model()
    model.lm_head.requires_grad_(not frozen_head)
    rows = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    total = sum(int(example.supervised[1:].sum()) for example in examples)
    for batch in micro_batches(torch.tensor(rows), batch_size):
        loss, _ = next_token_loss(model, *collate([examples[row] for row in batch]))
        (loss / total).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_does_not_depend_on_the_split():
    """8 x 1, 4 x 2, 1 x 8 and 3 x 3 on ragged rows: one step, one gradient."""
    examples = ragged_examples(8)
    expected = step_gradients(examples, 8)
    for batch_size in (4, 1, 3):
        actual = step_gradients(examples, batch_size)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


def test_mean_of_means_would_differ():
    """The rows above can tell the right normalisation from the common wrong one."""
    examples, model = ragged_examples(8), new_model()
    means = []
    for example in examples:
        loss, count = next_token_loss(model, *collate([example]))
        means.append(loss / count)
    loss, count = next_token_loss(model, *collate(examples))
    assert abs(torch.stack(means).mean() - loss / count) > 1e-2


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1024])
def test_chunks_and_a_frozen_head_change_nothing(chunk_size, frozen_head, monkeypatch):
    examples = ragged_examples(8)
    expected = step_gradients(examples, 8)
    monkeypatch.setattr(objective, "chunk_size", lambda vocab_size: chunk_size)
    actual = step_gradients(examples, 8, frozen_head)
    if frozen_head:
        assert actual.pop("lm_head.weight") is None
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab_size", [96, 8000, 128256, 2**21])
def test_as_many_logits_at_a_time_for_any_vocabulary(vocab_size):
    rows = objective.chunk_size(vocab_size)
    assert rows % 64 == 0 and rows >= 64
    assert rows == 64 or rows * vocab_size <= objective.CHUNK_LOGITS < (rows + 64) * vocab_size


def test_tokens_may_weigh_differently():
    """What a preference asks for: a gradient for every token's loss, not only for their sum."""
    model, (tokens, supervised, _) = new_model(), collate(ragged_examples(8))
    weights = torch.randn(int(supervised[:, 1:].sum()), generator=torch.Generator().manual_seed(1))
    gradients = []
    for frozen in (False, True):
        model.lm_head.requires_grad_(not frozen)
        hidden = model(tokens)[:, :-1][supervised[:, 1:]]
        losses = token_losses(model.logits, hidden, tokens[:, 1:][supervised[:, 1:]])
        gradients.append(torch.autograd.grad((losses * weights).sum(), hidden)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_no_logits_for_prompts_and_padding():
    model, seen = new_model(), []

    def logits(hidden):
        seen.append(len(hidden))
        return model.logits(hidden)

    _, count = next_token_loss(model, *collate(ragged_examples(8)), logits=logits)
    assert sum(seen) == count


def test_packed_rows_have_the_loss_and_gradient_of_padded_ones():
    examples = ragged_examples(6)
    examples[2].supervised[:] = True  # its first token, in the middle of the pack, is no target
    results = []
    for batch in (collate(examples), pack(examples)):
        model = new_model()
        loss, count = next_token_loss(model, *batch)
        loss.backward()
        results.append((loss, count, [one.grad for one in model.parameters()]))
    (padded, count, gradients), (packed, packed_count, packed_gradients) = results
    assert count == packed_count and pack(examples)[0].numel() == sum(
        len(one.ids) for one in examples)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_batch_without_supervised_tokens():
    """Exactly zero, and connected to every parameter, as averaging over processes needs."""
    model = new_model()
    tokens, supervised, _ = collate(ragged_examples(2))
    loss, count = next_token_loss(model, tokens, torch.zeros_like(supervised))
    loss.backward()
    assert loss.item() == 0.0 and count == 0
    assert all(parameter.grad is not None and not parameter.grad.any()
               for parameter in model.parameters())


def test_padding_with_the_end_token_keeps_the_end_supervised():
    """Padding is told by position: a real token with the id of padding is learned like any."""
    model = new_model()
    ids = torch.tensor([5, 6, 0, 0], dtype=torch.int32).numpy()
    example = Example(ids, torch.tensor([False, True, True, True]).numpy())
    _, count = next_token_loss(model, *collate([example]))
    assert count == 3

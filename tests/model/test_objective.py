"""The loss: equal to a plain computation; the gradient does not depend on the split of a step."""

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from minisft.data.batching import collate, micro_batches, pack
from minisft.data.encode_texts import encode_texts
from minisft.data.encoding import Example
from minisft.model import layer_arguments, loss
from minisft.model.config import ModelConfig
from minisft.model.decoder import CausalLM
from minisft.model.families import position_factors
from minisft.model.loss import (
    cross_entropy,
    next_token_loss,
    token_losses,
    token_losses_in_chunks,
)
from minisft.model.memory_saving_loss import cross_entropy_in_place, token_losses_frozen_head

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)


def new_model():
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    model.initialize()
    return model


def ragged_examples(count, seed=0):
    """Rows of 3 to 40 tokens with different numbers of supervised tokens at the end."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in torch.randint(3, 40, (count,), generator=generator).tolist():
        ids = torch.randint(0, 96, (length,), generator=generator).int().numpy()
        learned = int(torch.randint(1, length, (1,), generator=generator))
        examples.append(Example(ids, torch.arange(length).ge(length - learned).numpy()))
    return examples


def test_equals_masked_cross_entropy():
    """The loss, its gradient and the number of tokens."""
    model = new_model()
    tokens, supervised, _ = collate(ragged_examples(5))
    loss, count = next_token_loss(model, tokens, supervised)
    labels = torch.where(supervised, tokens, -100)
    logits = model.logits(model(tokens))
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, 96),
        labels[:, 1:].reshape(-1),
        ignore_index=-100,
        reduction="sum",
    )
    torch.testing.assert_close(loss, expected)
    assert count == (labels[:, 1:] != -100).sum()
    trained = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, trained),
        torch.autograd.grad(expected, trained),
        rtol=1e-5,
        atol=1e-5,
    )


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
    """Batches of 1, 3, 4 and 8 ragged rows: one step, one gradient."""
    examples = ragged_examples(8)
    expected = step_gradients(examples, 8)
    for batch_size in (4, 1, 3):
        actual = step_gradients(examples, batch_size)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


def test_mean_of_means_would_differ():
    """These rows distinguish the right normalisation from the common wrong one."""
    examples, model = ragged_examples(8), new_model()
    means = []
    for example in examples:
        loss, count = next_token_loss(model, *collate([example]))
        means.append(loss / count)
    loss, count = next_token_loss(model, *collate(examples))
    assert abs(torch.stack(means).mean() - loss / count) > 1e-2


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1024])
def test_the_gradient_does_not_depend_on_chunks(chunk_size, frozen_head, monkeypatch):
    examples = ragged_examples(8)
    expected = step_gradients(examples, 8)
    monkeypatch.setattr(loss, "chunk_size", lambda vocab_size: chunk_size)
    actual = step_gradients(examples, 8, frozen_head)
    if frozen_head:
        assert actual.pop("lm_head.weight") is None
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab_size", [96, 8000, 128256, 2**21])
def test_a_chunk_has_as_many_logits_for_any_vocabulary(vocab_size):
    rows = loss.chunk_size(vocab_size)
    assert rows % 64 == 0 and rows >= 64
    assert rows == 64 or rows * vocab_size <= loss.CHUNK_LOGITS < (rows + 64) * vocab_size


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_memory_saving_losses_equal_the_plain_ones(frozen_head, dtype, size):
    """Equal values, gradients and types, if every token has its own weight."""
    generator = torch.Generator().manual_seed(1)
    states, weights = (torch.randn(*shape, generator=generator) for shape in ((30, 32), (30,)))
    targets = torch.randint(0, 96, (30,), generator=generator)
    head = torch.nn.Linear(32, 96, bias=False).to(dtype).requires_grad_(not frozen_head)

    plain = partial(token_losses_in_chunks, cross_entropy=cross_entropy)
    fast = partial(token_losses_in_chunks, cross_entropy=cross_entropy_in_place)
    results = []
    for function in (token_losses_frozen_head if frozen_head else fast, plain):
        given = states.to(dtype).requires_grad_()
        losses = function(head, given, targets, size)
        trained = [given, *(parameter for parameter in head.parameters() if not frozen_head)]
        results.append([losses, *torch.autograd.grad((losses * weights).sum(), trained)])
        assert losses.dtype == torch.float32
    (losses, *gradients), (plain_losses, *plain_gradients) = results
    torch.testing.assert_close(losses, plain_losses, rtol=1e-6, atol=1e-6)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    )
    torch.testing.assert_close(gradients, plain_gradients, **tolerance)


def test_losses_without_gradients_are_the_same():
    model, (tokens, supervised, _) = new_model(), collate(ragged_examples(8))
    hidden = model(tokens)[:, :-1][supervised[:, 1:]].detach()
    arguments = (model.logits, hidden, tokens[:, 1:][supervised[:, 1:]])
    with torch.no_grad():
        plain = token_losses(*arguments)
    assert not plain.requires_grad
    torch.testing.assert_close(token_losses(*arguments), plain)


def test_losses_without_gradients_are_computed_in_chunks():
    """Torch's numbers, and no product but those of the chunks: a packed head would dequantise."""
    generator, sizes = torch.Generator().manual_seed(0), []
    states = torch.randn(600, 32, generator=generator)
    targets = torch.randint(0, 96, (600,), generator=generator)
    head = torch.nn.Linear(32, 96, bias=False)

    def logits(states):
        """The head's logits; notes how many."""
        sizes.append(len(states))
        return head(states)

    with torch.no_grad():
        actual = token_losses(logits, states, targets)
        expected = F.cross_entropy(head(states), targets, reduction="none")
    torch.testing.assert_close(actual, expected)
    assert sizes == [256, 256, 88]


@pytest.mark.parametrize("frozen_head", [False, True])
def test_no_logits_for_prompts_and_padding(frozen_head):
    model, seen = new_model(), []
    model.lm_head.requires_grad_(not frozen_head)

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
        len(one.ids) for one in examples
    )
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_texts_in_packed_blocks_have_the_losses_they_have_alone(monkeypatch):
    """--stage pt --packing: blocks of several texts, and blocks of parts of long texts."""
    draw, model, seen = random.Random(0), new_model(), []
    letters = SimpleNamespace(
        bos_token_id=0,
        add_bos_token=True,
        eos_token_id=1,
        encode=lambda text: [3 + ord(letter) % 90 for letter in text],
    )
    texts = ["".join(draw.choices("abcdefgh ij", k=length)) for length in (5, 9, 70, 0, 3, 24, 1)]
    blocks, _ = encode_texts(texts, letters, block_size=24, packing=True)
    assert max(len(block.lengths) for block in blocks) > 2  # several texts
    assert any(block.lengths == [24] for block in blocks)  # the middle of a long one
    monkeypatch.setattr(
        layer_arguments,
        "position_factors",
        lambda config, positions, dtype: (
            seen.append(positions) or position_factors(config, positions, dtype)
        ),
    )
    tokens, supervised, lengths = pack(blocks)
    states = model(tokens, lengths=lengths)[0, :-1][supervised[0, 1:]]
    packed = token_losses(model.logits, states, tokens[0, 1:][supervised[0, 1:]])

    alone = [
        torch.from_numpy(text.ids.astype("int64")) for block in blocks for text in block.texts()
    ]
    assert torch.equal(seen[0], torch.cat([torch.arange(len(ids)) for ids in alone]))
    expected = [
        F.cross_entropy(model.logits(model(ids[None]))[0, :-1], ids[1:], reduction="none")
        for ids in alone
    ]
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)


def packs(count):
    """Packs of different numbers of rows and of tokens."""
    return [pack(ragged_examples(3 + number % 4, seed=number)) for number in range(count)]


def count_graphs(model, batches):
    """(losses and gradients of the batches, the number of graphs compiled for them)."""
    counts = torch._dynamo.utils.counters
    counts.clear()
    results = []
    for batch in batches:
        model.zero_grad()
        loss, _ = next_token_loss(model, *batch)
        loss.backward()
        results.append([loss.detach(), *(one.grad for one in model.parameters())])
    return results, counts["stats"]["unique_graphs"]


@pytest.mark.parametrize("kernel", [False, True])
def test_packs_of_any_shape_are_compiled_as_one(kernel, monkeypatch):
    """One graph for the first pack, one for all others; with masks, and with the GPU kernel."""
    torch._dynamo.reset()
    plain, compiled = new_model(), new_model()
    batches = packs(8)
    expected, none = count_graphs(plain, batches)
    if kernel:
        monkeypatch.setattr("minisft.model.packed_attention.has_kernel", lambda *_: True)
        varlen_on_the_cpu()
    compiled.model.compile_layers(backend="aot_eager")
    actual, graphs = count_graphs(compiled, batches)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert none == 0 and 0 < graphs <= 2


def varlen_on_the_cpu():
    """Give torch's operators for rows of different lengths an implementation on the CPU."""
    from torch.nn.attention import varlen

    def attend(q, k, v, bounds):
        rows = zip(
            *(one.transpose(0, 1).tensor_split(bounds[1:-1].long(), dim=1) for one in (q, k, v)),
            strict=True,
        )
        return (
            torch.cat(
                [
                    F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True)
                    for row in rows
                ],
                dim=1,
            )
            .transpose(0, 1)
            .contiguous()
        )

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, bounds, bounds_k, longest, longest_k, is_causal, *_):
        assert is_causal and longest == bounds.diff().max() and bounds.dtype == torch.int32
        sums = torch.zeros(q.shape[1], q.shape[0])
        return attend(q, k, v, bounds), sums, torch.zeros(2, dtype=torch.uint64)

    def gradients(gradient, q, k, v, bounds):
        q, k, v = (one.detach().requires_grad_() for one in (q, k, v))
        return torch.autograd.grad(attend(q, k, v, bounds), (q, k, v), gradient)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(gradient, q, k, v, out, sums, bounds, *_):
        with ThreadPoolExecutor(1) as thread:  # inside an operator autograd is off
            return thread.submit(gradients, gradient, q, k, v, bounds).result()


def test_batch_without_supervised_tokens():
    """Exactly zero, and connected to every parameter, as DDP needs it."""
    model = new_model()
    tokens, supervised, _ = collate(ragged_examples(2))
    loss, count = next_token_loss(model, tokens, torch.zeros_like(supervised))
    loss.backward()
    assert loss.item() == 0.0 and count == 0
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters()
    )


def test_padding_with_the_end_token_keeps_the_end_supervised():
    """Padding is recognised by its position: a real token with the id of padding is learned."""
    model = new_model()
    ids = torch.tensor([5, 6, 0, 0], dtype=torch.int32).numpy()
    example = Example(ids, torch.tensor([False, True, True, True]).numpy())
    _, count = next_token_loss(model, *collate([example]))
    assert count == 3

"""A model that answers conversations, for chat.py and for programs.

    assistant = Assistant("examples/base", adapter="runs/demo")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    for piece in assistant.stream(messages):
        print(piece, end="", flush=True)
    responses, scores = assistant.inference([{"messages": messages}], Sampling(greedy=True))
    [response] = assistant.answer([{"messages": messages}])     # response.reasoning_content, too

Threads may share an Assistant. Their streams take turns token by token; a batch takes one turn.
"""

import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minisft.checkpoints import folders, hub
from minisft.checkpoints.adapter_forms import tokenizer_dir
from minisft.checkpoints.inference import add_frozen_adapter, load_for_inference
from minisft.common.devices import (
    check_compile,
    dtype_name,
    resolve_device,
    resolve_dtype,
    type_for_answers,
)
from minisft.common.errors import UserError
from minisft.common.sequences import batches_by_length
from minisft.data.formats import Tools
from minisft.generation.answer import Answer, Response
from minisft.generation.compiled import CompiledDecoder
from minisft.generation.context import Context
from minisft.generation.generate import stream
from minisft.generation.messages import check_messages, split_conversation
from minisft.generation.sampling import Sampling
from minisft.generation.scored import generate_scored
from minisft.generation.sharing import Caches, Turns, share_weights
from minisft.generation.thoughts import AnswerDecoder, decode_answer
from minisft.model.cache import KeyValueCache
from minisft.model.decoder import CausalLM
from minisft.model.joined_layers import has_joined_layers
from minisft.model.packed_weights import PackedLinear, can_pack_weights, pack_weights
from minisft.text.messages import Message, without_thoughts
from minisft.text.template_choice import trained_template
from minisft.text.tokenizer import Tokenizer, check_vocabulary

DEFAULT_SAMPLING = Sampling()


class Assistant:
    """A checkpoint, an adapter (not merged) and a template, ready to answer.

    template: a name, a .jinja file, or "auto" for the template that the adapter or the model was
    trained with, else the checkpoint's own. template_kwargs: variables for the template.
    enable_thinking: ask for thoughts before answers. default_system: the system prompt of
    conversations that have none. By default these three are as in training.
    max_length: the maximum number of tokens of a conversation with its answer, by default the
    model's context length. quantization_bit: 4 or 8, to save memory. base_model: the model of this
    checkpoint, if it is already loaded; several Assistants can share it. pack: bring the weights
    into the order of the fastest kernels of a CPU, see packed_weights.py; not before `compile`.

    The KV caches of the last `caches.limit` conversations are kept for their next turns.
    UserError if a file is missing or does not fit the model.
    """

    def __init__(
        self,
        path: str | Path,
        adapter: str | Path | None = None,
        template: str = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_length: int | None = None,
        quantization_bit: int | None = None,
        base_model: CausalLM | None = None,
        pack: bool = True,
        compiles: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        default_system: str | None = None,
    ):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device, type_for_answers(self.device))
        # Load the small files first: their errors should not wait for the weights.
        model_dir = hub.resolve(path)
        adapter_dir = None if adapter is None else hub.resolve_adapter(adapter)
        self.tokenizer = Tokenizer.load(tokenizer_dir(model_dir, adapter_dir))
        self.template = trained_template(
            template,
            self.tokenizer,
            adapter_dir or model_dir,
            default_system,
            template_kwargs,
            enable_thinking,
        )
        if base_model is None:
            model = load_for_inference(
                model_dir,
                adapter_dir,
                self.dtype,
                self.device,
                quantization_bit,
                pack,
                compiles=compiles,
            )
        else:
            if adapter_dir and has_joined_layers(base_model):
                raise UserError("Assistant: to share base_model, load it with pack=False.")
            model = share_weights(base_model)
            add_frozen_adapter(model, adapter_dir, self.dtype)
            # Not joined, because others have the weights, too.
            if pack and can_pack_weights(self.dtype, self.device):
                pack_weights(model, few_bits_only=compiles)
        self.model = model
        self.stop_ids = self.template.stop_token_ids(
            folders.generation_eos(model_dir, model.config)
        )
        longest = model.config.context_length
        if max_length is not None and max_length > longest:
            raise UserError(
                f"--max_length: {path} supports {longest} tokens at most, not {max_length}"
            )
        self.max_length = max_length or longest
        self.context = Context(self.template, self.max_length)
        names = [Path(part).resolve().name for part in (path, adapter) if part]
        self.name = " + ".join(names)
        self.turns = Turns()
        self.decoder: CompiledDecoder | None = None
        self.caches = Caches(partial(KeyValueCache, model.config))

    def compile(self) -> None:
        """Compile the model for `stream`. On a GPU a cache then takes max_length tokens' memory."""
        check_compile(self.device)
        if any(type(module) is PackedLinear for module in self.model.modules()):
            raise UserError("Assistant: to compile, load the model with compiles=True.")
        self.decoder = CompiledDecoder(self.model, self.max_length)
        self.caches = Caches(self.decoder.new_cache, self.caches.limit)

    @property
    def description(self) -> str:
        """Model, template, device, number type and context, on one line."""
        return (
            f"{self.name} · template {self.template.name} · {self.device} "
            f"{dtype_name(self.dtype)} · context {self.max_length}"
        )

    def stream(
        self,
        messages: list[Message],
        sampling: Sampling = DEFAULT_SAMPLING,
        tools: Tools = None,
        say: Callable[[str], object] = warnings.warn,
    ) -> Answer:
        """The answer to a conversation, to iterate over; the caller may stop at any time.

        say: called if the oldest turns are dropped. UserError for messages that are not valid.
        """
        started = time.perf_counter()
        ids = self.prompt_ids(messages, sampling, tools, say)
        answer = Answer(started, num_prompt_tokens=len(ids))
        answer.pieces = self._write(answer, ids, sampling)
        return answer

    def _write(
        self, answer: Answer, ids: list[int], sampling: Sampling
    ) -> Generator[str, None, None]:
        """Generate the answer to `ids`: yield its text, and update its thoughts and counters."""
        limit = self.context.answer_limit(ids, sampling.max_new_tokens)
        sampling = replace(sampling, max_new_tokens=limit)
        cache = self.caches.take(ids)
        self._forget_stretched(cache, len(ids))
        answer.num_reused = cache.length
        decoder, chosen = AnswerDecoder(self.template, ids), []
        steps = stream(self.decoder or self.model, ids, sampling, self.stop_ids, cache)
        try:
            while True:
                with self.turns:
                    token = next(steps, None)
                if token is None:
                    break
                chosen.append(token)
                answer.count_token()
                thoughts, piece = decoder.push(token)
                answer.reasoning_content += thoughts
                yield piece
            thoughts, piece = decoder.flush()
            answer.reasoning_content += thoughts
            yield piece
        finally:
            answer.is_truncated = answer.num_tokens == limit
            self._forget_stretched(cache, cache.length)
            self.caches.give_back((ids + chosen)[: cache.length], cache)

    def _forget_stretched(self, cache: KeyValueCache, length: int) -> None:
        """Empty a cache for or of `length` tokens if dynamic scaling stretches their angles.

        All angles change with the length there, those of the tokens in the cache, too.
        """
        config = self.model.config
        if config.has_dynamic_rope and length > config.max_position_embeddings:
            cache.truncate(0)

    def inference(
        self,
        conversations: Sequence[Any],
        sampling: Sampling = DEFAULT_SAMPLING,
        batch_size: int = 8,
        rows: Sequence[int] | None = None,
        say: Callable[[str], object] = warnings.warn,
    ) -> tuple[list[str], list[float]]:
        """(texts, scores) of the answers to conversations, without thoughts; see `answer`."""
        responses = self.answer(conversations, sampling, batch_size, rows, say)
        texts = [response.text for response in responses]
        return texts, [response.score for response in responses]

    def answer(
        self,
        conversations: Sequence[Any],
        sampling: Sampling = DEFAULT_SAMPLING,
        batch_size: int = 8,
        rows: Sequence[int] | None = None,
        say: Callable[[str], object] = warnings.warn,
    ) -> list[Response]:
        """Answers to conversations {"messages": [...], "tools": [...]}, tools optional.

        The batches do not change the answers. rows: the number of each conversation, which selects
        its random numbers.
        """
        prompts = []
        for number, conversation in enumerate(conversations, start=1):
            name = f"conversation {number}"
            try:
                messages, tools = split_conversation(conversation)
                prompts.append(
                    self.prompt_ids(
                        messages, sampling, tools, lambda text, name=name: say(f"{name}: {text}")
                    )
                )
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        rows = range(len(prompts)) if rows is None else rows
        limits = [self.context.answer_limit(ids, sampling.max_new_tokens) for ids in prompts]
        responses: dict[int, Response] = {}
        for places in batches_by_length([len(ids) for ids in prompts], batch_size):
            with self.turns:
                answers, scores = generate_scored(
                    self.model,
                    [prompts[place] for place in places],
                    sampling,
                    self.stop_ids,
                    rows=[rows[place] for place in places],
                    limits=[limits[place] for place in places],
                )
            for place, answer, score in zip(places, answers, scores, strict=True):
                thoughts, text = decode_answer(self.template, prompts[place], answer)
                responses[place] = Response(text, thoughts, score)
        return [responses[place] for place in range(len(prompts))]

    def prompt_ids(
        self,
        messages: list[Message],
        sampling: Sampling,
        tools: Tools = None,
        say: Callable[[str], object] = warnings.warn,
    ) -> list[int]:
        """The token ids of the messages, without the oldest turns if they do not fit.

        UserError if an id is not in the vocabulary.
        """
        messages = check_messages(messages, tools)
        if not self.template.facts.knows_thoughts:  # the template omits earlier thoughts
            messages = [without_thoughts(message) for message in messages]
        kept = self.context.fit(messages, sampling.max_new_tokens, tools)
        if len(kept) < len(messages):
            say(
                f"the conversation is longer than {self.max_length} tokens: the oldest "
                f"{len(messages) - len(kept)} messages are left out"
            )
        ids = self.template.encode_prompt(kept, tools)
        check_vocabulary(ids, self.model.config.vocab_size)
        return ids

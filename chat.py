"""Chat with a model: in the terminal, with one question, with a file of prompts, or on a web page.

    python chat.py --model_name_or_path examples/base --adapter runs/demo
    python chat.py --model_name_or_path examples/base --adapter runs/demo --prompt "What is 2 + 2?"
    python chat.py --model_name_or_path examples/base --template plain --prompt - < question.txt
    python chat.py --model_name_or_path MODEL --file prompts.jsonl --output answers.jsonl
    python chat.py --model_name_or_path examples/base --adapter runs/demo --web --compare_with none

Without a terminal and without --prompt, every line of standard input is a turn of one conversation.
A refused line does not end the conversation, but the exit status is then 2. Answers go to standard
output, everything else to standard error.
"""

import sys
from argparse import Namespace
from functools import partial

from minisft.chat.options import parse_options, read_password, read_question, read_system
from minisft.common.script import run_script
from minisft.data.early_checks import check_places

if __name__ == "__main__":
    # Before torch is imported, so that --help and a mistyped flag or path answer at once.
    command_line = run_script(lambda: check_places(parse_options()))
else:
    command_line = None

from minisft.chat import prompts, web
from minisft.chat.model_thread import ModelThread
from minisft.chat.page import Page
from minisft.chat.terminal import INTERRUPTED, Conversation, converse, open_standard_streams
from minisft.chat.transcript import Transcript
from minisft.checkpoints.folders import load_model
from minisft.checkpoints.hub import model_or_base, resolve, resolve_adapter
from minisft.common.devices import resolve_device, resolve_dtype, type_for_answers
from minisft.common.hashes import model_files
from minisft.common.model_flags import dtype_option, template_settings
from minisft.generation.assistant import Assistant
from minisft.generation.sampling import Sampling
from minisft.model.packed_weights import can_pack_weights, pack_weights
from minisft.text.template_choice import CHAT_TEMPLATE, settings_without_effect

# The KV caches that the web page keeps for the next turns of conversations. With --compile every
# cache takes the memory of the longest conversation.
NUM_CACHES, NUM_COMPILED_CACHES = 8, 2


def main(options: Namespace | None = None) -> None:
    """Chat with these options; by default those of the command line."""
    options = options or parse_options()
    options.model_name_or_path = model_or_base(options.model_name_or_path, options.adapter)
    open_standard_streams()
    question, system = read_question(options), read_system(options)
    sampling = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.repetition_penalty,
        options.greedy,
        options.seed,
    )
    if options.file:
        prompts.check_output(options.output, options.file, options.overwrite)
    if options.web:
        web.check_gradio()
    transcript = Transcript(options.log)

    thread = ModelThread() if options.web else None
    assistants = thread.run(load_assistants, options) if thread else load_assistants(options)
    report_unused(options, assistants)
    for assistant in assistants:
        if system:
            name = f"--identity {options.identity}" if options.identity else "--default_system"
            assistant.context.check_system(system, sampling.max_new_tokens, name)
        if options.compile:
            assistant.compile()

    if options.file:
        answer_file(options, assistants[0], sampling, system)
    elif options.web:
        for assistant in assistants:
            assistant.caches.limit = NUM_COMPILED_CACHES if options.compile else NUM_CACHES
        page = Page(assistants, sampling, system or "", transcript, thread)
        password = read_password(options)
        web.serve(page, options.server_name, options.server_port, password, options.share)
    else:
        conversation = Conversation(assistants[0], sampling, system, transcript)
        if question is None:
            sys.exit(converse(conversation))
        sys.exit(0 if conversation.ask(question) else INTERRUPTED)


def load_assistants(options: Namespace) -> list[Assistant]:
    """The model to chat with, and with --compare_with a second one on the same base weights."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(dtype_option(options), device, type_for_answers(device))
    path, bits = options.model_name_or_path, options.quantization_bit
    shared = load_model(resolve(path), dtype, device, bits) if options.compare_with else None

    def load(adapter: str | None, template: str, enable_thinking: bool | None) -> Assistant:
        """The model with an adapter."""
        return Assistant(
            path,
            adapter,
            template,
            device,
            dtype,
            options.max_length,
            bits,
            shared,
            pack=not shared,
            compiles=options.compile,
            template_kwargs=template_settings(options)["template_kwargs"],
            enable_thinking=enable_thinking,
            # Any other text becomes a message of the conversation.
            default_system="" if options.default_system == "" else None,
        )

    assistants = [load(options.adapter, options.template, options.enable_thinking)]
    if options.compare_with == "none":
        # Prompt the base like the adapter: the base model may have no chat template.
        trained, template = assistants[0].template, options.template
        if template == "auto" and options.adapter:
            saved = resolve_adapter(options.adapter) / CHAT_TEMPLATE
            template = str(saved) if saved.is_file() else trained.name
        assistants.append(load(None, template, trained.enable_thinking))
        assistants[-1].template.name = trained.name
    elif options.compare_with:
        assistants.append(load(options.compare_with, options.template, options.enable_thinking))
    if shared and can_pack_weights(dtype, device):
        pack_weights(*(assistant.model for assistant in assistants), few_bits_only=options.compile)
    for assistant in assistants:
        assistant.turns = assistants[0].turns  # they share a device
    return assistants


def report_unused(options: Namespace, assistants: list[Assistant]) -> None:
    """Say which flags do not change the prompts of a model's chat template."""
    for assistant in assistants:
        for line in settings_without_effect(assistant.template, **template_settings(options)):
            print(f"{assistant.name}: {line}", file=sys.stderr)


def answer_file(
    options: Namespace, assistant: Assistant, sampling: Sampling, system: str | None
) -> None:
    """Answer the prompts in --file."""
    settings = {
        "model_name_or_path": options.model_name_or_path,
        "adapter": options.adapter,
        "model_files": model_files([options.model_name_or_path, options.adapter]),
        "template": options.template,
        "template_kwargs": options.template_kwargs,
        "enable_thinking": options.enable_thinking,
        "max_length": options.max_length,
        "quantization_bit": options.quantization_bit,
    }
    number = prompts.answer_file(
        assistant,
        options.file,
        options.output,
        sampling,
        options.batch_size,
        system,
        settings,
        options.max_samples,
        options.overwrite,
    )
    print(f"{options.output}: {number} answers", file=sys.stderr)


if __name__ == "__main__":
    run_script(partial(main, command_line))

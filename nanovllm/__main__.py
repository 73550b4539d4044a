"""Chat in the terminal: `python -m nanovllm MODEL`, or one answer with `--prompt`."""

import argparse
import logging
import os
import sys
from dataclasses import replace

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.demo import demo_model_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nanovllm",
        description="Chat with a model. Ctrl-C stops an answer, Ctrl-D leaves, /new forgets the conversation.",
    )
    parser.add_argument("model", nargs="?", help="checkpoint directory or hub id (default: a 135M demo model)")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--system", help="system message of every conversation")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: what the checkpoint recommends)")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: what the context has room for)")
    parser.add_argument("--seed", type=int, help="the same answers in every run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--max-model-len", type=int, default=4096, help="tokens of a conversation (default: %(default)s)"
    )
    return parser.parse_args(argv)


def make_params(llm: LLM, args: argparse.Namespace) -> SamplingParams:
    """What the checkpoint recommends, and over it what the command line says."""
    fields = {} if args.temperature is None else {"temperature": args.temperature}
    return replace(llm.get_default_sampling_params(), max_tokens=args.max_tokens, seed=args.seed, **fields)


def answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Print the answer as it comes; Ctrl-C ends it where it is."""
    text = ""
    # A base model has no chat template: it goes on with what was said last.
    has_template = llm.get_tokenizer().chat_template is not None
    prompts = llm.chat_prompts(messages) if has_template else messages[-1]["content"]
    deltas = llm.stream(prompts, params)
    try:
        for delta in deltas:
            text += delta.text
            print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    finally:
        deltas.close()  # type: ignore[attr-defined]
    print(flush=True)
    return text


def chat(llm: LLM, beginning: list[dict[str, str]], params: SamplingParams) -> None:
    """Questions from the terminal, each answered with all before it, until Ctrl-D."""
    messages = list(beginning)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # the line is thrown away, as in a shell
            print()
            continue
        if question == "/new":
            messages = list(beginning)
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                messages.append({"role": "assistant", "content": answer(llm, messages, params)})
            except ValueError as error:  # most of all a conversation that has grown too long
                print(f"{error}\n(/new begins another conversation)", file=sys.stderr)
                messages.pop()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.getLogger("nanovllm").setLevel(logging.WARNING)
    try:
        # One conversation at a time.
        llm = LLM(args.model or demo_model_path(), device=args.device, max_num_seqs=1, max_model_len=args.max_model_len)
        params = make_params(llm, args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    with llm:
        if args.prompt is None:
            chat(llm, beginning, params)
            return
        try:
            answer(llm, [*beginning, {"role": "user", "content": args.prompt}], params)
        except ValueError as error:
            sys.exit(f"error: {error}")
        except BrokenPipeError:  # whoever read the answer, `| head` say, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
            sys.exit(1)


if __name__ == "__main__":
    main()

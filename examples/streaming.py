"""Text as it comes: a plain loop, no event loop needed. Leaving the loop ends the request."""

import argparse
from time import perf_counter

from nanovllm import LLM, SamplingParams
from nanovllm.utils.demo import demo_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Print text as it is generated.")
    parser.add_argument("prompt", nargs="?", default="Once upon a time, in a small harbour town,")
    parser.add_argument("--model", help="checkpoint directory or hub id (default: a 135M demo model)")
    parser.add_argument("--max-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=3, help="stop after so many (default: %(default)s)")
    args = parser.parse_args()

    llm = LLM(args.model or demo_model_path())
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=0, max_tokens=args.max_tokens)
    print(args.prompt, end="")
    start, first, num_tokens, text = perf_counter(), 0.0, 0, ""
    for delta in llm.stream(args.prompt, params):
        first = first or perf_counter() - start
        num_tokens += len(delta.token_ids)
        text += delta.text
        print(delta.text, end="", flush=True)
        if text.count(".") >= args.sentences:
            break  # the engine drops the request
    print(f"\n\nfirst token after {first:.2f} s, {num_tokens / (perf_counter() - start):.0f} tokens/s")


if __name__ == "__main__":
    main()

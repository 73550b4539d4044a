"""Two chat prompts, answered. Without arguments by a small demo model on whatever device there is; see --help."""

import argparse

from nanovllm import LLM, SamplingParams
from nanovllm.utils.demo import demo_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer two chat prompts.")
    parser.add_argument("--model", help="checkpoint directory or Hugging Face hub id (default: a 135M demo model)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer at most (default: %(default)s)")
    args = parser.parse_args()

    llm = LLM(args.model or demo_model_path())
    sampling_params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    questions = ("introduce yourself", "list all prime numbers within 100")
    outputs = llm.chat([[{"role": "user", "content": question}] for question in questions], sampling_params)

    for output in outputs:
        print(f"\nPrompt: {output.prompt!r}")
        print(f"Completion: {output['text']!r}")


if __name__ == "__main__":
    main()

"""Chats: several conversations in one call, then one that goes on. For a chat in the terminal: python -m nanovllm."""

import argparse

from nanovllm import LLM, SamplingParams
from nanovllm.utils.demo import demo_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversations through the model's chat template.")
    parser.add_argument("--model", help="checkpoint directory or hub id (default: a 135M demo model)")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer (default: %(default)s)")
    args = parser.parse_args()

    # Prefixes are shared by the block: small ones, for conversations as short as these.
    llm = LLM(args.model or demo_model_path(), kvcache_block_size=16)
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    system = {"role": "system", "content": "You answer in one sentence."}
    questions = ["What is the capital of France?", "Why is the sky blue?"]
    conversations = [[system, {"role": "user", "content": question}] for question in questions]
    for question, output in zip(questions, llm.chat(conversations, params)):
        print(f"{question}\n  {output.outputs[0].text}")

    messages = conversations[0]
    for question in ("And of Italy?", "Which of them is older?"):
        # What was said before is in the prefix cache: only what is new is computed.
        messages = [*messages, {"role": "user", "content": question}]
        (output,) = llm.chat(messages, params, use_tqdm=False)
        messages = [*messages, {"role": "assistant", "content": output.outputs[0].text}]
        print(f"{question}\n  {output.outputs[0].text}  ({output.metrics.num_cached_prompt_tokens} tokens cached)")


if __name__ == "__main__":
    main()

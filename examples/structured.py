"""Answers that a program can read: a JSON schema, an expression, a choice. Needs the extra `structured`."""

import argparse
import json

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.utils.demo import demo_model_path

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "languages": {"type": "array", "items": {"enum": ["English", "French", "Thai"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Outputs that match a grammar.")
    parser.add_argument("--model", help="checkpoint directory or hub id (default: a 135M demo model)")
    args = parser.parse_args()

    llm = LLM(args.model or demo_model_path())

    def ask(question: str, **kind) -> str:
        structured = StructuredOutputsParams(**kind)
        params = SamplingParams(temperature=0, max_tokens=100, structured_outputs=structured)
        (output,) = llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
        return output.outputs[0].text

    person = json.loads(ask("Describe Marie, 41, from Lyon, as JSON.", json=PERSON))
    print(f"{person['name']}, {person['age']}, speaks {' and '.join(person['languages'])}")
    print("Language:", ask("Which language is 'Guten Morgen'?", choice=["English", "French", "German"]))
    print("Year:", ask("In which year did men first land on the moon?", regex="[0-9]{4}"))


if __name__ == "__main__":
    main()

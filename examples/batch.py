"""A dataset through a model: JSONL in, JSONL out. Stop it at any time; started again it goes on where it was.

    python examples/batch.py questions.jsonl answers.jsonl --model Qwen/Qwen3-0.6B

A line of the input is {"prompt": "..."} or {"messages": [...]}, with an "id" if line numbers will not do. A line is
written as soon as its answer is complete, in the order in which answers are; {"id": ..., "error": "..."} for a row that
cannot be answered, such as one that is empty or too long. A line that is no JSON object ends it before it begins.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nanovllm import LLM, SamplingParams
from nanovllm.utils.demo import demo_model_path


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with the numbers of their lines, from 0."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row = f"{error.msg} at column {error.colno}"
            if not isinstance(row, dict):
                raise ValueError(f"line {number + 1} of {path} is no JSON object: {row}")
            yield number, row


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a dataset by their id."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_lines(path):
        row_id = str(row.get("id", number))
        if row_id in rows:
            raise ValueError(f"line {number + 1} of {path} has the id {row_id!r}, which another line has")
        rows[row_id] = row
    return rows


def repair(path: Path) -> set[str]:
    """Ids that are answered already. A last line that was cut in the middle of writing is taken out."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return {str(row.get("id")) for _, row in read_lines(path)}


def make_prompt(llm: LLM, row: dict[str, Any], params: SamplingParams) -> Any:
    """Raises ValueError for a row that cannot be answered."""
    if "messages" not in row and "prompt" not in row:
        raise ValueError(f"it has neither 'prompt' nor 'messages', but {list(row)}")
    prompts = llm.chat_prompts(row["messages"]) if "messages" in row else [row["prompt"]]
    if len(prompts) > 1:
        raise ValueError(f"'messages' has {len(prompts)} conversations: a row takes one")
    if isinstance(prompts[0], int):  # in a list it would be a prompt's only token
        raise ValueError(f"'prompt' must be a text or a list of token ids, got {prompts[0]}")
    llm.stream(prompts, params)  # checks it at once, and queues nothing before somebody reads
    return prompts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer every line of a JSONL file; resumable.")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="checkpoint directory or hub id (default: a 135M demo model)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    args = parser.parse_args()

    try:
        rows, done = read_rows(args.input), repair(args.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    todo = {row_id: row for row_id, row in rows.items() if row_id not in done}
    print(f"{len(rows)} rows, {len(rows) - len(todo)} answered already")
    if not todo:
        return
    with LLM(args.model or demo_model_path()) as llm, args.output.open("a", encoding="utf-8") as output:
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        progress = tqdm(total=len(todo), unit="row")

        def write(row_id: str, **fields: Any) -> None:
            output.write(json.dumps({"id": row_id, **fields}, ensure_ascii=False) + "\n")
            output.flush()
            progress.update()

        prompts = {}
        for row_id, row in todo.items():
            try:
                prompts[row_id] = make_prompt(llm, row, params)
            except ValueError as error:
                write(row_id, error=str(error))
        # Request ids ascend in the order of the prompts, but deltas come in any: a text is known by its request's id.
        texts: dict[int, str] = {}
        first_id: int | None = None
        row_ids = list(prompts)
        for delta in llm.stream(list(prompts.values()), params):
            first_id = delta.request_id if first_id is None else first_id
            texts[delta.request_id] = texts.get(delta.request_id, "") + delta.text
            if delta.finish_reason:
                text = texts.pop(delta.request_id)
                write(row_ids[delta.request_id - first_id], text=text, finish_reason=delta.finish_reason)
        progress.close()


if __name__ == "__main__":
    main()

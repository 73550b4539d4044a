"""Conversations -> texts, by a chat template that transformers runs in a sandbox. Called by the input processor."""

import json
from typing import Any

from nanovllm.utils.validation import WrongTypeError, check_bool


def apply_chat_template(tokenizer: Any, messages: Any, chat_template_kwargs: Any, **kwargs: Any) -> list[str]:
    """The texts of one conversation or a list of them; `kwargs` are the tokenizer's own, the others the template's."""
    if not isinstance(messages, (list, tuple)):
        raise WrongTypeError(f"messages must be a list, got {messages!r} of type {type(messages).__name__}")
    conversations: Any = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
    if tokenizer.chat_template is None and kwargs.get("chat_template") is None:
        raise ValueError("this tokenizer has no chat template: pass chat_template=, or use generate() with a prompt")
    more = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(more, dict):
        raise WrongTypeError(f"chat_template_kwargs must be a dict, got {more!r} of type {type(more).__name__}")
    for name in ("add_generation_prompt", "continue_final_message"):
        check_bool(name, kwargs[name])
    kwargs["tokenize"] = False
    if taken := sorted(set(more) & {"conversation", *kwargs}):
        raise ValueError(f"chat_template_kwargs contains {taken}, which is no variable of the template's own")
    texts = []
    for conversation in conversations:
        is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
        if not is_list or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in conversation):
            raise WrongTypeError(f"messages must be lists of dicts with 'role' and 'content', got {conversation!r}")
        plain = [as_templates_expect(message) for message in conversation]
        try:
            texts.append(tokenizer.apply_chat_template(plain, **kwargs, **more))
        except Exception as error:  # of many kinds: the template's own, the sandbox's, Python's
            raise ValueError(f"the chat template cannot put these messages into words: {error}") from error
    return texts


def as_templates_expect(message: dict[str, Any]) -> dict[str, Any]:
    """One of OpenAI's messages: of a content in parts the texts as one, of tool calls the arguments as objects."""
    if isinstance(message.get("tool_calls"), (list, tuple)):
        calls = [with_parsed_arguments(call) for call in message["tool_calls"]]
        message = {**message, "content": message.get("content") or "", "tool_calls": calls}
    content = message.get("content")
    if isinstance(content, str) or (content is None and set(message) - {"role", "content"}):
        return message
    if not isinstance(content, (list, tuple)):
        raise WrongTypeError(
            f"the content of a message must be a string or a list of parts, got {content!r} from {message['role']!r}"
        )
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
    if wrong := [part for part, text in zip(content, texts, strict=True) if not isinstance(text, str)]:
        raise ValueError(f"the content of a message has a part that is no text: {wrong[0]!r}; only text is understood")
    return {**message, "content": "\n".join(texts)}


def with_parsed_arguments(call: Any) -> Any:
    function: Any = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments) if arguments else {}}}
    except ValueError as error:
        raise ValueError(f"a tool call has arguments that are no JSON: {arguments!r}: {error}") from None

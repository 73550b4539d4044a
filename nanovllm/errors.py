"""What the engine raises beside Python's own exceptions."""


class EngineDeadError(RuntimeError):
    """The device or a rank is lost for good; every further call of the same engine raises this again.

    Close it and make another `LLM`: the message says what happened.
    """

"""The progress bar of `generate`."""

import contextlib
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """Requests that are done, drawn by tqdm. Where nothing can be drawn any more, as on a terminal that is closed, the
    bar ends and the requests go on."""

    def __init__(self, num_requests: int, is_shown: bool):
        self._bar: Any = None
        if is_shown:
            with contextlib.suppress(OSError, ValueError):
                self._bar = tqdm(total=num_requests, desc="Generating", unit="req", dynamic_ncols=True)

    def update(self, num_requests: int, rates: str) -> None:
        """So many more are done, at the `rates` that stand beside the bar from now on."""
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(rates, refresh=False)
                self._bar.update(num_requests)
            except (OSError, ValueError):
                self._give_up()

    def close(self) -> None:
        if self._bar is not None:
            try:
                self._bar.refresh()
                self._bar.close()
            except (OSError, ValueError):
                self._give_up()

    def _give_up(self) -> None:
        self._bar.disable = True  # or it would try once more when it is collected
        self._bar = None

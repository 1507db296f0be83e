"""What other libraries say while a model is loaded: nothing, for what goes wrong there raises, and we tell it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet() -> None:
    """Not a word from them from now on: for programs whose output somebody reads."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
        library.utils.logging.disable_progress_bar()


@contextmanager
def hushed() -> Iterator[None]:
    """`quiet` for the length of a block, unless our own logger is at DEBUG; then they are as they were."""
    import diffusers
    import transformers

    if logging.getLogger("fastguard").isEnabledFor(logging.DEBUG):
        yield
        return
    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    quiet()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # theirs about each other; ours are of another kind
            yield
    finally:
        for log, (level, shown) in zip(logs, before, strict=True):
            log.set_verbosity(level)
            if shown:
                log.enable_progress_bar()

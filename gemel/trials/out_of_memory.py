"""Work on images that is done again on fewer of them when memory runs out, and left out when that does not help."""

import logging
import math
from collections.abc import Callable
from typing import TypeVar

from gemel.environment.failures import is_out_of_memory

T = TypeVar("T")

BATCHES = (math.inf, 8, 4, 2, 1)  # images in a batch at most, one after the other

log = logging.getLogger(__name__)


def on_fewer_images(what: str, num_pixels: int, work: Callable[[int, float], T]) -> T | None:
    """What work(num_pixels, max_batch) returns, on fewer pixels and smaller batches while it runs out of memory.

    None, with a warning that names `what`, if it does on single images. Any other failure is raised.
    """
    for attempt, max_batch in enumerate(BATCHES):
        try:
            return work(num_pixels >> attempt, max_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            then = "it is done again on fewer images" if max_batch > 1 else "the merge goes on without it"
            log.warning("out of memory in %s; %s", what, then)
    return None

"""Processes that load samples: they run the main script of the program once more, up to where it starts them."""

import multiprocessing


def raise_in_a_loader_process() -> None:
    """Raises RuntimeError where a new process is only importing the main script, which must not merge again there."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a loader process of a merge ran the script from its beginning and came to merge_workload again: "
            "put what your script does below `if __name__ == '__main__':`, or pass num_workers=0"
        )

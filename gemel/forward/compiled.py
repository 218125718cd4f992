"""Running a module as torch.compile compiled it, in some of its calls only.

Ansel et al., "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation",
ASPLOS 2024.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

BACKEND = "inductor"
MOST_FORMS = 256  # in which one piece of Python code, such as the call of a module, is compiled; torch's default is 8


class Compiled:
    """A module that is compiled when it is first called `within`, and again when sizes of inputs, hooks, or what is
    trained are new. Outside of `within` it runs as ever, and so do its copies."""

    def __init__(self, module: nn.Module):
        module.compile(backend=BACKEND)
        self.module = module
        self.call, module._compiled_call_impl = module._compiled_call_impl, None

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """Within, the module runs compiled, with the hooks that it has now, and draws the random numbers of torch."""
        import torch._dynamo  # these take a second to import
        import torch._inductor.config

        of_dynamo = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=MOST_FORMS)
        with of_dynamo, torch._inductor.config.patch(fallback_random=True):
            self.module._compiled_call_impl = self.call
            try:
                yield
            finally:
                self.module._compiled_call_impl = None

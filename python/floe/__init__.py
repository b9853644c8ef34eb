"""Sparse KV retrieval for long-context language models.

floe keeps the keys and values of long contexts in host memory and, for each decode step and kv head, attends exactly to
the few tokens that matter, while summaries stand in for all others.

* `Engine` and `Sequence`: the cache and its attention, for any host engine; numpy arrays or DLPack tensors, no copies.
* `Trace`, `write_trace`, `replay`, `profile`: recorded long contexts, policies compared on them, hot tiers simulated.
* `floe.transformers`: a cache for Hugging Face transformers (imports torch; `import floe` alone does not).

Errors carry the library's texts: `ValueError` for a bad argument, file or setting, `OSError` (or one of its kinds) where the
system refused, `RuntimeError` where the program or the machine is at fault.
"""

from ._floe import Engine, Sequence, Trace, TraceTensor, __version__, write_trace
from .reports import profile, replay

__all__ = ["Engine", "Sequence", "Trace", "TraceTensor", "__version__", "profile", "replay", "write_trace"]

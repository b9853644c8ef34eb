"""A floe cache for Hugging Face transformers.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from floe.transformers import FloeCache, enable

model = enable(AutoModelForCausalLM.from_pretrained(name))
model.generate(**inputs, past_key_values=FloeCache(model.config, policy="floe", budget=256))
```

Prompts are attended exactly; every later token attends to `budget` tokens per kv head, and summaries stand in for the rest.
"""

from .attention import SUPPORTED, enable
from .cache import FloeCache
from .record import record
from .rope import unrotate

__all__ = ["SUPPORTED", "FloeCache", "enable", "record", "unrotate"]

"""What both models compute. `compare` is the way in: it has them run on `prompts` (by `traffic`; under torchrun by
`parallel`) and says whether they agree, and `place` where they part.

Models are `programs`, without weights (`hollow`), that pass through their layers together (`convoy`), watched (`trace`)
at modules that are each other's (`alignment`). Needs torch, megatron-core and transformers; nothing is imported here.
"""

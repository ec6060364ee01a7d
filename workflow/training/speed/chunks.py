"""How much of the logits a fused loss makes at once."""

LOGITS_AT_ONCE = 2**24  # elements: 342 rows of 49,152 tokens, 64 MiB in float32

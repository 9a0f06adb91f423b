"""Raw text to token shards: reading inputs, training a tokenizer, tokenizing in parallel, packing."""

"""Parts that several methods share: queries that look, choice of tokens, splitting of caps, merging of tokens."""

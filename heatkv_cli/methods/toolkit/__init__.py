"""What several methods share: which queries look, which tokens are chosen, how caps are split, how tokens merge."""

"""One paper = one file = one frozen dataclass. A method knows the core and no model, metric or other method."""

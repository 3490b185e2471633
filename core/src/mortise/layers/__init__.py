"""Building blocks that the model families share, all of them free of any device."""

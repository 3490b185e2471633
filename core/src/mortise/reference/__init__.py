"""The built-in backend: each hook in plain torch, as the definition of what it means."""

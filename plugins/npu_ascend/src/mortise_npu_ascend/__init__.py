"""The Ascend NPU backend of Mortise."""

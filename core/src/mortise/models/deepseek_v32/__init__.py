"""DeepSeek-V3.2, and DeepSeek-V3, which is the same without the indexer."""

"""The conformance kit, judged by backends that are right and by backends that are not."""

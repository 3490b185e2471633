"""Writing a model directory in a published quantised layout."""

"""What a checkpoint says of its quantisation, read module by module."""

"""The vendor libraries' functions for fp4 on a CPU."""

"""How a Triton program runs: compiled for the chip, or on a CPU as the chip would compute it."""

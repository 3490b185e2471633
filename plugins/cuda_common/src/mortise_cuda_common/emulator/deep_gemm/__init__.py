"""DeepGEMM's own functions on a CPU, as the library has them and as its fork has them."""
